"""A byte-level BPE tokenizer as GGUF metadata: tokens, kinds, merges, splitter, special ids."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from edgekd.errors import ExportError
from edgekd.export.pretokenizer import splitter_name
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.tokenizer import FileTokenizer


def write_tokenizer(
    writer: GGUFWriter,
    tokenizer: FileTokenizer,
    vocab_size: int,
    chat_template: ChatTemplate | None,
) -> None:
    """Add the metadata of ``tokenizer`` to ``writer``, padded to ``vocab_size`` tokens.

    Raises:
        ExportError: it is no byte-level BPE, or has more tokens than the model has rows.
    """
    model = json.loads(tokenizer.core.to_str())["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"the tokenizer is a {model['type']} with byte fallback {model.get('byte_fallback')}; "
            "GGUF export knows byte-level BPE"
        )
    tokens, kinds = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter_name(tokenizer.core))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([_merge_text(merge) for merge in model["merges"]])
    _write_special_ids(writer, tokenizer)
    if chat_template is not None:
        writer.add_chat_template(chat_template.source)


def _tokens(tokenizer: FileTokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    core = tokenizer.core
    n_tokens = max(core.get_vocab(with_added_tokens=True).values()) + 1
    if n_tokens > vocab_size:
        raise ExportError(
            f"the tokenizer has {n_tokens} tokens, the model's embedding {vocab_size} rows; "
            "they do not belong together"
        )
    added = core.get_added_tokens_decoder()
    tokens, kinds = [], []
    for token_id in range(vocab_size):
        token = core.id_to_token(token_id)
        tokens.append(f"[PAD{token_id}]" if token is None else token)
        kinds.append(_kind(token, added.get(token_id)))
    return tokens, kinds


def _kind(token: str | None, added: Any) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added.special else TokenType.USER_DEFINED


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _write_special_ids(writer: GGUFWriter, tokenizer: FileTokenizer) -> None:
    adders = {
        "bos": writer.add_bos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, add in adders.items():
        if (token_id := tokenizer.special_id(role)) is not None:
            add(token_id)
    eos = tokenizer.special_id("eos")
    stops = sorted(tokenizer.stop_ids)
    if stops:
        writer.add_eos_token_id(eos if eos is not None else stops[0])
    if len(stops) > 1:  # e.g. Llama 3: <|eot_id|> ends a turn, <|end_of_text|> a document
        writer.add_eot_token_id(next(stop for stop in stops if stop != eos))
    with_specials = tokenizer.encode("a")
    writer.add_add_bos_token(with_specials[0] == tokenizer.special_id("bos"))
    writer.add_add_eos_token(len(with_specials) > 1 and with_specials[-1] == eos)
    writer.add_add_space_prefix(False)
