"""Quality in the documents of edgekd bench and edgekd report: cells, columns, lines of text."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from edgekd.runtime.estimated import Estimate, percent_text, value_text

QUALITY_COLUMNS = (
    *("model", "engine", "perplexity", "/ teacher's", "KL to teacher, nats", "top-1"),
    *("\u0394p mean", "\u0394p RMS"),
)
_TO_TEACHER = ("kl_nats", "top1_agreement", "delta_p_mean", "delta_p_rms")
_NO_TEACHER = "no teacher"


def quality_rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells under ``QUALITY_COLUMNS`` of each model whose quality was measured."""
    return [
        (PurePath(result["model"]).name, result["engine"], *_cells(quality))
        for result in document["results"]
        if (quality := result.get("quality"))
    ]


def bench_quality_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what the quality in a document of edgekd bench was measured on; none without one."""
    qualities = [one for result in document["results"] if (one := result.get("quality"))]
    settings = document.get("quality_settings")
    if settings is None:
        return []
    return text_lines(settings, document["quality_reference"], qualities)


def text_lines(
    settings: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    qualities: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Return what text was predicted, and what the models were compared with."""
    n_positions = max((one["n_positions"] for one in qualities), default=0)
    lines = []
    if n_positions:
        source = settings["text"] or settings["reference"]
        lines.append(f"text: {n_positions} tokens predicted, of {PurePath(source).name}")
    if reference:
        compared = PurePath(reference["teacher"]).name
        bound = " through a pack, so KL is a lower bound" if "pack" in reference else ""
        lines.append(f"KL and top-1: to {compared}{bound}")
    return lines


def quality_columns(quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the figures for one line of CSV, each with its standard error; None: not measured."""
    to_teacher = (quality and quality["to_teacher"]) or {}
    estimates = {
        "perplexity": quality["perplexity"] if quality else None,
        **{name: to_teacher.get(name) for name in _TO_TEACHER},
    }
    columns: dict[str, Any] = {}
    for name, found in estimates.items():
        columns[name] = found["value"] if found else None
        columns[f"{name}_standard_error"] = found["standard_error"] if found else None
    return columns | {"kl_kind": to_teacher.get("kl_kind")}


def _cells(quality: Mapping[str, Any]) -> tuple[str, ...]:
    perplexity = value_text(Estimate(**quality["perplexity"]), 3)
    to_teacher = quality["to_teacher"]
    if to_teacher is None:
        return perplexity, *[_NO_TEACHER] * (1 + len(_TO_TEACHER))
    bound = "" if to_teacher["kl_kind"] == "exact" else "\u2265 "
    return (
        perplexity,
        value_text(Estimate(**to_teacher["perplexity_ratio"]), 4),
        bound + value_text(Estimate(**to_teacher["kl_nats"]), 5),
        *(percent_text(Estimate(**to_teacher[name])) for name in _TO_TEACHER[1:]),
    )
