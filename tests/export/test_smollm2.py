"""A real model through both exporters, against independent readers."""

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.export.to_gguf import write_gguf
from edgekd.export.to_onnx import write_onnx
from edgekd.runtime.fidelity import Fidelity, compare_engines
from edgekd.runtime.loading import open_model
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

CORPUS = (
    "In 1969, 600 million people (a fifth of the world) watched Apollo 11; it's what they'd seen.",
    "Die Stra\u00dfe ist 3,14 km lang \u2014 gr\u00f6\u00dfer als \u00b2 und \u00bd; "
    "\u00bfqu\u00e9 tal? \u00c7a va",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\u4e2d\u6587\u53e5\u5b50\uff0c "
    "\ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa \u2764\ufe0f "
    "e\u0301 \u202e rtl \u00a0nbsp",
    "def f(x: list[int]) -> int:\n\treturn sum(i**2 for i in x if i % 3)  # 0xFF\r\n\n\n    pass",
    '<div class="a">&nbsp;{{x}}</div>  SELECT * FROM t WHERE id >= 10_000;   \t  \n ',
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|not_special|>",
)
_CONVERSATIONS = [
    [{"role": "user", "content": "Hi  there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Sure? \U0001f389"},
    ],
]


@pytest.fixture(scope="module")
def files(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 in both formats at Q4_0, and as a float GGUF."""
    folder = tmp_path_factory.mktemp("smollm2-files")
    (folder / "onnx").mkdir()
    write_gguf(smollm2, make_plan(smollm2, "f16"), folder / "f16.gguf")
    write_gguf(smollm2, make_plan(smollm2, "q4_0"), folder / "q4_0.gguf")
    write_onnx(smollm2, make_plan(smollm2, "q4_0"), folder / "onnx")
    return {name: folder / name for name in ("f16.gguf", "q4_0.gguf", "onnx")}


@pytest.fixture(scope="module")
def windows(smollm2: Checkpoint) -> list[list[int]]:
    ids = FileTokenizer(smollm2.folder).encode(" ".join((json.__doc__ or "", *CORPUS)))
    return [ids[start : start + 256] for start in range(0, len(ids), 256)]


def test_all_tokenizers_give_the_ids_of_the_hugging_face_one(
    smollm2: Checkpoint, files: dict[str, Path]
) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(smollm2.folder / "tokenizer.json"))
    for name in ("q4_0.gguf", "onnx"):
        loaded = open_model(files[name], context_tokens=64)
        for text in CORPUS:
            assert loaded.tokenizer.encode(text) == oracle(text)["input_ids"], (name, text)


def test_the_chat_template_renders_as_in_transformers_and_llama_cpp(
    smollm2: Checkpoint, files: dict[str, Path]
) -> None:
    oracle = PreTrainedTokenizerFast.from_pretrained(smollm2.folder)
    for name in ("q4_0.gguf", "onnx"):
        template = open_model(files[name], context_tokens=64).chat_template
        assert template is not None
        for messages in _CONVERSATIONS:
            expected = oracle.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            assert template.render(messages) == expected
            if messages[0]["role"] == "system":  # llama.cpp's ChatML adds no system prompt
                assert _render_in_llama_cpp(messages) == expected


def test_floats_agree_and_the_int4_files_cost_what_rounding_costs(
    smollm2: Checkpoint, files: dict[str, Path], windows: list[list[int]]
) -> None:
    exact = TorchEngine(load_causal_lm(smollm2.folder, torch.float32), 256)
    rounded = TorchEngine(rounded_model(smollm2, make_plan(smollm2, "q4_0")), 256)
    floats = _distance(exact, files["f16.gguf"], windows)
    assert floats.kl_nats < 1e-4 and floats.top1_agreement > 0.99
    rounding = compare_engines(exact, rounded, windows)
    for name in ("q4_0.gguf", "onnx"):
        found = _distance(exact, files[name], windows)
        assert found.kl_nats == pytest.approx(rounding.kl_nats, rel=0.05), name


def _distance(exact: TorchEngine, path: Path, windows: list[list[int]]) -> Fidelity:
    engine = open_model(path, context_tokens=256).engine
    found = compare_engines(exact, engine, windows)
    engine.close()
    return found


def _render_in_llama_cpp(messages: Sequence[dict[str, str]]) -> str:
    turns = (llama_cpp.llama_chat_message * len(messages))()
    for turn, message in zip(turns, messages, strict=True):
        turn.role, turn.content = message["role"].encode(), message["content"].encode()
    buffer = ctypes.create_string_buffer(4096)
    length = llama_cpp.llama_chat_apply_template(b"chatml", turns, len(turns), True, buffer, 4096)
    return buffer.raw[:length].decode()
