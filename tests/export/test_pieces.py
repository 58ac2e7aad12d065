"""SentencePiece's tokenizers in GGUF: the ids of llama.cpp, of tokenizers and of SentencePiece."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from edgekd.errors import ExportError, ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.from_gguf import write_text_side
from edgekd.export.pieces import build_tokenizer, fitting_name, read_pieces
from edgekd.export.plan import make_plan
from edgekd.export.to_gguf import write_gguf
from edgekd.export.verify import PROBE_TEXTS
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.llamacpp_engine import LlamaCppVocabulary
from edgekd.runtime.tokenizer import FileTokenizer, decode
from tests.conftest import TEXTS
from tests.export.tiny_models import save_model
from tests.export.tiny_tokenizers import pieces_to_tokenizer, save_pieces, train_pieces

Edit = Callable[[dict[str, Any]], Any]
MARKED = (
    "<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\n",
    "<table> a<table>b </s> <unk><|not_special|> <0x41> [PAD565]",
    " leading",
    "trailing  ",
    "\u2581",
)


@pytest.fixture(scope="module", params=[True, False], ids=["after a space", "bare"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece tokenizer in all its forms."""
    folder = tmp_path_factory.mktemp("pieces")
    checkpoint = _save(folder, adds_space_prefix=request.param)
    write_gguf(checkpoint, make_plan(checkpoint, "f16"), folder / "model.gguf")
    return folder


def _save(folder: Path, *, adds_space_prefix: bool) -> Checkpoint:
    checkpoint = save_model("llama tied", folder, vocab_size=570, num_hidden_layers=1)
    save_pieces(folder, adds_space_prefix=adds_space_prefix)
    return checkpoint


def test_ids_and_text_are_those_of_the_tokenizer(exported: Path) -> None:
    ours = FileTokenizer(exported)
    in_gguf = LlamaCppVocabulary(exported / "model.gguf")
    for text in (*TEXTS, *PROBE_TEXTS, *MARKED):
        ids = ours.encode(text)
        assert in_gguf.encode(text) == ids, text
        assert decode(in_gguf, ids) == decode(ours, ids), text


def test_ids_are_those_of_sentencepiece_for_any_text(exported: Path) -> None:
    ours = FileTokenizer(exported)
    in_gguf = LlamaCppVocabulary(exported / "model.gguf")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(exported / "tokenizer.model"))
    seen = st.sampled_from(sorted(set("".join(TEXTS)) - {"<"}))
    runs = st.sampled_from([" ", "a", "b", "=", "-", ".", "\n", "\t", "\u65e5", "\u672c"])

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.text(seen | runs | st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
    def check(text: str) -> None:
        expected = [pieces.bos_id(), *pieces.encode(text)] if text else [pieces.bos_id()]
        assert ours.encode(text) == in_gguf.encode(text) == expected

    check()


def test_the_tokenizer_can_be_read_back(exported: Path, tmp_path: Path) -> None:
    write_text_side(read_gguf_header(exported / "model.gguf"), tmp_path)
    before, back = FileTokenizer(exported), FileTokenizer(tmp_path)
    for text in (*TEXTS, *PROBE_TEXTS, *MARKED):
        assert back.encode(text) == before.encode(text), text
    assert back.stop_ids == before.stop_ids and back.special_ids == before.special_ids


def _change_model(**changes: Any) -> Edit:
    return lambda description: description["model"].update(changes)


def _change_token(name: str, **changes: Any) -> Edit:
    def edit(description: dict[str, Any]) -> None:
        tokens = description["added_tokens"]
        next(token for token in tokens if token["content"] == name).update(changes)

    return edit


def _drop_merge(left: str, right: str) -> Edit:
    return lambda description: description["model"]["merges"].remove([left, right])


def _rank_one_last(description: dict[str, Any]) -> None:
    merges = description["model"]["merges"]
    made = [left + right for left, right in merges]
    twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
    merges.append(merges.pop(twice))


def _lose_byte(description: dict[str, Any]) -> None:
    vocab = description["model"]["vocab"]
    vocab["lost"] = vocab.pop("<0x41>")


def _metaspace(scheme: str) -> Edit:
    metaspace = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    return lambda description: description.update(normalizer=None, pre_tokenizer=metaspace)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (_change_model(ignore_merges=True), "it has ignore_merges True"),
        (_lose_byte, "it lacks 1 of 256 byte tokens, such as <0x41>"),
        (_change_token("<table>", lstrip=True), "'<table>' has lstrip"),
        (_change_token("<table>", rstrip=True), "'<table>' has rstrip"),
        (_change_token("<s>", single_word=True), "'<s>' has single_word"),
        (_change_token("</s>", normalized=True), "'</s>' is looked for as '\u2581</s>'"),
        (_drop_merge("\u2581", "th"), "no merge joins '\u2581' and 'th'"),
        (_rank_one_last, "the merges that make '.*' have different ranks"),
        (_metaspace("first"), "cannot prepare text"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), 'cannot prepare text .* "NFKC"'),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "cannot prepare text"),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(edit: Edit, complaint: str) -> None:
    tokenizer = pieces_to_tokenizer(train_pieces(adds_space_prefix=True), adds_space_prefix=True)
    description = json.loads(tokenizer.to_str())
    edit(description)
    with pytest.raises(ExportError, match=complaint):
        read_pieces(Tokenizer.from_str(json.dumps(description)))


