"""Whether what a cache says of itself hangs together; its hashes only say that nobody changed it.

A cache may come from a stranger, and wrong counts would index past its arrays, or silently take
one position's tokens for another's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# P positions, S samples, E entries, T temperatures

KEY_BYTES = 32  # sha256
_N_HEAD = 4  # as in edgekd.distill.cache_codec
_COUNTS = ("samples", "positions", "bytes")


def index_fault(document: dict[str, Any]) -> str | None:
    """Return what is wrong with the identity's numbers or a shard's entry in ``cache.json``."""
    identity = document["identity"]
    temperatures = identity["temperatures"]
    are_numbers = all(isinstance(one, (int, float)) and 1 <= one < 1e6 for one in temperatures)
    if not are_numbers or 1 not in temperatures:
        return f"temperatures {temperatures} must be 1 and above, one of them 1"
    for name in ("vocab_size", "row_tokens", "top_k", "tail_samples"):
        if not _is_count(identity[name]):
            return f"{name} {identity[name]!r} is no count"
    for entry in document["shards"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            return "a shard has no sha256"
        if wrong := [name for name in _COUNTS if not _is_count(entry.get(name))]:
            return f"a shard has no count of {', '.join(wrong)}"
    return None


def shard_fault(
    tensor: Callable[[str], NDArray[Any]], entry: dict[str, Any], identity: Any
) -> str | None:
    """Return what is wrong with the arrays of a shard, read by ``tensor``.

    ``entry`` describes it in the index, ``identity`` is the cache's.
    """
    keys, sizes_S5 = tensor("keys"), tensor("sizes")
    n_top_P, n_tail_P = tensor("n_top_P").astype(np.int64), tensor("n_tail_P").astype(np.int64)
    n_temperatures, n_positions = len(identity.temperatures), entry["positions"]
    is_narrow = tensor("top_ids_E").ndim == 1
    id_type: type = np.uint16 if is_narrow else np.uint8
    id_shape: tuple[int, ...] = () if is_narrow else (3,)
    n_head_P = np.minimum(n_top_P, _N_HEAD)
    n_of = {
        "top_ids_E": n_top_P,
        "head_codes_E": n_head_P,
        "low_codes_E": n_top_P - n_head_P,
        "tail_ids_E": n_tail_P,
    }
    wanted: dict[str, tuple[type, tuple[int, ...]]] = {
        "keys": (np.uint8, (entry["samples"], KEY_BYTES)),
        "sizes": (np.int64, (entry["samples"], 1 + len(n_of))),
        "n_top_P": (np.uint8, (n_positions,)),
        "n_tail_P": (np.uint8, (n_positions,)),
        "top_ids_E": (id_type, (int(n_top_P.sum()), *id_shape)),
        "head_codes_E": (np.uint16, (int(n_head_P.sum()),)),
        "low_codes_E": (np.uint8, (int((n_top_P - n_head_P).sum()),)),
        "tail_ids_E": (id_type, (int(n_tail_P.sum()), *id_shape)),
        "tail_codes_E": (np.uint8, (int(n_tail_P.sum()),)),
        "log_z_PT": (np.uint16, (n_positions, n_temperatures - 1)),
        "entropy_PT": (np.uint8, (n_positions, n_temperatures)),
    }
    for name, (kind, shape) in wanted.items():
        found = tensor(name)
        if found.dtype != kind or found.shape != shape:
            return f"{name} is {found.dtype} {found.shape}, not {np.dtype(kind)} {shape}"
    return _sizes_fault(sizes_S5, n_positions, list(n_of.values())) if len(keys) else "no samples"


def _sizes_fault(
    sizes_S5: NDArray[np.int64], n_positions: int, counts: list[NDArray[np.int64]]
) -> str | None:
    """Return what is wrong where samples are cut out of the arrays."""
    if (sizes_S5 < 0).any() or (sizes_S5 > np.iinfo(np.int32).max).any():
        return "a sample has a size that is none"
    ends_S5 = sizes_S5.cumsum(0)
    if ends_S5[-1, 0] != n_positions:
        return f"the samples have {ends_S5[-1, 0]} positions, the shard {n_positions}"
    for column, count_P in enumerate(counts, 1):
        ends_P = np.concatenate([[0], count_P.cumsum()])
        if (ends_P[ends_S5[:, 0]] != ends_S5[:, column]).any():
            return "the samples' sizes contradict their positions"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
