"""A document of edgekd bench as one HTML file, with pictures of every figure in it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.charts import Bar, Point, Series, bar_chart, line_chart
from edgekd.runtime.five_rows import figures_of, first_decode
from edgekd.runtime.histograms import histogram_chart
from edgekd.runtime.quality_figures import bench_quality_lines
from edgekd.runtime.trade_offs import trade_offs
from edgekd.units import format_bytes

_INTERVAL = "whiskers: 95 % interval of the mean"

Results = Sequence[dict[str, Any]]


def bench_page(
    document: dict[str, Any],
    tables: Sequence[str],
    machine_lines: Sequence[str],
    warnings: Sequence[str],
) -> str:
    """Return the page of a benchmark; ``tables`` are HTML, the lines are text."""
    names = model_names(document)
    sections = [
        machine_section(document, machine_lines, warnings),
        *_quality_section(document, names),
        *picture_sections(document, names),
        page.section("All figures", *tables),
        versions_section(document),
    ]
    return page.whole_page("edgekd bench", document["created"], sections)


def _quality_section(document: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return quality against size and speed, where it was measured."""
    if not (lines := bench_quality_lines(document)):
        return []
    rows = [
        {"row": name, "speed": result, "quality": asdict(figures_of(result.get("quality")))}
        for name, result in zip(names, document["results"], strict=True)
    ]
    return [page.section("What quality costs", *trade_offs(rows, "model"), page.notes(lines))]


def model_names(document: dict[str, Any]) -> list[str]:
    """Return a name for each model that no other has."""
    names = [PurePath(result["model"]).name or result["model"] for result in document["results"]]
    return [
        name if names.count(name) == 1 else f"{number}: {name}"
        for number, name in enumerate(names, 1)
    ]


def machine_section(
    document: dict[str, Any], machine_lines: Sequence[str], warnings: Sequence[str]
) -> str:
    """Return what was measured on, how, and what spoils it."""
    settings, machine = document["settings"], document["machine"]
    memory_bytes = machine.get("memory_bytes")
    pairs = [
        ("machine", machine_lines[0]),
        ("memory", format_bytes(memory_bytes) if memory_bytes else "unknown"),
        ("system", machine.get("system") or "unknown"),
        *(("limits", entry.removeprefix("limits ")) for entry in machine_lines[1:]),
        ("threads", " / ".join(sorted({str(r["n_threads"]) for r in document["results"]}))),
        ("repetitions", str(settings["repetitions"])),
        ("order", document["order"]),
        ("conditions", "valid" if document["valid"] else "INVALID"),
    ]
    spoilt = [] if document["valid"] else [page.alert("Do not rely on these figures: see below.")]
    return page.section("Machine and conditions", *spoilt, page.facts(pairs), page.notes(warnings))


def versions_section(document: dict[str, Any]) -> str:
    """Return versions and what each figure means."""
    machine = document["machine"]
    versions = document["tools"] | {
        name: machine[name] for name in ("python", "kernel") if machine.get(name)
    }
    return page.section(
        "Versions and definitions",
        page.facts(sorted(versions.items())),
        page.folded(
            "What each figure means",
            page.facts(sorted(document["definitions"].items())),
        ),
    )


