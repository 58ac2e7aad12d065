"""The five rows: was it worth it? Speed, size and quality of each model, side by side."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import DataError
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench import BenchResult
from edgekd.runtime.choices import Question, answer, grade
from edgekd.runtime.loading import LoadedModel, opened_model
from edgekd.runtime.reference import KlKind, Reference, record_teacher
from edgekd.runtime.text_quality import score_text, summarise
from edgekd.runtime.windows import cut_windows
from edgekd.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

_WINDOW_TOKENS = 256
COLUMNS = (
    *("row", "engine", "params", "file", "ms/token", "tokens/s", "peak memory", "J/token"),
    *("task", "perplexity", "KL to teacher", "top-1"),
)
N_TEXT_COLUMNS = 2
_QUALITY_CELLS = {
    "task_accuracy": ".0%",
    "perplexity": ".2f",
    "kl_nats": ".4f",
    "top1_agreement": ".1%",
}


@dataclass(frozen=True)
class QualityFigures:
    """How good a model is on held-out text, and how close to its teacher; None: not measured."""

    perplexity: float | None
    kl_nats: float | None
    """KL(teacher || model) per token."""
    top1_agreement: float | None
    n_positions: int
    task_accuracy: float | None
    """Share of questions answered right; None where none were asked."""
    n_questions: int
    standard_errors: dict[str, float] = field(default_factory=dict)
    """Of the fields above, by name, where they are known."""
    kl_kind: KlKind = "exact"
    """A reference pack knows only a lower bound."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    n_parameters: int | None
    """None where the file does not say."""
    quality: QualityFigures | None
    """None where nothing was asked."""
    speed: BenchResult

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {
            "row": self.name,
            "n_parameters": self.n_parameters,
            "quality": asdict(self.quality) if self.quality else None,
            "speed": self.speed.as_dict(),
        }


def measure_quality(
    teacher: Path,
    models: Sequence[Path],
    text: str,
    n_tokens: int,
    questions: Sequence[Question] = (),
    progress: Progress | None = None,
) -> dict[Path, QualityFigures]:
    """Return the quality of each of ``models`` against ``teacher`` on the start of ``text``.

    Raises:
        DataError: the text has fewer than ``n_tokens`` tokens.
    """
    with opened_model(teacher, context_tokens=_WINDOW_TOKENS) as loaded:
        windows = cut_windows(loaded.tokenizer, text, n_tokens, _WINDOW_TOKENS)
        if (found := len(loaded.tokenizer.encode(text, add_special=False))) < n_tokens:
            raise DataError(f"held-out text has {found} tokens, {n_tokens} are needed")
        reference = record_teacher(loaded, windows)
    figures = {}
    with closing(reference), (progress or Silence()).track("quality", len(models)) as advance:
        for number, path in enumerate(models, 1):
            with opened_model(path, context_tokens=_WINDOW_TOKENS) as loaded:
                figures[path] = _quality(loaded, reference, questions)
            advance(number, path.name)
    return figures


def _quality(
    loaded: LoadedModel, reference: Reference, questions: Sequence[Question]
) -> QualityFigures:
    found = summarise(score_text(loaded.engine, reference.windows, reference))
    assert found.to_teacher
    graded = grade(answer(loaded, questions)) if questions else None
    return QualityFigures(
        perplexity=found.perplexity.value,
        kl_nats=found.to_teacher.kl_nats.value,
        top1_agreement=found.to_teacher.top1_agreement.value,
        n_positions=found.n_positions,
        task_accuracy=graded.acc_tokens.value if graded else None,
        n_questions=len(questions),
    )


def figures_of(
    text: Mapping[str, Any] | None, asked: Mapping[str, Any] | None = None
) -> QualityFigures:
    """Return what tables and pictures show of a TextQuality and a ChoiceQuality as JSON values."""
    to_teacher = (text and text["to_teacher"]) or {}
    estimates: dict[str, Mapping[str, Any] | None] = {
        "perplexity": text["perplexity"] if text else None,
        "kl_nats": to_teacher.get("kl_nats"),
        "top1_agreement": to_teacher.get("top1_agreement"),
        "task_accuracy": asked["acc_tokens"] if asked else None,
    }
    values = {name: found["value"] if found else None for name, found in estimates.items()}
    return QualityFigures(
        **values,
        n_positions=text["n_positions"] if text else 0,
        n_questions=asked["n_questions"] if asked else 0,
        kl_kind=to_teacher.get("kl_kind", "exact"),
        standard_errors={
            name: found["standard_error"]
            for name, found in estimates.items()
            if found and found["standard_error"] is not None
        },
    )


def render_rows(rows: Sequence[Row]) -> "Table":
    """Return ``rows`` as a table for the terminal, with what could not be measured below."""
    shown = [row.as_dict() for row in rows]
    table = rows_table(shown)
    table.caption = "; ".join(energy_reasons(shown)) or None
    return table


def rows_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Return ``Row.as_dict()`` of every row as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="five rows, measured on this machine")
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if place < N_TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*map(escape, row_cells(row)))
    return table


def energy_reasons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why the energy of a row is not known, each reason once."""
    readings = [entry["energy_per_token"] for row in rows if (entry := first_decode(row["speed"]))]
    reasons = [reading["reason"] for reading in readings if reading["value"] is None]
    return [f"energy unavailable: {reason}" for reason in dict.fromkeys(reasons)]


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of ``Row.as_dict()`` under ``COLUMNS``, for every form of the table."""
    speed, n_parameters = row["speed"], row["n_parameters"]
    peak_bytes = speed["memory"]["peak_rss_bytes"]["value"]
    ms_per_token, tokens_per_s, joules = _decode_cells(first_decode(speed))
    return [
        row["row"],
        speed["engine"],
        "unknown" if n_parameters is None else format_count(n_parameters),
        format_bytes(speed["file_bytes"]),
        ms_per_token,
        tokens_per_s,
        "unknown" if peak_bytes is None else format_bytes(peak_bytes),
        joules,
        *_quality_cells(row["quality"] or {}),
    ]


def first_decode(speed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the first decode scenario of ``BenchResult.as_dict()``, if there is one."""
    return next((entry for entry in speed["scenarios"] if entry["kind"] == "decode"), None)


def _decode_cells(entry: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if entry is None:
        return ("not measured",) * 3
    rates, joules = entry["tokens_per_s"], entry["energy_per_token"]["value"]
    spread = "" if rates["stdev"] is None else f" \u00b1 {rates['stdev']:.1f}"
    return (
        f"{1000 / rates['mean']:.2f}",
        f"{rates['mean']:.1f}{spread}",
        "unavailable" if joules is None else f"{joules:.3f}",
    )


def _quality_cells(quality: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, shape in _QUALITY_CELLS.items():
        value = quality.get(name)
        is_bound = name == "kl_nats" and quality.get("kl_kind", "exact") != "exact"
        shown = "not asked" if value is None else format(value, shape)
        cells.append(f"\u2265 {shown}" if is_bound and value is not None else shown)
    return cells
