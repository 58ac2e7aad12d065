"""What this machine can do at most: bytes read and multiplications a second.

No engine can decode faster than its weights come out of memory, nor prefill faster than the
processor multiplies. Both limits are probed with numpy on as many threads as the run has, in a
process of its own, since the thread count of a BLAS is fixed when it is loaded.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.devices.detect import memory_bytes, read_text
from edgekd.devices.reading import Reading

_REPEATS = 7
_WARM_UPS = 2
_BUFFER_BYTES = 512_000_000
_CACHES = 4  # a buffer of so many last-level caches is read from memory
_GEMM_SIZE = 1536  # 3 matrices of 9 MB: 0.05 s at 140 GFLOP/s
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The best of several tries of each probe, all tries kept."""

    n_threads: int
    read_bytes_per_s: Reading
    gemm_flop_per_s: Reading
    """Single precision, two for each multiply-add."""
    read_samples: tuple[float, ...] = ()
    gemm_samples: tuple[float, ...] = ()
    last_level_cache_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the limits as JSON values."""
        return asdict(self)


def probe_roofline(n_threads: int) -> Roofline:
    """Return the limits of this machine on ``n_threads``, or why they are unknown."""
    environment = os.environ | {name: str(n_threads) for name in _THREAD_VARIABLES}
    child = subprocess.run(
        [sys.executable, "-P", "-m", "edgekd.runtime.roofline", str(n_threads)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    try:
        found = json.loads(child.stdout.splitlines()[-1])
        reads, gemms = tuple(found["read_samples"]), tuple(found["gemm_samples"])
    except (IndexError, ValueError, KeyError, TypeError):
        return _unknown(n_threads, (child.stderr.strip().splitlines() or ["no reason given"])[-1])
    return Roofline(
        n_threads=n_threads,
        read_bytes_per_s=Reading.measured(max(reads), "bytes/s", "numpy maximum over int64"),
        gemm_flop_per_s=Reading.measured(max(gemms), "flop/s", "numpy float32 matmul"),
        read_samples=reads,
        gemm_samples=gemms,
        last_level_cache_bytes=last_level_cache_bytes(),
    )


def decode_share(
    tokens_per_s: float, weights: Reading, kv: Reading, mean_depth: float, limits: Roofline | None
) -> float | None:
    """Return which share of the read bandwidth a decode rate is; None where a part is unknown.

    ``mean_depth`` is the number of tokens in the cache halfway through.
    """
    bandwidth = limits.read_bytes_per_s.value if limits else None
    if weights.value is None or bandwidth is None:
        return None
    return tokens_per_s * (weights.value + (kv.value or 0.0) * mean_depth) / bandwidth


def prefill_share(
    tokens_per_s: float, parameters: Reading, limits: Roofline | None
) -> float | None:
    """Return which share of the GEMM rate a prefill is; None where a part is unknown."""
    flops = limits.gemm_flop_per_s.value if limits else None
    if parameters.value is None or flops is None:
        return None
    return tokens_per_s * 2 * parameters.value / flops


def last_level_cache_bytes(root: Path = Path("/")) -> int | None:
    """Return the size of the largest cache of processor 0, which it may share with others."""
    sizes = []
    for file in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"):
        text = read_text(file) or ""
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=None)


def main() -> None:
    """Probe on the number of threads in the first argument; print the samples as JSON."""
    n_threads = int(sys.argv[1])
    samples = {"read_samples": _read_rates(n_threads), "gemm_samples": _gemm_rates()}
    print(json.dumps(samples), flush=True)


def _unknown(n_threads: int, reason: str) -> Roofline:
    return Roofline(
        n_threads=n_threads,
        read_bytes_per_s=Reading.unavailable("bytes/s", "numpy", reason),
        gemm_flop_per_s=Reading.unavailable("flop/s", "numpy", reason),
        last_level_cache_bytes=last_level_cache_bytes(),
    )


def _read_rates(n_threads: int) -> list[float]:
    """Return bytes/s of reading a buffer that no cache holds; numpy drops the GIL meanwhile."""
    import numpy as np

    _, available = memory_bytes()
    wanted = max(_BUFFER_BYTES, _CACHES * (last_level_cache_bytes() or 0))
    size_bytes = min(wanted, (available or wanted) // 8)
    parts = np.array_split(np.ones(size_bytes // 8, np.int64), n_threads)
    rates = []
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_WARM_UPS + _REPEATS):
            start_s = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            rates.append(size_bytes / (time.perf_counter() - start_s))
    return rates[_WARM_UPS:]


def _gemm_rates() -> list[float]:
    import numpy as np

    a_MK = np.ones((_GEMM_SIZE, _GEMM_SIZE), np.float32)
    b_KN = np.ones_like(a_MK)
    out_MN = np.empty_like(a_MK)
    rates = []
    for _ in range(_WARM_UPS + _REPEATS):
        start_s = time.perf_counter()
        np.matmul(a_MK, b_KN, out=out_MN)
        rates.append(2 * _GEMM_SIZE**3 / (time.perf_counter() - start_s))
    return rates[_WARM_UPS:]


if __name__ == "__main__":
    main()
