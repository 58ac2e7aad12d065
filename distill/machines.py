"""Where a run would be: this machine, or one that is known by name."""

import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from edgekd.errors import RecipeError

_PROBE_S = 0.5
_FEW_ROWS, _N_READ = 8, 26  # texts written at a time, and 436 MB of matrices
_NODE_GBIT_PER_GPU = 400  # a port for each GPU, as in the maker's own 8-GPU nodes (DGX H100)
_BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Machine:
    """Where the run would be."""

    name: str
    memory_bytes: float
    bf16_flops: float
    fp32_flops: float
    """Rates of large matrix products, in FLOP per second."""
    read_bytes_per_s: float
    """At which weights are read where a product has few rows."""
    has_bf16: bool = True
    """Multiplies it natively; others imitate it, slowly."""
    n_devices: int = 1
    """Of all nodes together."""
    is_gpu: bool = False
    n_nodes: int = 1
    link_bytes_per_s: float = math.inf
    """What one GPU can receive from the others of its node."""
    node_bytes_per_s: float = math.inf
    """What one node can receive from the others."""


# From the makers' data sheets: memory, dense products in bf16 and in plain float32 (torch uses
# TF32 only where it is told to, and edgekd does not), memory bandwidth, and the link to the other
# GPUs of a node in one direction (NVLink, or PCIe at 16 lanes).
_GPUS = {
    "H200-141GB": (141e9, 989e12, 67e12, 4800e9, 450e9),
    "H100-80GB": (80e9, 989e12, 67e12, 3350e9, 450e9),
    "A100-80GB": (80e9, 312e12, 19.5e12, 2039e9, 300e9),
    "A100-40GB": (40e9, 312e12, 19.5e12, 1555e9, 300e9),
    "L40S-48GB": (48e9, 362e12, 92e12, 864e9, 32e9),
    "L4-24GB": (24e9, 121e12, 30e12, 300e9, 32e9),
    "RTX4090-24GB": (24e9, 165e12, 83e12, 1008e9, 32e9),
    "RTX3090-24GB": (24e9, 71e12, 36e12, 936e9, 32e9),
    "T4-16GB": (16e9, 65e12, 8e12, 320e9, 16e9),
}
_WITHOUT_BF16 = ("T4-16GB",)  # older than NVIDIA's compute capability 8.0
_NAME = re.compile(r"(?:([1-9]\d*)x)?(?:([1-9]\d*)x)?(\D.*)")


def this_machine(*, with_speed: bool) -> Machine:
    """Return what this machine has free and, in half a second, how fast it multiplies."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        name, device = torch.cuda.get_device_name(), "cuda"
    else:
        free = psutil.virtual_memory().available + rss_bytes()
        name, device = "processor", "cpu"
    bf16 = fp32 = read = math.nan
    if with_speed:
        bf16, fp32 = (_matmul_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32))
        read = _read_bytes_per_s(device)
    return Machine(name, float(free), bf16, fp32, read, has_native_bf16(), is_gpu=device == "cuda")


def named_machine(text: str, network_gbit: float | None = None) -> Machine:
    """Return the machine that ``text`` stands for: H100-80GB, 8xH100-80GB, or 8x8xH100-80GB.

    Two numbers are nodes and the GPUs of each; ``network_gbit`` is what a node receives from the
    others, in Gbit/s.

    Raises:
        RecipeError: the GPU is unknown; those known are listed.
    """
    match = _NAME.fullmatch(text)
    if match is None or match[3] not in _GPUS:
        raise RecipeError(
            f"unknown machine {text!r}; known are N x {', '.join(_GPUS)}, also nodes x N x one"
        )
    numbers = [int(number) for number in match.groups()[:2] if number]
    n_nodes, per_node = [1, 1, *numbers][-2:]
    memory, bf16, fp32, read, link = _GPUS[match[3]]
    gbit = _NODE_GBIT_PER_GPU * per_node if network_gbit is None else network_gbit
    if gbit <= 0:
        raise RecipeError(f"a network of {gbit:g} Gbit/s carries nothing; give more than 0")
    return Machine(
        text,
        memory,
        bf16,
        fp32,
        read,
        has_bf16=match[3] not in _WITHOUT_BF16,
        n_devices=n_nodes * per_node,
        is_gpu=True,
        n_nodes=n_nodes,
        link_bytes_per_s=link,
        node_bytes_per_s=gbit * _BYTES_PER_GBIT,
    )


def has_native_bf16() -> bool:
    """Return whether the device that trains multiplies bf16; others imitate it, slowly."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # With AVX-512 alone oneDNN says yes and imitates it, far more slowly than it computes in fp32.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and not torch.cpu._is_avx512_bf16_supported():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rss_bytes() -> int:
    """Return what this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def _matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Return the rate of a product of a usual shape, the best within the probe's time."""
    is_native = dtype != torch.bfloat16 or has_native_bf16()
    n_rows = 1024 if is_native else 16  # of which one product takes as long
    left = torch.randn(n_rows, 1024, device=device, dtype=dtype)
    right = torch.randn(1024, 4096, device=device, dtype=dtype)
    return 2 * n_rows * 1024 * 4096 / _best_s(lambda: left @ right, device)


def _read_bytes_per_s(device: str) -> float:
    """Return how fast matrices are read that no cache holds, each for a product of few rows."""
    left = torch.randn(_FEW_ROWS, 1024, device=device)
    rights = [torch.ones(4096, 1024, device=device) for _ in range(_N_READ)]

    def multiply() -> None:
        for right in rights:
            torch.nn.functional.linear(left, right)

    return sum(right.nbytes for right in rights) / _best_s(multiply, device)


def _best_s(work: Callable[[], object], device: str) -> float:
    """Return the least time that ``work`` takes, of as often as fits into half a probe."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    best_s, end_s = math.inf, time.monotonic() + _PROBE_S / 2
    while time.monotonic() < end_s:
        start_s = time.perf_counter()
        work()
        wait()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s