def picture_sections(document: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return speed, latency, memory and energy of the models, which are called ``names``."""
    results = document["results"]
    speed = _decode_figure(results, names), _prefill_figure(results, names)
    latency = _first_token_figure(results, names), _gap_figure(results, names)
    cost = _memory_figure(results, names), _energy_figure(results, names)
    return [
        page.section("Speed", page.grid(speed)),
        page.section("Latency", page.grid(latency)),
        page.section("Memory and energy", page.grid(cost)),
    ]


def _decode_figure(results: Results, names: Sequence[str]) -> str:
    depths = {entry["n_depth"] for result in results for entry in _of_kind(result, "decode")}
    if len(depths) < 2:
        return _bars_figure("Decode speed", "tokens per second", results, names, "decode")
    title, note = "Decode speed against depth", f"tokens per second; {_INTERVAL}"
    series = [
        Series(name, _points(name, _of_kind(result, "decode"), "n_depth", "tokens_per_s", 1.0))
        for name, result in zip(names, results, strict=True)
    ]
    picture = line_chart(title, note, series, "tokens in the cache before", "tokens/s")
    return page.figure(title, note, picture, names)


def _prefill_figure(results: Results, names: Sequence[str]) -> str:
    what = "tokens of the prompt per second"
    return _bars_figure("Prefill speed", what, results, names, "prefill")


def _bars_figure(title: str, what: str, results: Results, names: Sequence[str], kind: str) -> str:
    bars = [
        Bar(
            entry["name"],
            entry["tokens_per_s"]["mean"],
            f"{entry['tokens_per_s']['mean']:.1f}",
            place,
            _interval(entry["tokens_per_s"]),
            group=name,
        )
        for place, (name, result) in enumerate(zip(names, results, strict=True))
        for entry in _of_kind(result, kind)
    ]
    if not bars:
        return page.figure(title, what, page.nothing(f"No {kind} was measured."))
    note = f"{what}; {_INTERVAL}"
    return page.figure(title, note, bar_chart(title, note, bars, "tokens/s"))


def _first_token_figure(results: Results, names: Sequence[str]) -> str:
    title = "Time to first token"
    note = f"from token ids to the first new id; {_INTERVAL}"
    series = [
        Series(name, _points(name, _shallowest(result), "n_tokens", "ttft_s", 1e3))
        for name, result in zip(names, results, strict=True)
    ]
    if not any(one.points for one in series):
        return page.figure(title, note, page.nothing("No prefill was measured."))
    picture = line_chart(title, note, series, "tokens of the prompt", "ms")
    return page.figure(title, note, picture, names)


def _shallowest(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the prefills behind the fewest tokens: only the prompt's length differs in them."""
    entries = _of_kind(result, "prefill")
    depth = min((entry["n_depth"] for entry in entries), default=0)
    return [entry for entry in entries if entry["n_depth"] == depth]


def _gap_figure(results: Results, names: Sequence[str]) -> str:
    title = "Time between tokens"
    first = {
        name: entry
        for name, result in zip(names, results, strict=True)
        if (entry := first_decode(result))
    }
    if not first:
        return page.figure(title, "", page.nothing("No decode was measured."))
    tests = ", ".join(dict.fromkeys(entry["name"] for entry in first.values()))
    note = f"every step of {tests}; lines at p50, p95 and p99; heights by square root"
    samples = {
        name: [gap_s * 1e3 for run in entry["gaps_s"] for gap_s in run]
        for name, entry in first.items()
    }
    marks = {name: entry["gap_ms"] or {} for name, entry in first.items()}
    return page.figure(title, note, histogram_chart(title, note, samples, marks, "ms"))


def _memory_figure(results: Results, names: Sequence[str]) -> str:
    title, note = "Memory", "peak of the process, engine included; pale: the size of the file"
    bars = []
    for place, (name, result) in enumerate(zip(names, results, strict=True)):
        peak_bytes, file_bytes = result["memory"]["peak_rss_bytes"]["value"], result["file_bytes"]
        shown = "unavailable" if peak_bytes is None else format_bytes(peak_bytes)
        bars.append(Bar("peak", (peak_bytes or 0) / 1e6, shown, place, group=name))
        shown = format_bytes(file_bytes)
        bars.append(Bar("file", file_bytes / 1e6, shown, place, is_faint=True, group=name))
    return page.figure(title, note, bar_chart(title, note, bars, "MB"))


def _energy_figure(results: Results, names: Sequence[str]) -> str:
    title, note = "Energy of a token", "package energy while decoding, idle draw included"
    bars, reasons = [], []
    for place, (name, result) in enumerate(zip(names, results, strict=True)):
        if (entry := first_decode(result)) is None:
            continue
        reading = entry["energy_per_token"]
        if reading["value"] is None:
            reasons.append(f"Unavailable: {reading['reason']}.")
        else:
            bars.append(Bar(name, reading["value"], f"{reading['value']:.3g} J", place))
    picture = bar_chart(title, note, bars, "J/token") if bars else ""
    if not bars and not reasons:
        reasons = ["No decode was measured."]
    return page.figure(title, note, picture + "".join(map(page.nothing, dict.fromkeys(reasons))))


def _points(
    name: str, entries: Sequence[dict[str, Any]], x_field: str, y_field: str, factor: float
) -> tuple[Point, ...]:
    return tuple(
        Point(
            entry[x_field],
            entry[y_field]["mean"] * factor,
            _interval(entry[y_field], factor),
            name=f"{name}, {entry['name']}: {entry[y_field]['mean'] * factor:.4g}",
        )
        for entry in sorted(entries, key=lambda entry: int(entry[x_field]))
    )


def _of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in result["scenarios"] if entry["kind"] == kind]


def _interval(summary: dict[str, Any], factor: float = 1.0) -> tuple[float, float] | None:
    if summary["ci95"] is None:
        return None
    low, high = summary["ci95"]
    return max(0.0, low * factor), high * factor
