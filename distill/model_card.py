"""The model card beside a student: recipe, data, measured results, licence."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekd.distill.recipe import Job
from edgekd.distill.training_log import Log, last_figures


def write_card(
    path: Path, job: Job, licence: str | None, sources: Sequence[dict[str, Any]], log: Log
) -> None:
    """Write a README.md that hubs understand; every figure in it comes from ``log``."""
    head = [
        *([f"license: {licence}"] if licence else []),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [edgekd, distillation]",
    ]
    named = [f"- {source['role']}: {source['name']} (`{_short(source)}`)" for source in sources]
    data = [f"- `{name}`" for name in job.data]
    settings = [f"| {name} | {json.dumps(value)} |" for name, value in asdict(job.recipe).items()]
    lines = [
        "---",
        *head,
        "---",
        "",
        "# A distilled student",
        "",
        f"Trained by edgekd on {_tokens(log):,} tokens.",
        "",
        "## Made from",
        *named,
        "",
        "## Data",
        *data,
        "",
        "## Results",
        *_results(log),
        "",
        "![training curve](training_curve.svg)",
        "",
        "## Recipe",
        "",
        "| setting | value |",
        "|---|---|",
        *settings,
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _results(log: Log) -> list[str]:
    held_out, trained = last_figures(log, "eval_perplexity"), last_figures(log, "loss")
    lines = [f"- training loss at step {trained['step']}: {trained['loss']:.4f} nats per token"]
    if not held_out:
        return [*lines, "- held-out text: not measured; give `--eval-data`"]
    lines.append(f"- held-out perplexity: {held_out['eval_perplexity']:.2f}")
    if "eval_kl_nats" in held_out:
        lines += [
            f"- held-out KL to the teacher: {held_out['eval_kl_nats']:.4f} nats per token",
            f"- held-out top-1 agreement: {held_out['eval_top1_agreement']:.1%}",
        ]
    return lines


def _tokens(log: Log) -> int:
    return int(sum(entry.get("tokens", 0) for entry in log))


def _short(source: dict[str, Any]) -> str:
    return str(source["weights_sha256"])[:12]
