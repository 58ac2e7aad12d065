"""The report of ``edgekd verify`` as a table for people; its JSON says more."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgekd.runtime.estimated import Estimate, percent_text, value_text

Row = tuple[str, str, str]
"""What was checked, what was found, and its limit."""


def render_report(report: dict[str, Any]) -> Table:
    """Return what was checked of one artifact; all of it was within its limits."""
    table = Table(title=escape(f"{report['path']}: good"), title_justify="left")
    for heading in ("", "found", "limit"):
        table.add_column(heading)
    for row in _rows(report):
        table.add_row(*map(escape, row))
    return table


def _rows(report: dict[str, Any]) -> Iterator[Row]:
    yield "files", report["files"], "sha256 of the manifest"
    yield "tensors, dequantized", report["tensors"], "sha256 of the manifest"
    if (missing := report.get("fidelity")) is not None:
        yield "weights, tokenizer, logits", missing, ""
    else:
        yield from _against_checkpoint(report)
    if "on_npu" in report:
        yield from _on_npu(report["on_npu"])
    if "teacher" in report:
        yield from _against_teacher(report["teacher"])


def _against_checkpoint(report: dict[str, Any]) -> Iterator[Row]:
    yield "matrices", f"{report['equal_matrices']} equal to the checkpoint's blocks", "bit for bit"
    yield "tokenizer, chat template", report["tokenizer"], "the checkpoint's"
    engine, limits, greedy = report["arithmetic"], report["limits"], report["greedy"]
    of = f", {engine['n_positions']} positions"
    yield "engine against its own weights in torch: KL" + of, *_kl(engine, limits["kl_nats"])
    yield "  top-1", f"{engine['top1_agreement']:.1%}", f"at least {limits['top1_floor']:.1%}"
    yield (
        "  perplexity, times torch's",
        f"{engine['perplexity_ratio']:.4f}",
        f"at most {limits['perplexity_ceiling']:.4f}",
    )
    yield (
        f"  greedy choices, {greedy['n_equal']} of {greedy['n_tokens']} equal: worst gap",
        f"{greedy['worst_gap_nats']:.3f} nats",
        f"at most {limits['greedy_gap_nats']:g}",
    )
    rounding = report["rounding"]
    yield "rounding against the float checkpoint: KL", f"{rounding['kl_nats']:.2e} nats", ""
    yield "  top-1", f"{rounding['top1_agreement']:.1%}", ""
    yield "  perplexity, times the checkpoint's", f"{rounding['perplexity_ratio']:.4f}", ""


def _on_npu(seen: dict[str, Any]) -> Iterator[Row]:
    limits = seen["limits"]
    yield f"NPU ({seen['label']}) against torch: KL", *_kl(seen["to_torch"], limits["kl_nats"])
    yield "NPU against the CPU: KL", *_kl(seen["to_onnx_cpu"], limits["kl_nats"])
    yield (
        "  worst gap of a best token",
        f"{seen['worst_gap_nats']:.3f} nats",
        f"at most {limits['near_tie_nats']:g}",
    )


def _kl(found: dict[str, Any], limit_nats: float) -> tuple[str, str]:
    return f"{found['kl_nats']:.2e} nats", f"at most {limit_nats:g}"


def _against_teacher(found: dict[str, Any]) -> Iterator[Row]:
    limits, figures = (
        found["limits"],
        {
            name: Estimate(**found[name])
            for name in ("kl_nats", "top1_agreement", "perplexity_ratio")
        },
    )
    of = f", {found['n_positions']} positions"
    yield (
        f"file against teacher {found['model']}: KL" + of,
        f"{value_text(figures['kl_nats'], 4)} nats",
        _limit("at most {:g}", limits["max_kl_nats"]),
    )
    yield (
        "  top-1",
        percent_text(figures["top1_agreement"]),
        _limit("at least {:.2%}", limits["min_top1_agreement"]),
    )
    yield (
        "  perplexity, times the teacher's",
        value_text(figures["perplexity_ratio"], 4),
        _limit("at most {:g}", limits["max_perplexity_ratio"]),
    )
    yield "  perplexity", value_text(Estimate(**found["perplexity"]), 3), ""


def _limit(text: str, limit: float | None) -> str:
    return "" if limit is None else text.format(limit)
