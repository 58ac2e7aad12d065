"""Fixed-data distillation against TRL's GKDTrainer: speed, memory and loss curve.

    python benchmarks/distill_vs_trl.py --teacher T --student S --text F \
        --out benchmarks/results/distill_vs_trl.json

Forward KL, batch 4 x 256 tokens, bf16 autocast, no gradient checkpointing, the same rows in the
same order. Every arm is a process of its own; they take turns step by step, so that a noisy
minute hits all of them. The first steps, in which things compile, are not timed. Peak memory is
that of the whole process. The GEMM ceiling is what the step's matrix products alone would take at
the rate this machine reaches on a large one. Not measured: on-policy data, other batch sizes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from record import record
from turns import take_turns, turn_callback

ARMS = ("edgekd, bf16 heads", "edgekd, fp32 heads", "trl", "trl, torch_compile")
N_STEPS, N_WARM_UP = 20, 4
BATCH, ROW_TOKENS = 4, 256
LEARNING_RATE = 1e-4


def make_rows(student: Path, text: Path) -> list[list[int]]:
    """Return as many rows of token ids as the run needs."""
    from edgekd.runtime.tokenizer import FileTokenizer

    ids = FileTokenizer(student).encode(text.read_text("utf-8")[:1_000_000])
    starts = range(0, N_STEPS * BATCH * ROW_TOKENS, ROW_TOKENS)
    return [ids[start : start + ROW_TOKENS] for start in starts]


def training_settings(folder: str) -> dict[str, Any]:
    """Return what both trainers are given."""
    return {
        "output_dir": folder,
        "max_steps": N_STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": 0,
        "bf16": False,
        "use_cpu": True,
    }


def run_ours(arm: str, teacher: Path, student: Path, text: Path, folder: str) -> None:
    """Train with edgekd."""
    import torch
    from transformers import TrainingArguments

    from edgekd.distill.compile_layers import compile_layers
    from edgekd.distill.data import Document
    from edgekd.distill.loss_options import LossOptions
    from edgekd.distill.model import DistillModel, OnlineTeacher
    from edgekd.distill.packing import pack
    from edgekd.distill.trainer import DistillTrainer, collate
    from edgekd.distill.vocabulary import vocabulary_size
    from edgekd.runtime.tokenizer import FileTokenizer
    from edgekd.runtime.torch_engine import load_causal_lm

    rows = [Document(ids, [True] * ROW_TOKENS) for ids in make_rows(student, text)]
    models = load_causal_lm(student, torch.float32), load_causal_lm(teacher, torch.bfloat16)
    for model in models:
        compile_layers(model)
    n_tokens = vocabulary_size(FileTokenizer(student))
    precision: Any = "bf16" if "bf16" in arm else "fp32"
    options = LossOptions(head_precision=precision, compiled=True)
    wrapped = DistillModel(
        models[0], OnlineTeacher(models[1], n_tokens), n_tokens, options, torch.bfloat16
    )
    trainer = DistillTrainer(
        model=wrapped,
        args=TrainingArguments(**training_settings(folder)),
        train_dataset=pack(rows, ROW_TOKENS),
        data_collator=collate,
        callbacks=[turn_callback()],
    )
    trainer.train()


def run_trl(arm: str, teacher: Path, student: Path, text: Path, folder: str) -> None:
    """Train with TRL."""
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from edgekd.runtime.torch_engine import load_causal_lm

    rows = [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "attention_mask": [1] * ROW_TOKENS}
        for ids in make_rows(student, text)
    ]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    settings = training_settings(folder) | {"bf16": True}
    config = GKDConfig(
        **settings,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        torch_compile="compile" in arm,
        warmup_steps=0,
    )
    trainer = GKDTrainer(
        model=load_causal_lm(student, torch.float32),
        teacher_model=load_causal_lm(teacher, torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=PreTrainedTokenizerFast.from_pretrained(student),
        callbacks=[turn_callback()],
    )
    trainer.train()


def paths_as_options(paths: list[str]) -> list[str]:
    names = ("--teacher", "--student", "--text")
    return [part for pair in zip(names, paths, strict=True) for part in pair]


def summarise(steps: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return ratios to TRL, step by step and so with their spread."""
    rows: dict[str, Any] = {}
    trl = steps["trl"]
    n_tokens = BATCH * (ROW_TOKENS - 1)
    for arm, found in steps.items():
        if len(found) < N_STEPS:
            rows[arm] = {"unavailable": f"it ended after {len(found)} steps"}
            continue
        pairs = list(zip(found, trl, strict=True))
        speedups = [other["seconds"] / one["seconds"] for one, other in pairs[N_WARM_UP:]]
        seconds = [step["seconds"] for step in found[N_WARM_UP:]]
        rows[arm] = {
            "tokens_per_s": {
                "median": n_tokens / statistics.median(seconds),
                "slowest": n_tokens / max(seconds),
                "fastest": n_tokens / min(seconds),
            },
            "speed_over_trl": {
                "median": statistics.median(speedups),
                "quartiles": statistics.quantiles(speedups, n=4),
            },
            "peak_rss_bytes": found[-1]["peak_rss_bytes"],
            "memory_over_trl": found[-1]["peak_rss_bytes"] / trl[-1]["peak_rss_bytes"],
            "largest_loss_difference_to_trl": max(
                abs(one["loss"] / other["loss"] - 1) for one, other in pairs
            ),
            "losses": [step["loss"] for step in found],
        }
    return rows


