"""The tiny checkpoint in float32, so that a sequence's logits do not hang on its neighbours."""

from pathlib import Path

import pytest

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import make_plan


@pytest.fixture(scope="session")
def float_gguf(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekd.export.to_gguf import write_gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf"
    write_gguf(tiny, make_plan(tiny, "f32"), path)
    return path


@pytest.fixture(scope="session")
def float_onnx(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgekd.export.to_onnx import write_onnx

    folder = tmp_path_factory.mktemp("onnx") / "tiny-f32"
    folder.mkdir()
    write_onnx(tiny, make_plan(tiny, "f32"), folder)
    return folder
