"""Time and memory of the distillation loss against dense autograd, TRL's and Liger's.

    python benchmarks/kd_loss.py --out benchmarks/results/kd_loss.json

Each kind runs in processes of its own, in turns, on the same random hidden states: forward KL at
T = 1, forward and backward, float32; the second of two steps is timed. Memory is what a step adds
to the peak resident memory of a process that already holds inputs and heads; 4 bytes x vocabulary x
hidden of it is the gradient of the head, in every kind. Not measured: the models themselves. A kind
whose package is missing is reported as unavailable.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import record

from edgekd.devices.memory import peak_rss_bytes

KINDS = ("dense", "edgekd", "edgekd compiled", "trl chunked", "liger chunked")
SHAPES = {
    "Qwen2.5 7B to 0.5B": {"tokens": 1024, "vocab": 151_936, "hidden": 896, "teacher_hidden": 3584},
    "SmolLM2": {"tokens": 1024, "vocab": 49_152, "hidden": 576, "teacher_hidden": 576},
}
REPETITIONS = 3

Step = Callable[[], None]


def make_step(kind: str, inputs: dict[str, Any]) -> Step:
    """Return one forward and backward of ``kind``."""
    hidden, head = inputs["hidden"], inputs["head"]
    teacher_hidden, teacher_head = inputs["teacher_hidden"], inputs["teacher_head"]

    def dense() -> None:
        import torch.nn.functional as F

        student_log = F.log_softmax(hidden @ head.T, -1)
        teacher_log = F.log_softmax(teacher_hidden @ teacher_head.T, -1)
        F.kl_div(student_log, teacher_log, log_target=True, reduction="sum").backward()  # type: ignore[no-untyped-call]

    def ours() -> None:
        import torch

        from edgekd.distill.loss_options import LossOptions
        from edgekd.distill.losses import OnlineTarget, distillation_loss

        options = LossOptions(compiled=kind.endswith("compiled"))
        target = OnlineTarget(teacher_hidden, teacher_head)
        weights = torch.ones(len(hidden))
        parts = distillation_loss(hidden, head, target, inputs["labels"], weights, options)
        parts.loss.backward()  # type: ignore[no-untyped-call]

    def trl() -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        value_N, _ = ChunkedDivergenceFunction.apply(
            hidden, head, None, teacher_hidden, teacher_head, None, 0.0
        )
        value_N.sum().backward()

    def liger() -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=1.0, compiled=False
        )
        loss(hidden, head, teacher_hidden, teacher_head, inputs["labels"]).backward()

    return {"dense": dense, "trl chunked": trl, "liger chunked": liger}.get(kind, ours)


def measure(kind: str, shape: dict[str, int]) -> dict[str, float]:
    """Return the added peak bytes of a first step, and the seconds of a second.

    The first one pays for compiling and for fresh pages, which training does once.
    """
    import torch

    torch.manual_seed(0)
    head = torch.randn(shape["vocab"], shape["hidden"]).mul_(0.05).requires_grad_()
    teacher_head = torch.randn(shape["vocab"], shape["teacher_hidden"]).mul_(0.02)

    def inputs(n_tokens: int) -> dict[str, Any]:
        return {
            "hidden": torch.randn(n_tokens, shape["hidden"], requires_grad=True),
            "head": head,
            "teacher_hidden": torch.randn(n_tokens, shape["teacher_hidden"]),
            "teacher_head": teacher_head,
            "labels": torch.randint(0, shape["vocab"], (n_tokens,)),
        }

    whole = inputs(shape["tokens"])
    small = {**whole, "head": head[:512].detach().requires_grad_()}
    small["teacher_head"], small["labels"] = teacher_head[:512], whole["labels"] % 512
    make_step(kind, {**small, "hidden": whole["hidden"].detach().requires_grad_()})()
    before_bytes = peak_rss_bytes()
    step = make_step(kind, whole)
    step()
    added_peak_bytes = peak_rss_bytes() - before_bytes
    whole["hidden"].grad = head.grad = None
    start_s = time.perf_counter()
    step()
    return {"seconds": time.perf_counter() - start_s, "added_peak_bytes": added_peak_bytes}


def gemm_gflops() -> float:
    """Return this machine's float32 matrix product rate, the best of three."""
    import torch

    left, right = torch.randn(256, 1024), torch.randn(1024, 16_384)
    best_s = float("inf")
    for _ in range(4):
        start_s = time.perf_counter()
        left @ right
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * 256 * 1024 * 16_384 / best_s / 1e9


def run(kind: str, shape: str) -> dict[str, Any]:
    """Return the measurement of a fresh process, or why there is none."""
    command = [sys.executable, __file__, "--worker", kind, "--shape", shape]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        return {"unavailable": child.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def compare(shape: str) -> dict[str, Any]:
    """Return every kind's samples, taken in turns, and ratios to the dense one."""
    samples: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(REPETITIONS):
        for kind in KINDS:
            samples[kind].append(run(kind, shape))
    size = SHAPES[shape]
    # Student: product, gradient of hidden states, gradient of the head. Teacher: product.
    n_flop = 2 * size["tokens"] * size["vocab"] * (3 * size["hidden"] + size["teacher_hidden"])
    rows: dict[str, Any] = {}
    for kind, found in samples.items():
        if "unavailable" in found[0]:
            rows[kind] = found[0]
            continue
        pairs = list(zip(found, samples["dense"], strict=True))
        rows[kind] = {
            "samples": found,
            "time_to_dense": [one["seconds"] / dense["seconds"] for one, dense in pairs],
            "memory_to_dense": [
                one["added_peak_bytes"] / dense["added_peak_bytes"] for one, dense in pairs
            ],
            "gflops": n_flop / statistics.median(one["seconds"] for one in found) / 1e9,
        }
    return {"shape": size, "rows": rows, "gemm_gflops": gemm_gflops()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=KINDS)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, SHAPES[arguments.shape])))
        return
    result = {"shapes": {shape: compare(shape) for shape in SHAPES}}
    record(result, arguments.out, peers=["trl", "liger-kernel"])


if __name__ == "__main__":
    main()
