"""The tiny checkpoint in float32, so that a sequence's logits do not hang on its neighbours."""

from pathlib import Path

import pytest

from edgekd.export.checkpoint import Checkpoint
from tests.conftest import make_gguf, make_onnx


@pytest.fixture(scope="session")
def float_gguf(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tiny, "f32", tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def float_onnx(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_onnx(tiny, "f32", tmp_path_factory.mktemp("onnx"))
