"""A reference pack: prompts and a teacher's likeliest next tokens in one small file.

With it a device measures how faithful its own copy of a model is, without torch and without the
teacher. The layout, little-endian, holds numbers only, so that reading it runs no code:

    8 bytes   magic "EDGEKDRP"
    32 bytes  sha256 of everything behind it
    4 bytes   length of the header
    header    JSON: schema version, what the pack belongs to, and how much of it there is
    R u32     length of each row of ids
    T u32     the ids of all rows
    S x K u32 the likeliest tokens at each position but the last of a row, likeliest first
    S x K f32 their log-probabilities, in nats
    S f32     log-probability of all other tokens together; -inf where there are none
    S f32     log-probability of the token that comes next

Log-probabilities are rounded once, to float32.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import DataError, RecipeError
from edgekd.files import atomic_file
from edgekd.runtime.fidelity import log_softmax, pick

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# R rows, T tokens, S scored positions, V vocabulary, K kept tokens

MAGIC = b"EDGEKDRP"
SCHEMA_VERSION = 1
DEFAULT_TOP_K = 64
MAX_TOP_K = 1024
_HASH_BYTES = 32
_MAX_HEADER_BYTES = 1 << 16
_MASS_TOLERANCE = 1e-3  # K + 1 probabilities, each rounded to float32, sum to 1


@dataclass(frozen=True, kw_only=True)
class PackIdentity:
    """What a pack belongs to."""

    teacher: str
    teacher_sha256: str
    """Of its weights."""
    teacher_engine: str
    tokenizer_sha256: str
    """Of the table from ids to bytes."""
    text_sha256: str
    vocab_size: int
    top_k: int
    created: str = ""


@dataclass(frozen=True)
class ReferencePack:
    """Rows of ids and what a teacher made of them."""

    identity: PackIdentity
    rows: Sequence[Sequence[int]]
    top_ids_SK: NDArray[np.uint32]
    top_log_p_SK: NDArray[np.float32]
    rest_log_p_S: NDArray[np.float32]
    next_log_p_S: NDArray[np.float32]


class PackBuilder:
    """Collects a pack position by position."""

    def __init__(self, identity: PackIdentity, rows: Sequence[Sequence[int]]) -> None:
        """Begin a pack over ``rows``.

        Raises:
            RecipeError: more tokens are to be kept than a pack may hold.
        """
        if not 1 <= identity.top_k <= MAX_TOP_K:
            raise RecipeError(f"--top-k {identity.top_k} is out of range; give 1 to {MAX_TOP_K}")
        self._identity, self._rows = identity, rows
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, next_ids_S: NDArray[np.int64], logits_SV: "Logits") -> None:
        """Append the next positions."""
        log_p_SV = log_softmax(logits_SV)
        n_kept = min(self._identity.top_k, log_p_SV.shape[1])
        order_SK = np.argpartition(-log_p_SV, n_kept - 1, axis=1)[:, :n_kept]
        by_rank_SK = np.argsort(-np.take_along_axis(log_p_SV, order_SK, 1), axis=1, kind="stable")
        top_ids_SK = np.take_along_axis(order_SK, by_rank_SK, 1)
        top_log_p_SK = np.take_along_axis(log_p_SV, top_ids_SK, 1)
        others_SV = log_p_SV.copy()
        np.put_along_axis(others_SV, top_ids_SK, -np.inf, 1)
        with np.errstate(divide="ignore"):
            rest_log_p_S = np.log(np.exp(others_SV).sum(1))
        self._parts.append((top_ids_SK, top_log_p_SK, rest_log_p_S, pick(log_p_SV, next_ids_S)))

    def finish(self) -> ReferencePack:
        """Return the pack."""
        ids, log_p, rest, following = (
            np.concatenate(arrays) for arrays in zip(*self._parts, strict=True)
        )
        return ReferencePack(
            self._identity,
            self._rows,
            ids.astype(np.uint32),
            np.minimum(log_p, 0).astype(np.float32),
            np.minimum(rest, 0).astype(np.float32),
            np.minimum(following, 0).astype(np.float32),
        )


def write_pack(path: Path, pack: ReferencePack) -> None:
    """Write ``pack`` to ``path``, whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    created = pack.identity.created or datetime.now(UTC).isoformat(timespec="seconds")
    header = {
        "schema_version": SCHEMA_VERSION,
        **asdict(pack.identity),
        "created": created,
        "top_k": pack.top_ids_SK.shape[1],
        "rows": len(pack.rows),
        "tokens": sum(map(len, pack.rows)),
    }
    text = json.dumps(header, sort_keys=True).encode()
    arrays = (
        np.array([len(row) for row in pack.rows], "<u4"),
        np.concatenate([np.asarray(row, "<u4") for row in pack.rows]),
        pack.top_ids_SK.astype("<u4"),
        pack.top_log_p_SK.astype("<f4"),
        pack.rest_log_p_S.astype("<f4"),
        pack.next_log_p_S.astype("<f4"),
    )
    body = len(text).to_bytes(4, "little") + text + b"".join(array.tobytes() for array in arrays)
    with atomic_file(path) as partial:
        partial.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)