def test_metaspace_that_only_replaces_is_the_same_as_a_normalizer() -> None:
    tokenizer = pieces_to_tokenizer(train_pieces(adds_space_prefix=False), adds_space_prefix=False)
    description = json.loads(tokenizer.to_str())
    _metaspace("never")(description)
    assert read_pieces(Tokenizer.from_str(json.dumps(description))) == read_pieces(tokenizer)


def test_merges_as_the_tokenizers_library_trains_them_are_refused() -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    with pytest.raises(ExportError, match="no merge joins"):
        read_pieces(tokenizer)


def test_unigram_is_refused(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, adds_space_prefix=True)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match="the tokenizer is a Unigram"):
        write_gguf(checkpoint, make_plan(checkpoint, "f16"), tmp_path / "model.gguf")


def test_scores_that_do_not_order_the_merges_cannot_be_read_back(exported: Path) -> None:
    metadata = dict(read_gguf_header(exported / "model.gguf").metadata)
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    with pytest.raises(ModelError, match="have the same score"):
        build_tokenizer(metadata)


def _strip_like_phi3(folder: Path) -> None:
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    for token in description["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    path.write_text(json.dumps(description))


def test_spaces_behind_the_marks_of_phi3_are_swallowed(tmp_path: Path) -> None:
    checkpoint = _save(tmp_path, adds_space_prefix=True)
    core = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.add_special_tokens(["<|endoftext|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    _strip_like_phi3(tmp_path)
    write_gguf(checkpoint, make_plan(checkpoint, "f16"), tmp_path / "model.gguf")
    ours, in_gguf = FileTokenizer(tmp_path), LlamaCppVocabulary(tmp_path / "model.gguf")
    for text in (*MARKED, "<|im_start|> \n\t user</s>  x<s>  y<|endoftext|>  z<unk>  a"):
        assert in_gguf.encode(text) == ours.encode(text), text


@pytest.mark.parametrize(
    ("name", "strips", "expected"),
    [
        ("Phi 3 Mini", True, "Phi-3 Mini"),
        ("phi-3-mini", True, "phi-3-mini"),
        ("Tiny", True, "Tiny (Phi-3)"),
        ("My Phi3 Mini", False, "My Phi 3 Mini"),
        ("Phi-3.5", False, "Phi 3.5"),
        ("Tiny", False, "Tiny"),
    ],
)
def test_a_model_is_called_phi3_only_if_its_tokenizer_is(
    name: str, strips: bool, expected: str, tmp_path: Path
) -> None:
    core = save_pieces(tmp_path, adds_space_prefix=True)
    core.add_special_tokens(["<|endoftext|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    if strips:
        _strip_like_phi3(tmp_path)
    assert fitting_name(name, Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == expected