def gemm_ceiling(teacher: Path, student: Path) -> dict[str, float]:
    """Return tokens/s of the products alone: 6 FLOP a weight for the student, 2 for the teacher."""
    import torch

    from edgekd.export.checkpoint import open_checkpoint

    def weights(folder: Path) -> tuple[int, int]:
        checkpoint = open_checkpoint(folder)
        head = checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"]
        return checkpoint.n_parameters - head, head

    (body_s, head_s), (body_t, head_t) = weights(student), weights(teacher)
    body, heads = 6 * body_s + 2 * body_t, 6 * head_s + 2 * head_t
    rates = {name: _gflops(getattr(torch, name)) for name in ("bfloat16", "float32")}
    per_token_s = {
        "bf16 heads": (body + heads) / rates["bfloat16"],
        "fp32 heads": body / rates["bfloat16"] + heads / rates["float32"],
    }
    ceilings = {f"tokens_per_s, {name}": 1e9 / cost for name, cost in per_token_s.items()}
    return ceilings | {f"gflops, {name}": rate for name, rate in rates.items()}


def _gflops(dtype: Any) -> float:
    import torch

    left, right = torch.randn(1024, 1536, dtype=dtype), torch.randn(1536, 4096, dtype=dtype)
    best_s = float("inf")
    for _ in range(8):
        start_s = time.perf_counter()
        left @ right
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * 1024 * 1536 * 4096 / best_s / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=ARMS)
    for name in ("--teacher", "--student", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        import tempfile

        run = run_trl if arguments.worker.startswith("trl") else run_ours
        with tempfile.TemporaryDirectory() as folder:
            run(arguments.worker, arguments.teacher, arguments.student, arguments.text, folder)
        return
    ceiling = gemm_ceiling(arguments.teacher, arguments.student)
    paths = [str(arguments.teacher), str(arguments.student), str(arguments.text)]
    commands = {
        arm: [sys.executable, __file__, "--worker", arm, *paths_as_options(paths)] for arm in ARMS
    }
    rows = summarise(take_turns(commands, N_STEPS))
    result = {"rows": rows, "gemm_ceiling": ceiling, "batch": [BATCH, ROW_TOKENS]}
    record(result, arguments.out, peers=["trl"])


if __name__ == "__main__":
    main()