def read_pack(path: Path) -> ReferencePack:
    """Return the pack at ``path``; nothing in it is trusted before it was checked.

    Raises:
        DataError: it is missing, no pack, of another version, cut short, changed, or
            contradicts itself.
    """
    if not path.is_file():
        raise DataError(f"no reference pack at {path}; make one with edgekd eval --write-reference")
    raw = path.read_bytes()
    try:
        return _parse(raw)
    except _Fault as fault:
        raise DataError(f"{path} {fault}; fetch it again, or make a new one") from fault


class _Fault(Exception):
    """What is wrong with a pack."""


def _parse(raw: bytes) -> ReferencePack:
    start = len(MAGIC) + _HASH_BYTES
    if raw[: len(MAGIC)] != MAGIC:
        raise _Fault(f"is no reference pack: it starts with {raw[:8]!r}, not with {MAGIC!r}")
    digest, body = raw[len(MAGIC) : start], raw[start:]
    found = hashlib.sha256(body).digest()
    if found != digest:
        raise _Fault(
            f"was cut short or changed: its sha256 is {found.hex()[:12]}, it says "
            f"{digest.hex()[:12]}"
        )
    header_bytes = int.from_bytes(body[:4], "little")
    if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, len(body) - 4):
        raise _Fault(f"claims a header of {header_bytes} bytes")
    header = _header(body[4 : 4 + header_bytes])
    identity = _identity(header)
    pack = _arrays(body[4 + header_bytes :], identity, header)
    _check(pack)
    return pack


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"has a header that is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _Fault("has a header that is no JSON object")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise _Fault(
            f"has schema version {header.get('schema_version')!r}, this edgekd reads "
            f"{SCHEMA_VERSION}"
        )
    return header


def _identity(header: dict[str, Any]) -> PackIdentity:
    values: dict[str, Any] = {entry.name: header.get(entry.name) for entry in fields(PackIdentity)}
    for entry in fields(PackIdentity):
        if type(values[entry.name]) is not entry.type:  # not isinstance: True is no count
            raise _Fault(f"gives {values[entry.name]!r} as its {entry.name}")
    return PackIdentity(**values)


def _arrays(raw: bytes, identity: PackIdentity, header: dict[str, Any]) -> ReferencePack:
    n_rows, n_tokens = header.get("rows"), header.get("tokens")
    if type(n_rows) is not int or type(n_tokens) is not int or not 0 < 2 * n_rows <= n_tokens:
        raise _Fault(f"gives {n_rows!r} rows with {n_tokens!r} tokens")
    n_scored, n_kept = n_tokens - n_rows, identity.top_k
    if not 1 <= n_kept <= min(MAX_TOP_K, identity.vocab_size):
        raise _Fault(
            f"keeps {n_kept} of {identity.vocab_size} tokens; 1 to {MAX_TOP_K} are allowed"
        )
    counts = (n_rows, n_tokens, n_scored * n_kept, n_scored * n_kept, n_scored, n_scored)
    if len(raw) != 4 * sum(counts):
        raise _Fault(f"holds {len(raw)} bytes of numbers, its header says {4 * sum(counts)}")
    types = ("<u4", "<u4", "<u4", "<f4", "<f4", "<f4")
    parts, start = [], 0
    for count, kind in zip(counts, types, strict=True):
        parts.append(np.frombuffer(raw, kind, count, start))
        start += 4 * count
    lengths_R, ids_T, top_ids, top_log_p, rest_log_p_S, next_log_p_S = parts
    if lengths_R.min() < 2 or int(lengths_R.sum(dtype=np.uint64)) != n_tokens:
        raise _Fault("has rows whose lengths do not add up")
    ends_R = np.cumsum(lengths_R, dtype=np.int64)[:-1]
    rows = [row.tolist() for row in np.split(ids_T, ends_R)]
    shape = (n_scored, n_kept)
    return ReferencePack(
        identity, rows, top_ids.reshape(shape), top_log_p.reshape(shape), rest_log_p_S, next_log_p_S
    )


def _check(pack: ReferencePack) -> None:
    """Refuse ids beyond the vocabulary, and numbers that are no distribution."""
    vocab_size, top_ids_SK = pack.identity.vocab_size, pack.top_ids_SK
    if max(map(max, pack.rows)) >= vocab_size or int(top_ids_SK.max()) >= vocab_size:
        raise _Fault(f"has ids beyond its vocabulary of {vocab_size}")
    sorted_SK = np.sort(top_ids_SK, axis=1)
    if (sorted_SK[:, 1:] == sorted_SK[:, :-1]).any():
        raise _Fault("keeps a token twice")
    log_p = pack.top_log_p_SK.astype(np.float64)
    rest = pack.rest_log_p_S.astype(np.float64)
    is_sound = (
        bool(np.isfinite(log_p).all() and np.isfinite(pack.next_log_p_S).all())
        and bool((log_p <= 0).all() and (rest <= 0).all() and (pack.next_log_p_S <= 0).all())
        and bool((log_p[:, 1:] <= log_p[:, :-1]).all())
        and bool((abs(np.exp(log_p).sum(1) + np.exp(rest) - 1) < _MASS_TOLERANCE).all())
    )
    if not is_sound:
        raise _Fault("holds numbers that are no probabilities")
