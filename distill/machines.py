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
# TF32 only where it is told to, and edgekd does not), and the link to the other GPUs of a node in
# one direction (NVLink, or PCIe at 16 lanes).
_GPUS = {
    "H200-141GB": (141e9, 989e12, 67e12, 450e9),
    "H100-80GB": (80e9, 989e12, 67e12, 450e9),
    "A100-80GB": (80e9, 312e12, 19.5e12, 300e9),
    "A100-40GB": (40e9, 312e12, 19.5e12, 300e9),
    "L40S-48GB": (48e9, 362e12, 92e12, 32e9),
    "L4-24GB": (24e9, 121e12, 30e12, 32e9),
    "RTX4090-24GB": (24e9, 165e12, 83e12, 32e9),
    "RTX3090-24GB": (24e9, 71e12, 36e12, 32e9),
    "T4-16GB": (16e9, 65e12, 8e12, 16e9),
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
    rates = [math.nan, math.nan]
    if with_speed:
        rates = [_matmul_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return Machine(
        name, float(free), rates[0], rates[1], has_native_bf16(), is_gpu=device == "cuda"
    )


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
    memory, bf16, fp32, link = _GPUS[match[3]]
    gbit = _NODE_GBIT_PER_GPU * per_node if network_gbit is None else network_gbit
    if gbit <= 0:
        raise RecipeError(f"a network of {gbit:g} Gbit/s carries nothing; give more than 0")
    return Machine(
        text,
        memory,
        bf16,
        fp32,
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
    # With AVX-512 alone oneDNN says yes and imitates it, at a fifth of fp32's speed.
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
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    best_s, end_s = math.inf, time.monotonic() + _PROBE_S / 2
    while time.monotonic() < end_s:
        start_s = time.perf_counter()
        left @ right
        wait()
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * n_rows * 1024 * 4096 / best_s
