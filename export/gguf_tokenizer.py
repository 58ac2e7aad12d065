"""A checkpoint's tokenizer as GGUF metadata: tokens, kinds, merges or scores, special ids."""

import json
from collections.abc import Collection, Iterator
from typing import Any

from gguf import GGUFWriter, TokenType

from edgekd.errors import ExportError
from edgekd.export.pieces import BYTE_TOKENS, is_sentencepiece, read_pieces
from edgekd.export.pretokenizer import splitter_name
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.tokenizer import FileTokenizer

_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
# Tokens that every reader takes for marks, though some tokenizers do not call them special; as in
# llama.cpp's converter.
_MARKS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
_MARK_NAMES = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def write_tokenizer(
    writer: GGUFWriter,
    tokenizer: FileTokenizer,
    config: dict[str, Any],
    chat_template: ChatTemplate | None,
) -> None:
    """Add the metadata of ``tokenizer`` to ``writer``, padded to the rows that ``config`` says.

    Raises:
        ExportError: llama.cpp has no tokenizer that gives the same ids, or there are more tokens
            than rows.
    """
    model = json.loads(tokenizer.core.to_str())["model"]
    has_pieces = is_sentencepiece(model)
    byte_tokens = BYTE_TOKENS if has_pieces else ()
    entries = list(_entries(tokenizer, config["vocab_size"], byte_tokens))
    if has_pieces:
        pieces = read_pieces(tokenizer.core)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([pieces.score(*entry) for entry in entries])
        writer.add_add_space_prefix(pieces.adds_space_prefix)
    else:
        _check_byte_level(model)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter_name(tokenizer.core))
        writer.add_token_merges([_merge_text(merge) for merge in model["merges"]])
        writer.add_add_space_prefix(False)
    writer.add_token_list([token for token, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    _write_special_ids(writer, tokenizer, config)
    if chat_template is not None:
        writer.add_chat_template(chat_template.source)


def _check_byte_level(model: dict[str, Any]) -> None:
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"the tokenizer is a {model['type']}; GGUF export knows byte-level BPE, and "
            "SentencePiece's BPE with byte fallback"
        )


def _entries(
    tokenizer: FileTokenizer, vocab_size: int, byte_tokens: Collection[str]
) -> Iterator[tuple[str, TokenType]]:
    """Yield text and kind of each id; ids without a token are unused."""
    core = tokenizer.core
    n_tokens = max(core.get_vocab(with_added_tokens=True).values()) + 1
    if n_tokens > vocab_size:
        raise ExportError(
            f"the tokenizer has {n_tokens} tokens, the model's embedding {vocab_size} rows; "
            "they do not belong together"
        )
    added = core.get_added_tokens_decoder()
    for token_id in range(vocab_size):
        token = core.id_to_token(token_id)
        if token is None:
            yield f"[PAD{token_id}]", TokenType.UNUSED
            continue
        kind = _kind(token, added.get(token_id), byte_tokens)
        # llama.cpp looks for user-defined tokens in the text as it comes, with spaces.
        yield token.replace("\u2581", " ") if kind == TokenType.USER_DEFINED else token, kind


def _kind(token: str, added: Any, byte_tokens: Collection[str]) -> TokenType:
    if added is None:
        return TokenType.BYTE if token in byte_tokens else TokenType.NORMAL
    return TokenType.CONTROL if added.special or _is_mark(token) else TokenType.USER_DEFINED


def _is_mark(token: str) -> bool:
    return token in _MARK_NAMES or any(
        token.startswith(start) and token.endswith(end) for start, end in _MARKS
    )


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _write_special_ids(
    writer: GGUFWriter, tokenizer: FileTokenizer, config: dict[str, Any]
) -> None:
    ids = {role: _special_id(tokenizer, config, role) for role in _ROLES}
    stops = sorted(tokenizer.stop_ids - {ids["eos"]})
    if ids["eos"] is None and stops:
        ids["eos"] = stops.pop(0)
    # GGUF has two more keys for what ends a reply; e.g. Llama 3's <|eot_id|>, <|end_of_text|>.
    if len(stops) > 2:
        raise ExportError(
            f"the checkpoint names {1 + len(stops)} stop tokens ({[ids['eos'], *stops]}), GGUF has "
            "room for three; shorten eos_token_id in generation_config.json"
        )
    for role, token_id in (*ids.items(), *zip(("eot", "eom"), stops, strict=False)):
        if token_id is not None:
            getattr(writer, f"add_{role}_token_id")(token_id)
    with_specials = tokenizer.encode("a")
    writer.add_add_bos_token(with_specials[0] == ids["bos"])
    writer.add_add_eos_token(len(with_specials) > 1 and with_specials[-1] == ids["eos"])


def _special_id(tokenizer: FileTokenizer, config: dict[str, Any], role: str) -> int | None:
    """Return the id of a special token, by the tokenizer's own files, else by config.json."""
    if (token_id := tokenizer.special_id(role)) is not None:
        return token_id
    found = config.get(f"{role}_token_id")
    return found if isinstance(found, int) else None
