"""Byte-level BPE in GGUF: whatever the splitter, llama.cpp gives the ids of the checkpoint."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekd.export.plan import make_plan
from edgekd.export.pretokenizer import SPLITTERS
from edgekd.export.to_gguf import write_gguf
from edgekd.export.verify import PROBE_TEXTS
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.llamacpp_engine import LlamaCppVocabulary
from edgekd.runtime.tokenizer import FileTokenizer, decode
from tests.conftest import SPECIAL_TOKENS, TEXTS, save_tokenizer
from tests.export.tiny_models import save_model
from tests.export.tiny_tokenizers import train_byte_level


@pytest.fixture(scope="module", params=sorted(SPLITTERS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer splits so, and its GGUF."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = save_model("llama tied", folder, vocab_size=405, num_hidden_layers=1)
    save_tokenizer(folder, train_byte_level(request.param))
    write_gguf(checkpoint, make_plan(checkpoint, "f16"), folder / "model.gguf")
    header = read_gguf_header(folder / "model.gguf")
    assert header.metadata["tokenizer.ggml.pre"] == request.param
    return folder


def test_ids_and_text_are_those_of_the_checkpoint(exported: Path) -> None:
    ours, in_gguf = FileTokenizer(exported), LlamaCppVocabulary(exported / "model.gguf")
    marked = f"{SPECIAL_TOKENS[1]}user\nHi  there{SPECIAL_TOKENS[2]}\n<|not_special|>"
    for text in (*TEXTS, *PROBE_TEXTS, marked, json.dumps({"a": [1, 22, 333, 4444]}, indent=1)):
        ids = ours.encode(text)
        assert in_gguf.encode(text) == ids, text
        assert decode(in_gguf, ids) == decode(ours, ids), text


def test_ids_are_those_of_the_checkpoint_for_any_text(exported: Path) -> None:
    ours, in_gguf = FileTokenizer(exported), LlamaCppVocabulary(exported / "model.gguf")
    seen = st.sampled_from(sorted(set("".join(TEXTS)) - {"<"}))
    joints = st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", "3", "!", "--", "_"]
    )

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(seen | joints | st.characters(exclude_categories=["Cs", "Cc"])).map("".join))
    @example("it'S 1234567 \n\n  x")
    def check(text: str) -> None:
        assert in_gguf.encode(text) == ours.encode(text)

    check()
