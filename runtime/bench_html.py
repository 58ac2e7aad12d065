"""A document of edgekd bench as one HTML file, with pictures of every figure in it."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.charts import Bar, Point, Series, bar_chart, line_chart
from edgekd.runtime.histograms import histogram_chart
from edgekd.units import format_bytes

_INTERVAL = "bars across: 95 % interval of the mean"


def bench_page(
    document: dict[str, Any],
    tables: Sequence[str],
    machine_lines: Sequence[str],
    warnings: Sequence[str],
) -> str:
    """Return the page of a benchmark; ``tables`` are HTML, the lines are text."""
    sections = [
        machine_section(document, machine_lines, warnings),
        *picture_sections(document, model_names(document)),
        page.section("All figures", *tables),
        versions_section(document),
    ]
    return page.whole_page("edgekd bench", document["created"], sections)


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
    settings = document["settings"]
    pairs = [
        ("machine", machine_lines[0]),
        *(("limits", entry.removeprefix("limits ")) for entry in machine_lines[1:]),
        ("threads", " / ".join(sorted({str(r["n_threads"]) for r in document["results"]}))),
        ("repetitions", str(settings["repetitions"])),
        ("order", document["order"]),
        ("measured", document["created"]),
        ("conditions", "valid" if document["valid"] else "INVALID"),
    ]
    return page.section("Machine and conditions", page.facts(pairs), page.notes(warnings))


def versions_section(document: dict[str, Any]) -> str:
    """Return versions and what each figure means."""
    return page.section(
        "Versions and definitions",
        page.facts(sorted(document["tools"].items())),
        page.folded(
            "What each figure means",
            page.facts(sorted(document["definitions"].items())),
        ),
    )


def picture_sections(document: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return speed, latency, memory and energy of the models, which are called ``names``."""
    results = document["results"]
    speed = [_decode_figure(results, names)]
    latency = [_first_token_figure(results, names), _gap_figure(results, names)]
    return [
        page.section("Speed", _grid([*speed, _prefill_figure(results, names)])),
        page.section("Latency", _grid(latency)),
        page.section(
            "Memory and energy", _grid([_memory(results, names), _energy(results, names)])
        ),
    ]


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _decode_figure(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title, note = "Decode speed", f"tokens per second, {_INTERVAL}"
    depths = {entry["n_depth"] for result in results for entry in _of_kind(result, "decode")}
    if len(depths) == 1:
        return page.figure(
            title, note, bar_chart(title, note, _rates(results, names, "decode"), "tokens/s")
        )
    series = _series(results, names, "decode", "n_depth", "tokens_per_s", 1.0)
    title = "Decode speed against depth"
    picture = line_chart(title, note, series, "tokens in the cache before", "tokens/s")
    return page.figure(title, note, picture, names)


def _prefill_figure(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title, note = "Prefill speed", f"tokens of the prompt per second, {_INTERVAL}"
    picture = bar_chart(title, note, _rates(results, names, "prefill"), "tokens/s")
    return page.figure(title, note, picture)


def _first_token_figure(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title, note = "Time to first token", f"from token ids to the first new id, {_INTERVAL}"
    flat = [
        {
            **r,
            "scenarios": [
                e for e in r["scenarios"] if e["n_depth"] == 0 or len(r["scenarios"]) < 3
            ],
        }
        for r in results
    ]
    series = _series(flat, names, "prefill", "n_tokens", "ttft_s", 1e3)
    picture = line_chart(title, note, series, "tokens of the prompt", "ms")
    return page.figure(title, note, picture, names)


def _gap_figure(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title = "Time between tokens"
    first = [_of_kind(result, "decode")[0] for result in results]
    note = f"every step of {first[0]['name']}; lines at p50, p95 and p99; heights by square root"
    samples = {
        name: [gap_s * 1e3 for run in entry["gaps_s"] for gap_s in run]
        for name, entry in zip(names, first, strict=True)
    }
    marks = {name: entry["gap_ms"] for name, entry in zip(names, first, strict=True)}
    return page.figure(title, note, histogram_chart(title, note, samples, marks, "ms"))


def _memory(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title = "Memory"
    note = "peak of the process, engine included; pale: the size of the file"
    bars = []
    for place, (name, result) in enumerate(zip(names, results, strict=True)):
        peak = result["memory"]["peak_rss_bytes"]
        shown = "unavailable" if peak["value"] is None else format_bytes(peak["value"])
        bars.append(Bar(name, (peak["value"] or 0) / 1e6, shown, place))
        size = result["file_bytes"]
        bars.append(Bar("file", size / 1e6, format_bytes(size), place, is_faint=True))
    return page.figure(title, note, bar_chart(title, note, bars, "MB"))


def _energy(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    title, note = "Energy of a token", "package energy while decoding, idle draw included"
    readings = [_of_kind(result, "decode")[0]["energy_per_token"] for result in results]
    lines = sorted(
        {f"energy unavailable: {one['reason']}" for one in readings if one["value"] is None}
    )
    bars = [
        Bar(name, one["value"], f"{one['value']:.3g} J", place)
        for place, (name, one) in enumerate(zip(names, readings, strict=True))
        if one["value"] is not None
    ]
    picture = bar_chart(title, note, bars, "J/token") if bars else ""
    return page.figure(title, note, picture + (page.notes(lines) if lines else ""))


def _rates(results: Sequence[dict[str, Any]], names: Sequence[str], kind: str) -> list[Bar]:
    several = any(len(_of_kind(result, kind)) > 1 for result in results)
    return [
        Bar(
            f"{name[:14]} {entry['name']}" if several else name,
            entry["tokens_per_s"]["mean"],
            f"{entry['tokens_per_s']['mean']:.1f}",
            place,
            _interval(entry["tokens_per_s"]),
        )
        for place, (name, result) in enumerate(zip(names, results, strict=True))
        for entry in _of_kind(result, kind)
    ]


def _series(
    results: Sequence[dict[str, Any]],
    names: Sequence[str],
    kind: str,
    x_field: str,
    y_field: str,
    factor: float,
) -> list[Series]:
    found = []
    for name, result in zip(names, results, strict=True):
        entries = sorted(_of_kind(result, kind), key=lambda entry: entry[x_field])
        points = tuple(
            Point(
                entry[x_field],
                entry[y_field]["mean"] * factor,
                _interval(entry[y_field], factor),
                name=f"{name}, {entry['name']}: {entry[y_field]['mean'] * factor:.4g}",
            )
            for entry in entries
        )
        found.append(Series(name, points))
    return found


def _of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in result["scenarios"] if entry["kind"] == kind]


def _interval(summary: dict[str, Any], factor: float = 1.0) -> tuple[float, float] | None:
    if summary["ci95"] is None:
        return None
    low, high = summary["ci95"]
    return max(0.0, low * factor), high * factor
