"""Is NEW slower than BASE? The ratio of two measurements with its interval, and a verdict.

A regression is called only where the whole interval lies beyond the limit, and "within limits"
only where none of it does; anything else is inconclusive, which asks for more repetitions.
Models that took turns in one run are compared pair by pair. Quality is compared beside it, where
both have it on the same text.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from edgekd.errors import DataError
from edgekd.runtime.bench_result import SCHEMA
from edgekd.runtime.compare_quality import (
    QUALITY_NAMES,
    MeasuredQuality,
    QualityCompared,
    compare_quality,
    quality_notes,
    read_quality,
)
from edgekd.runtime.llama_bench_rows import PHONE_SCHEMA, parse_rows, samples_of, scenario_of
from edgekd.runtime.stats import Ratio, paired_ratio, unpaired_ratio
from edgekd.untrusted import parse_json

Verdict = Literal["within limits", "regression", "inconclusive"]
EXIT_CODES: dict[Verdict, int] = {"within limits": 0, "regression": 1, "inconclusive": 3}
_VOLATILE = {"memory_available_bytes"}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model of a file, whoever wrote it."""

    source: str
    model: str
    samples_s: dict[str, list[float]]
    """Scenario to the seconds of each repetition."""
    machine: dict[str, Any]
    tools: dict[str, Any]
    invalid_reasons: list[str]
    peak_rss_bytes: float | None = None
    takes_turns: bool = False
    quality: MeasuredQuality | None = None
    """None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One scenario of two models."""

    base: str
    new: str
    scenario: str
    speed_ratio: Ratio | None
    """New over base in tokens/s; None where there are too few samples."""
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All scenarios, what else differs, and the verdict over all."""

    max_regress: float
    compared: list[Compared]
    differences: list[str]
    invalid_reasons: list[str]
    verdict: Verdict
    """On speed."""
    quality: list[QualityCompared] = field(default_factory=list)
    quality_notes: list[str] = field(default_factory=list)
    """Why quality, or a part of it, was not compared."""

    @property
    def worse_quality(self) -> list[str]:
        """Return the names of the figures of quality that got worse beyond their error."""
        worse = (QUALITY_NAMES[one.figure] for one in self.quality if one.verdict == "worse")
        return list(dict.fromkeys(worse))

    @property
    def exit_code(self) -> int:
        """Return 0 within limits, 1 for a regression, 3 where it is inconclusive."""
        return EXIT_CODES[self.verdict]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "schema": "edgekd.bench-compare/1",
            **asdict(self),
            "worse_quality": self.worse_quality,
            "exit_code": self.exit_code,
        }


def compare(base: str, new: str, max_regress: float) -> Comparison:
    """Return how NEW differs from BASE, each ``FILE`` or ``FILE#MODEL``.

    Raises:
        DataError: a file cannot be read, or there is nothing to compare.
    """
    pairs = _pair(read_measured(base), read_measured(new))
    compared = [
        _compare_scenario(one, other, name, max_regress)
        for one, other in pairs
        for name in one.samples_s
        if name in other.samples_s
    ]
    if not compared:
        names = [
            sorted({n for m in side for n in m.samples_s}) for side in zip(*pairs, strict=True)
        ]
        raise DataError(f"no scenario in common: {names[0]} against {names[1]}; run the same ones")
    reasons = sorted(
        {
            f"{entry.source}: {reason}"
            for pair in pairs
            for entry in pair
            for reason in entry.invalid_reasons
        }
    )
    return Comparison(
        max_regress=max_regress,
        compared=compared,
        differences=[line for pair in pairs for line in _differences(*pair)],
        quality=[
            found for one, other in pairs for found in compare_quality(one.quality, other.quality)
        ],
        quality_notes=[
            note for one, other in pairs for note in quality_notes(one.quality, other.quality)
        ],
        invalid_reasons=reasons,
        verdict="inconclusive" if reasons else overall([entry.verdict for entry in compared]),
    )


def judge_ratio(ratio: Ratio | None, max_regress: float) -> Verdict:
    """Return the verdict on a ratio of speeds, new over base."""
    limit = 1 - max_regress
    if ratio is None:
        return "inconclusive"
    if ratio.high < limit:
        return "regression"
    return "within limits" if ratio.low >= limit else "inconclusive"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst verdict: one regression is one, whatever the rest says."""
    for verdict in ("regression", "inconclusive"):
        if verdict in verdicts:
            return verdict
    return "within limits"


