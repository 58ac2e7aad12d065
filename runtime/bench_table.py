"""Bench results as a table for people; the JSON of a result says more."""

from collections.abc import Iterable
from pathlib import PurePath

from rich.markup import escape
from rich.table import Table

from edgekd.runtime.bench import BenchResult
from edgekd.runtime.stats import Summary
from edgekd.units import format_bytes, format_duration

_COLUMNS = (
    "engine",
    "size",
    "load",
    "TTFT",
    "prefill tok/s",
    "decode tok/s",
    "ms/token p50 / p95 / p99",
    "peak memory",
)


def render_table(results: Iterable[BenchResult]) -> Table:
    """Return one row for each of ``results``; ``±`` is the standard deviation."""
    table = Table()
    table.add_column("model", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "engine" else "right")
    for result in results:
        table.add_row(*_row(result))
    return table


def _row(result: BenchResult) -> list[str]:
    gaps_ms = result.ms_per_token
    return [
        escape(PurePath(result.model).name),
        result.engine,
        format_bytes(result.file_bytes),
        format_duration(result.load_s),
        f"{result.ttft_s.median * 1e3:.0f} ms",
        _with_spread(result.prefill_tokens_per_s),
        _with_spread(result.decode_tokens_per_s),
        " / ".join(f"{gaps_ms[p]:.1f}" for p in ("p50", "p95", "p99")),
        format_bytes(result.peak_rss_bytes),
    ]


def _with_spread(summary: Summary) -> str:
    if summary.stdev is None:
        return f"{summary.mean:.1f}"
    return f"{summary.mean:.1f} ± {summary.stdev:.1f}"
