"""llama.cpp's names for the ways a byte-level BPE splits text before merging, both directions.

``tokenizer.ggml.pre`` names a splitter that is compiled into llama.cpp (``llama-vocab.cpp``).
Each name here stands for one ``tokenizers`` pre-tokenizer; an unknown one is refused, never
replaced by a near one, since a wrong splitter costs quality without any error.
"""

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from edgekd.errors import ExportError, ModelError

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Name in tokenizer.ggml.pre -> the steps of the equal tokenizers pre-tokenizer.
SPLITTERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [_DIGITS, _BYTE_LEVEL],
    "llama-bpe": [_split(_LLAMA3), _BYTES_ONLY],
    "qwen2": [_split(_QWEN2), _BYTES_ONLY],
}


def splitter_name(tokenizer: Tokenizer) -> str:
    """Return the ``tokenizer.ggml.pre`` of ``tokenizer``.

    Raises:
        ExportError: llama.cpp has no splitter that is known to be equal.
    """
    description = json.loads(tokenizer.to_str())
    # Qwen's tokenizers compose characters first (NFC), llama.cpp does not: the few texts that are
    # not composed already get other ids there, as with every Qwen in GGUF.
    if description["normalizer"] not in (None, {"type": "NFC"}):
        raise ExportError(
            f"the tokenizer normalizes text ({description['normalizer']['type']}), which "
            "llama.cpp's byte-level BPE does not"
        )
    steps = _steps(description["pre_tokenizer"])
    for name, known in SPLITTERS.items():
        if steps == known:
            return name
    raise ExportError(
        f"no splitter of llama.cpp is known to equal this pre-tokenizer: {json.dumps(steps)}; "
        f"known are {', '.join(SPLITTERS)}"
    )


def build_splitter(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the ``tokenizers`` pre-tokenizer that llama.cpp calls ``name``.

    Raises:
        ModelError: the name is not in the table.
    """
    if name not in SPLITTERS:
        raise ModelError(
            f"the file splits text by {name!r}, which edgekd cannot rebuild yet; "
            f"known are {', '.join(SPLITTERS)}"
        )
    skeleton = {
        "type": "Sequence",
        "pretokenizers": [{**step, **_defaults(step)} for step in SPLITTERS[name]],
    }
    holder = json.loads(Tokenizer.from_str(_EMPTY_TOKENIZER).to_str())
    holder["pre_tokenizer"] = skeleton
    splitter: pre_tokenizers.PreTokenizer = Tokenizer.from_str(json.dumps(holder)).pre_tokenizer
    return splitter


def _steps(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer without the fields that do not change ids."""
    if description is None:
        return []
    steps = description.get("pretokenizers", [description])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _defaults(step: dict[str, Any]) -> dict[str, Any]:
    return {"trim_offsets": True} if step["type"] == "ByteLevel" else {}


_EMPTY_TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
)
