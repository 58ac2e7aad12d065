"""What the tests of NPU graphs share: small fixed shapes, and a prompt that fills them unevenly."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import Quant, make_plan
from edgekd.export.to_npu import NpuOptions, write_graphs
from edgekd.runtime.static_model import StaticModel, write_static

CONTEXT, PREFILL = 64, 16
PROMPT = list(range(5, 25))  # two pieces, the second one padded
needs_qnn = pytest.mark.skipif(
    find_spec("onnxruntime_qnn") is None, reason="needs pip install onnxruntime-qnn"
)


def write_uncompiled(
    checkpoint: Checkpoint, folder: Path, quant: Quant = "q4_0", **options: Any
) -> Path:
    """Write the graphs without compiling them, whatever is installed."""
    folder.mkdir(parents=True)
    chosen = NpuOptions(context_tokens=CONTEXT, prefill_tokens=PREFILL, **options)
    parts = write_graphs(checkpoint, make_plan(checkpoint, quant), folder, chosen)
    windows = {
        "" if window is None else "local_": window
        for window in (
            checkpoint.architecture.window(layer, checkpoint.config)
            for layer in range(checkpoint.n_layers)
        )
    }
    model = StaticModel(
        context_tokens=CONTEXT, prefill_tokens=PREFILL, windows=windows, n_parts=len(parts)
    )
    write_static(folder, model)
    return folder
