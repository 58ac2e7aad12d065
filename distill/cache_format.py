"""The logit cache on disk: who it belongs to, shards of records, and how both are checked.

A cache is a folder: ``cache.json`` and shards in safetensors form, each with a small JSON file
beside it that appears last, so that a shard without one was cut short. Samples are found by the
hash of their token ids and mask, never by their order. A record is one position's distribution:

    top_ids               the likeliest tokens
    head_codes            log-probabilities of the first four of them, in 16 bits
    low_codes             log-probabilities of the others of them, in 8 bits
    tail_ids, tail_codes  samples of all other tokens, log-probabilities in 8 bits
    log_z                 log Z_T - log Z_1 / T for each temperature T but 1, in 16 bits
    entropy               at each temperature, in 8 bits

What the codes stand for is edgekd.distill.cache_codec's business.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgekd.distill.cache_check import index_fault, shard_fault
from edgekd.distill.data import Document
from edgekd.errors import DataError
from edgekd.files import atomic_file, sha256_of, write_text_atomic
from edgekd.untrusted import parse_json

# P positions, E entries, S samples, T temperatures

SCHEMA_VERSION = 1
INDEX = "cache.json"
_MAX_TWO_BYTE_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a cache belongs to; it serves nothing else."""

    teacher: str
    teacher_sha256: str
    """Of its weights; for an endpoint, of its address and model name."""
    revision: str | None
    source: str
    """Kind of teacher: checkpoint, gguf, onnx or endpoint."""
    dtype: str
    vocabulary_sha256: str
    template_sha256: str | None
    vocab_size: int
    row_tokens: int
    top_k: int
    top_mass: float
    tail_samples: int
    temperatures: tuple[float, ...]
    seed: int

    def sha256(self) -> str:
        """Return a hash of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Records(NamedTuple):
    """The distributions of P positions; entries of all positions one after the other."""

    n_top_P: NDArray[np.uint8]
    n_tail_P: NDArray[np.uint8]
    top_ids_E: NDArray[np.uint32]
    head_codes_E: NDArray[np.uint16]
    low_codes_E: NDArray[np.uint8]
    tail_ids_E: NDArray[np.uint32]
    tail_codes_E: NDArray[np.uint8]
    log_z_PT: NDArray[np.uint16]
    entropy_PT: NDArray[np.uint8]

    @classmethod
    def concatenate(cls, parts: Sequence["Records"]) -> "Records":
        """Return ``parts`` one after the other."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Place(NamedTuple):
    """Where a sample's records lie: shard, and first and last of positions and entries."""

    shard: int
    positions: slice
    top: slice
    head: slice
    low: slice
    tail: slice


def sample_key(sample: Document) -> bytes:
    """Return the sha256 of token ids and mask of ``sample``."""
    ids = np.array(sample.ids, "<u4").tobytes()
    return hashlib.sha256(ids + bytes(sample.learned)).digest()


def largest_record_bytes(
    vocab_size: int, top_k: int, tail_samples: int, n_temperatures: int
) -> int:
    """Return the bytes that one position takes at most."""
    id_bytes = 2 if vocab_size <= _MAX_TWO_BYTE_IDS else 3
    n_head = min(top_k, 4)
    codes = 2 * n_head + (top_k - n_head) + tail_samples
    return 2 + id_bytes * (top_k + tail_samples) + codes + 2 * (n_temperatures - 1) + n_temperatures


def write_shard(
    folder: Path, number: int, keys: Sequence[bytes], records: Sequence[Records], vocab_size: int
) -> None:
    """Write one shard with the ``records`` of each sample in ``keys``, then what describes it."""
    path = _shard_path(folder, number)
    joined = Records.concatenate(records)
    arrays = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
        "sizes": np.array(
            [_sizes(found) for found in records],
            np.int64,
        ),
        **joined._asdict(),
        "top_ids_E": _pack_ids(joined.top_ids_E, vocab_size),
        "tail_ids_E": _pack_ids(joined.tail_ids_E, vocab_size),
    }
    with atomic_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial)
    description = {
        "file": path.name,
        "sha256": sha256_of(path),
        "keys_sha256": _hash_keys(keys),
        "bytes": path.stat().st_size,
        "samples": len(keys),
        "positions": len(joined.n_top_P),
    }
    write_text_atomic(path.with_suffix(".json"), json.dumps(description) + "\n")


