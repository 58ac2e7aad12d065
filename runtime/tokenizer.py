"""Text to token ids and back, from ``tokenizer.json`` through the ``tokenizers`` library.

transformers' AutoTokenizer is not used: in version 5 it replaces the pre-tokenizer of some
models by the one it expects for their architecture, and so gives other ids than the file says.
"""

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.errors import MissingExtraError, ModelError
from edgekd.untrusted import parse_json

if TYPE_CHECKING:
    import tokenizers

_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What an engine's caller needs to know about tokens."""

    stop_ids: frozenset[int]
    """Ids that end a reply."""

    @property
    def n_ids(self) -> int:
        """One more than the largest id; models may have more rows."""

    @property
    def first_id(self) -> int | None:
        """BOS, or EOS where there is none: what a text begins after."""

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the ids of ``text``.

        ``add_special`` adds the tokens that a text begins or ends with; ``parse_special`` lets
        names of special tokens in it become those tokens.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that ``token_id`` stands for; none for a special token."""

    def raw_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of ``token_id``, a special token's name included."""


class FileTokenizer:
    """The tokenizer of a checkpoint or of an ONNX folder."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer files in ``folder``.

        Raises:
            ModelError: there is no ``tokenizer.json``, or it is malformed.
        """
        self.core = _read_core(folder)
        self.config = read_json(folder / "tokenizer_config.json")
        self.stop_ids = _stop_ids(folder, self)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the ids of ``text``, with the tokens the post-processor adds (BOS)."""
        core = self.core if parse_special else self._plain_core
        return list(core.encode(text, add_special_tokens=add_special).ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of ``token_id``; none for a special token."""
        return b"" if token_id in self.special_ids else self.raw_token_bytes(token_id)

    def raw_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of ``token_id``, a special token's name included."""
        piece = self.core.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added or not self._is_byte_level:
            return _decode_sentencepiece(piece)
        return bytes(_BYTE_OF_CHAR[char] for char in piece if char in _BYTE_OF_CHAR)

    def special_id(self, role: str) -> int | None:
        """Return the id of the ``bos``, ``eos``, ``unk`` or ``pad`` token, if there is one."""
        entry = self.config.get(f"{role}_token")
        name = entry.get("content") if isinstance(entry, dict) else entry
        return None if name is None else self.core.token_to_id(name)

    @cached_property
    def n_ids(self) -> int:
        """One more than the largest id; models may have more rows."""
        return int(max(self.core.get_vocab(with_added_tokens=True).values())) + 1

    @property
    def first_id(self) -> int | None:
        """BOS, or EOS where there is none: what a text begins after."""
        bos = self.special_id("bos")
        return self.special_id("eos") if bos is None else bos

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: BOS, EOS, chat marks."""
        return frozenset(i for i, token in self._added.items() if token.special)

    @cached_property
    def _plain_core(self) -> "tokenizers.Tokenizer":
        """The same tokenizer, to which names of special tokens are text."""
        core = type(self.core).from_str(self.core.to_str())
        core.encode_special_tokens = True
        return core

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self.core.get_added_tokens_decoder()

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.core.to_str())["decoder"])


def decode_stream(tokenizer: Tokenizer, ids: Iterator[int] | Sequence[int]) -> Iterator[str]:
    """Yield the text of ``ids`` one by one; a character's text comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id in ids:
        yield decoder.decode(tokenizer.token_bytes(token_id))
    yield decoder.decode(b"", final=True)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of ``ids`` without special tokens."""
    return "".join(decode_stream(tokenizer, ids))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object at ``path``; an empty one where there is no file.

    Raises:
        ModelError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, a JSON object is needed")
    return found


def _read_core(folder: Path) -> "tokenizers.Tokenizer":
    try:
        from tokenizers import Tokenizer as Core
    except ImportError as error:
        raise MissingExtraError("tokenizers", "onnx") from error
    path = folder / _FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {_FILE}; slow (Python) tokenizers are not supported")
    try:
        core = Core.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is no tokenizer: {error}") from error
    core.no_truncation()
    core.no_padding()
    return core


def _stop_ids(folder: Path, tokenizer: FileTokenizer) -> frozenset[int]:
    """Return all ids that end a reply, from every place where a checkpoint may name them."""
    found = {tokenizer.special_id("eos")}
    for name in ("config.json", "generation_config.json"):
        eos = read_json(folder / name).get("eos_token_id")
        found.update(eos if isinstance(eos, list) else [eos])
    return frozenset(token_id for token_id in found if token_id is not None)


def _decode_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's table from printable stand-ins to the bytes they stand for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_of_char()
