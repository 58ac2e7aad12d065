"""A model of fixed shapes behind the server: the same requests, on the CPU and in the emulator."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from edgekd.export.export_model import export_model
from edgekd.export.to_npu import NpuOptions
from tests.runtime.serving import CHAT, HELLO, choice, serving

GREEDY = HELLO | {"temperature": 0, "max_tokens": 6}


@pytest.mark.skipif(
    find_spec("onnxruntime_qnn") is None, reason="needs pip install onnxruntime-qnn"
)
def test_a_chat_is_answered_in_the_emulator_as_on_the_cpu(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "npu"
    options = NpuOptions(context_tokens=128, prefill_tokens=16, emulate=False)
    export_model(str(tiny_folder), "onnx", folder, target="qnn", npu=options)
    answers = []
    for provider, require_npu in (("qnn", True), ("cpu", False)):
        with serving(
            folder, context_tokens=128, provider=provider, require_npu=require_npu
        ) as server:
            answers.append(choice(server.post(CHAT, GREEDY))["message"]["content"])
    assert answers[0] == answers[1] != ""
