"""What the tests of NPU graphs share: small fixed shapes, and a prompt that fills them unevenly."""

from importlib.util import find_spec

import pytest

CONTEXT, PREFILL = 64, 16
PROMPT = list(range(5, 25))  # two pieces, the second one padded
needs_qnn = pytest.mark.skipif(
    find_spec("onnxruntime_qnn") is None, reason="needs pip install onnxruntime-qnn"
)
