"""What a size buys: matrices chosen by measured cost against the fixed rule for the head.

    python benchmarks/size_budget.py --model M --text F --held-out G \
        --out benchmarks/results/size_budget.json

Each row is one choice of Q4_0 and Q8_0 for the matrices, all rounded plainly, so that only the
choice differs; KL is to the model's own float logits on held-out text, of the rounded weights in
torch. The fixed rule is 8 bits for embedding and head; its size is given to the choice by cost too.
Not measured: GPTQ on top, see benchmarks/calibrated_q4_0.py.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import record

from edgekd.export.budget import N_TOKENS, measure_costs, plan_within
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_options import Budget
from edgekd.export.plan import Plan, make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.runtime.fidelity import compare_engines
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

WINDOW_TOKENS = 512


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return KL and top-1 agreement of every choice."""
    checkpoint = open_checkpoint(arguments.model)
    tokenizer = FileTokenizer(checkpoint.folder)
    start_s = time.perf_counter()
    ids = tokenizer.encode(arguments.text.read_text("utf-8")[: 16 * N_TOKENS])[:N_TOKENS]
    fixed = make_plan(checkpoint, "q4_0")
    costs_nats = measure_costs(checkpoint, fixed, ids)
    measuring_s = time.perf_counter() - start_s
    plans = {"fixed rule": fixed}
    for bits in (4.5, bits_per_weight(checkpoint, fixed), *arguments.bits):
        budget = Budget(bits_per_weight=bits + 1e-9)
        plans[f"{bits:.3f} bits"] = plan_within(checkpoint, fixed, budget, 0, costs_nats)
    held_out = tokenizer.encode(arguments.held_out.read_text("utf-8"))
    held_out = held_out[: arguments.held_out_tokens]
    windows = [
        held_out[start : start + WINDOW_TOKENS] for start in range(0, len(held_out), WINDOW_TOKENS)
    ]
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), WINDOW_TOKENS)
    rows = {}
    for label, plan in plans.items():
        rounded = TorchEngine(rounded_model(checkpoint, plan), WINDOW_TOKENS)
        rows[label] = {
            "bits_per_weight": bits_per_weight(checkpoint, plan),
            "n_q8_0": sum(grid == "q8_0" for grid in plan.grids().values()),
            **asdict(compare_engines(exact, rounded, windows)),
        }
    return {"tokens": len(ids), "measuring_s": measuring_s, "rows": rows}


def bits_per_weight(checkpoint: Checkpoint, plan: Plan) -> float:
    """Return the mean over the matrices, scales included."""
    sizes = {name: math.prod(checkpoint.shape(name)) for name in plan.grids()}
    bits = {name: 4.5 if plan.grid_of(name) == "q4_0" else 8.5 for name in sizes}
    return sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="*", default=[5.0, 6.0, 7.0])
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record(measure(arguments), arguments.out)


if __name__ == "__main__":
    main()