def _sizes(records: Records) -> list[int]:
    """Return the lengths that a reader needs to find a sample."""
    counted = (
        records.n_top_P,
        records.top_ids_E,
        records.head_codes_E,
        records.low_codes_E,
        records.tail_ids_E,
    )
    return [len(array) for array in counted]


def finished_shard(folder: Path, number: int, keys: Sequence[bytes]) -> dict[str, Any] | None:
    """Return the description of shard ``number`` if it is whole, unchanged, and holds ``keys``.

    Another shard of that number, as of other data, is none: it will be written anew.
    """
    path = _shard_path(folder, number)
    try:
        description: dict[str, Any] = parse_json(path.with_suffix(".json").read_text())
        is_ours = description["keys_sha256"] == _hash_keys(keys)
        return description if is_ours and sha256_of(path) == description["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash_keys(keys: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(keys)).hexdigest()


def begin(folder: Path, identity: Identity) -> None:
    """Make ``folder`` the cache of ``identity``, or find that it already is.

    Raises:
        DataError: it is another one's; both hashes are named.
    """
    if (folder / INDEX).is_file():
        check_identity(read_index(folder)["identity"], identity, folder)
    else:
        write_index(folder, identity, [])


def write_index(folder: Path, identity: Identity, shards: Sequence[dict[str, Any]]) -> None:
    """Write ``cache.json``; without shards the capture is still under way."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "identity": asdict(identity),
        "identity_sha256": identity.sha256(),
        "shards": list(shards),
    }
    write_text_atomic(folder / INDEX, json.dumps(document, indent=2) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Return ``cache.json``, its identity as an :class:`Identity`.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    path = folder / INDEX
    try:
        document: dict[str, Any] = parse_json(path.read_text("utf-8"))
        values = document["identity"]
        identity = Identity(**{**values, "temperatures": tuple(values["temperatures"])})
        is_whole = document["schema_version"] == SCHEMA_VERSION and isinstance(
            document["shards"], list
        )
        if is_whole and (fault := index_fault(document)):
            raise ValueError(fault)
    except OSError as error:
        raise DataError(
            f"no cache at {folder}: {error.strerror}; make one with edgekd cache"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no cache of edgekd: {error!r}") from error
    if not is_whole:
        raise DataError(
            f"{path} has another schema version than {SCHEMA_VERSION}; capture it again"
        )
    return {**document, "identity": identity}


def check_identity(found: Identity, wanted: Identity, folder: Path) -> None:
    """Compare two identities.

    Raises:
        DataError: they differ; what differs and both hashes are named.
    """
    if found == wanted:
        return
    one, other = asdict(found), asdict(wanted)
    differences = [
        f"{name} {one[name]!r}, not {other[name]!r}" for name in one if one[name] != other[name]
    ]
    raise DataError(
        f"{folder} is another cache ({found.sha256()[:12]}, this would be {wanted.sha256()[:12]}): "
        f"it has {'; '.join(differences)}"
    )


class LogitCache:
    """A finished cache, checked and open for reading."""

    def __init__(self, folder: Path) -> None:
        """Open ``folder`` and compare every shard with its hash.

        Raises:
            DataError: the cache is unfinished, or a shard is missing or changed.
        """
        index = read_index(folder)
        self.folder = folder
        self.identity: Identity = index["identity"]
        self.shards: list[dict[str, Any]] = index["shards"]
        if not self.shards:
            raise DataError(f"the capture of {folder} is not finished; run edgekd cache again")
        self._files = [_open_shard(folder, entry, self.identity) for entry in self.shards]
        self._places = dict(self._find_samples())

    def __contains__(self, key: bytes) -> bool:
        """Whether the sample ``key`` was captured."""
        return key in self._places

    def read(self, key: bytes) -> Records:
        """Return the records of the sample ``key``."""
        place = self._places[key]
        parts: dict[str, slice] = {
            "n_top_P": place.positions,
            "n_tail_P": place.positions,
            "top_ids_E": place.top,
            "head_codes_E": place.head,
            "low_codes_E": place.low,
            "tail_ids_E": place.tail,
            "tail_codes_E": place.tail,
            "log_z_PT": place.positions,
            "entropy_PT": place.positions,
        }
        file = self._files[place.shard]
        arrays = {name: _read_slice(file, name, part) for name, part in parts.items()}
        for name in ("top_ids_E", "tail_ids_E"):
            arrays[name] = _unpack_ids(arrays[name])
        return Records(**arrays)

    def shard_records(self, shard: int) -> Records:
        """Return all records of one shard."""
        file = self._files[shard]
        arrays = {name: file.get_tensor(name) for name in Records._fields}
        for name in ("top_ids_E", "tail_ids_E"):
            arrays[name] = _unpack_ids(arrays[name])
        return Records(**arrays)

    def _find_samples(self) -> Iterator[tuple[bytes, _Place]]:
        for shard, file in enumerate(self._files):
            ends = file.get_tensor("sizes").cumsum(0)
            starts = np.concatenate([np.zeros_like(ends[:1]), ends[:-1]])
            for key, start, end in zip(file.get_tensor("keys"), starts, ends, strict=True):
                yield key.tobytes(), _Place(shard, *map(slice, start.tolist(), end.tolist()))


def _open_shard(folder: Path, entry: dict[str, Any], identity: Identity) -> Any:
    path = folder / Path(str(entry.get("file"))).name
    try:
        if (found := sha256_of(path)) != entry["sha256"]:
            raise DataError(
                f"{path} has sha256 {found[:12]}, cache.json says {entry['sha256'][:12]}; it was "
                "changed: delete it with its .json and run edgekd cache again"
            )
        file = safe_open(path, framework="np")
        if fault := shard_fault(file.get_tensor, entry, identity):
            raise DataError(f"{path} is no shard of this cache: {fault}; capture it again")
        return file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; run edgekd cache again") from error
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no shard of a cache: {error}") from error


def _read_slice(file: Any, name: str, part: slice) -> NDArray[Any]:
    found = file.get_slice(name)
    if part.start == part.stop:  # the library refuses an empty slice at the end
        return np.zeros((0, *found.get_shape()[1:]), file.get_tensor(name).dtype)
    array: NDArray[Any] = found[part]
    return array


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _pack_ids(ids_E: NDArray[np.uint32], vocab_size: int) -> NDArray[Any]:
    """Return ids in 2 bytes where the vocabulary allows, else in 3."""
    if vocab_size <= _MAX_TWO_BYTE_IDS:
        return ids_E.astype(np.uint16)
    return ids_E.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]


def _unpack_ids(packed: NDArray[Any]) -> NDArray[np.uint32]:
    if packed.ndim == 1:
        return packed.astype(np.uint32)
    widened = np.zeros((len(packed), 4), np.uint8)
    widened[:, :3] = packed
    return widened.view("<u4")[:, 0].astype(np.uint32)


def samples_by_shard(
    samples: Iterable[Document], shard_tokens: int
) -> list[list[tuple[bytes, Document]]]:
    """Return distinct samples in shards of about ``shard_tokens`` tokens, always the same way."""
    shards: list[list[tuple[bytes, Document]]] = []
    seen: set[bytes] = set()
    room = 0
    for sample in samples:
        if (key := sample_key(sample)) in seen:
            continue
        seen.add(key)
        if room < len(sample.ids) or not shards:
            shards.append([])
            room = max(shard_tokens, len(sample.ids))
        shards[-1].append((key, sample))
        room -= len(sample.ids)
    return shards