def read_measured(place: str) -> list[Measured]:
    """Return the models in ``FILE`` or the one of ``FILE#MODEL``, by name, path or number.

    Raises:
        DataError: the file is no result of edgekd or llama-bench, or has no such model.
    """
    file, _, wanted = place.partition("#")
    found = _read(Path(file))
    if not wanted:
        return found
    if wanted.isdigit() and int(wanted) < len(found):
        return [found[int(wanted)]]
    chosen = [m for m in found if wanted in (m.model, PurePath(m.model).name)]
    if len(chosen) != 1:
        names = ", ".join(f"{n}: {m.model}" for n, m in enumerate(found))
        raise DataError(f"{file} has not one model {wanted!r}; it holds {names}")
    return chosen


def _read(path: Path) -> list[Measured]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if (rows := parse_rows(text)) is not None:
        return _from_rows(path, rows)
    try:
        document = parse_json(text)
        schema = document["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no result of edgekd bench -o json or llama-bench -o json: {error!r}"
        ) from error
    if schema == PHONE_SCHEMA:
        return _from_phone(path, document)
    if schema != SCHEMA:
        raise DataError(f"{path} has the schema {schema}, this edgekd reads {SCHEMA}")
    return _from_document(path, document)


def _from_document(path: Path, document: dict[str, Any]) -> list[Measured]:
    try:
        return [
            Measured(
                source=str(path),
                model=result["model"],
                samples_s={s["name"]: s["samples_s"] for s in result["scenarios"]},
                machine=document["machine"],
                tools={**document["tools"], "n_threads": result["n_threads"]},
                invalid_reasons=result["invalid_reasons"],
                peak_rss_bytes=result["memory"]["peak_rss_bytes"]["value"],
                takes_turns=document["order"] == "interleaved",
                quality=read_quality(document, result),
            )
            for result in document["results"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is cut short or changed: it has no {error}") from error


def _from_phone(path: Path, document: dict[str, Any]) -> list[Measured]:
    try:
        rows, reasons = document["rows"], document["invalid_reasons"]
        machine = document["machine"]
    except KeyError as error:
        raise DataError(f"{path} is cut short or changed: it has no {error}") from error
    found = _from_rows(path, rows)
    return [replace(entry, machine=machine, invalid_reasons=reasons) for entry in found]


def _from_rows(path: Path, rows: list[dict[str, Any]]) -> list[Measured]:
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault(row.get("model_filename", "?"), []).append(row)
    return [
        Measured(
            source=str(path),
            model=name,
            samples_s={scenario_of(row).name: samples_of(row) for row in mine},
            machine={"processor": mine[0].get("cpu_info")},
            tools={k: mine[0].get(k) for k in ("build_commit", "n_threads")},
            invalid_reasons=[],
        )
        for name, mine in models.items()
    ]


def _pair(base: list[Measured], new: list[Measured]) -> list[tuple[Measured, Measured]]:
    if len(base) == len(new) == 1:
        return [(base[0], new[0])]
    named = {PurePath(entry.model).name: entry for entry in new}
    pairs = [(m, named[n]) for m in base if (n := PurePath(m.model).name) in named]
    if not pairs:
        raise DataError(
            "no model of the same name on both sides; choose one of each with FILE#MODEL: "
            f"{[m.model for m in base]} and {[m.model for m in new]}"
        )
    return pairs


def _compare_scenario(base: Measured, new: Measured, name: str, max_regress: float) -> Compared:
    before_s, after_s = base.samples_s[name], new.samples_s[name]
    in_turns = base.takes_turns and base.source == new.source and len(before_s) == len(after_s)
    # The ratio of speeds is the inverse one of times.
    ratio = (paired_ratio if in_turns else unpaired_ratio)(after_s, before_s)
    return Compared(
        base=base.model,
        new=new.model,
        scenario=name,
        speed_ratio=ratio,
        verdict=judge_ratio(ratio, max_regress),
    )


def _differences(base: Measured, new: Measured) -> list[str]:
    """Return what differs in machine, versions and memory, one line each."""
    lines = []
    for one, other in ((base.machine, new.machine), (base.tools, new.tools)):
        for name in sorted((one.keys() & other.keys()) - _VOLATILE):
            if one[name] != other[name]:
                lines.append(f"{name}: {one[name]} -> {other[name]}")
    before, after = base.peak_rss_bytes, new.peak_rss_bytes
    if before and after and before != after:
        lines.append(f"peak memory: {after / before - 1:+.1%}")
    return lines
