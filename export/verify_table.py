"""The report of ``edgekd verify`` as a table for people; its JSON says more."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from edgekd.runtime.estimated import Estimate, percent_text, value_text

Row = tuple[str, str, str, str]
"""Layer, figure, what was found, and its limit; a layer is named in its first row."""

_PERPLEXITY = "perplexity, times its"


def render_report(report: dict[str, Any]) -> Table:
    """Return what was checked of one artifact; all of it was within its limits."""
    table = Table(title=escape(f"{report['path']}: good"), title_justify="left")
    for heading in ("compared", "", "found", "limit"):
        table.add_column(heading)
    for row in _rows(report):
        table.add_row(*map(escape, row))
    return table


def _rows(report: dict[str, Any]) -> Iterator[Row]:
    yield "manifest", "files", report["files"], "same sha256"
    yield "", "tensors, dequantized", report["tensors"], "same sha256"
    if (missing := report.get("fidelity")) is not None:
        yield "checkpoint", "weights, tokenizer, logits", missing, ""
    else:
        yield from _against_checkpoint(report)
    if "on_npu" in report:
        yield from _on_npu(report["on_npu"])
    if "teacher" in report:
        yield from _against_teacher(report["teacher"])


def _against_checkpoint(report: dict[str, Any]) -> Iterator[Row]:
    yield "checkpoint", "matrices", f"{report['equal_matrices']} equal", "bit for bit"
    yield "", "tokenizer, chat template", report["tokenizer"], "the same"
    engine, limits, greedy = report["arithmetic"], report["limits"], report["greedy"]
    layer = f"its own weights in torch, {engine['n_positions']} positions"
    yield layer, "KL", *_kl(engine, limits["kl_nats"])
    yield "", "top-1", f"{engine['top1_agreement']:.1%}", f"at least {limits['top1_floor']:.1%}"
    ceiling = f"at most {limits['perplexity_ceiling']:.4f}"
    yield "", _PERPLEXITY, f"{engine['perplexity_ratio']:.4f}", ceiling
    yield "", "greedy tokens", f"{greedy['n_equal']} of {greedy['n_tokens']} equal", ""
    gap, most = greedy["worst_gap_nats"], limits["greedy_gap_nats"]
    yield "", "worst gap of one", f"{gap:.3f} nats", f"at most {most:g}"
    rounding = report["rounding"]
    yield "the float checkpoint, in torch", "KL", f"{rounding['kl_nats']:.2e} nats", ""
    yield "", "top-1", f"{rounding['top1_agreement']:.1%}", ""
    yield "", _PERPLEXITY, f"{rounding['perplexity_ratio']:.4f}", ""


def _on_npu(seen: dict[str, Any]) -> Iterator[Row]:
    limits = seen["limits"]
    yield f"NPU ({seen['label']})", "KL to torch", *_kl(seen["to_torch"], limits["kl_nats"])
    yield "", "KL to the CPU", *_kl(seen["to_onnx_cpu"], limits["kl_nats"])
    gap, most = seen["worst_gap_nats"], limits["near_tie_nats"]
    yield "", "worst gap of a best token", f"{gap:.3f} nats", f"at most {most:g}"


def _kl(found: dict[str, Any], limit_nats: float) -> tuple[str, str]:
    return f"{found['kl_nats']:.2e} nats", f"at most {limit_nats:g}"


def _against_teacher(found: dict[str, Any]) -> Iterator[Row]:
    limits = found["limits"]
    kl, top1, ratio, perplexity = (
        Estimate(**found[name])
        for name in ("kl_nats", "top1_agreement", "perplexity_ratio", "perplexity")
    )
    layer = f"teacher {found['model']}, {found['n_positions']} positions"
    yield layer, "KL", f"{value_text(kl, 4)} nats", _limit("at most {:g}", limits["max_kl_nats"])
    floor = _limit("at least {:.2%}", limits["min_top1_agreement"])
    yield "", "top-1", percent_text(top1), floor
    ceiling = _limit("at most {:g}", limits["max_perplexity_ratio"])
    yield "", _PERPLEXITY, value_text(ratio, 4), ceiling
    yield "", "perplexity", value_text(perplexity, 3), ""


def _limit(text: str, limit: float | None) -> str:
    return "" if limit is None else text.format(limit)
