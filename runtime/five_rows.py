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
from edgekd.runtime.reference import Reference, record_teacher
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


def render_rows(rows: Sequence[Row]) -> "Table":
    """Return ``rows`` as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    energy = rows[0].speed.energy_per_token
    caption = None if energy.value is not None else f"energy unavailable: {energy.reason}"
    table = Table(title="five rows, measured on this machine", caption=caption)
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if place < N_TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*map(escape, row_cells(row.as_dict())))
    return table


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of ``Row.as_dict()`` under ``COLUMNS``, for every form of the table."""
    speed, quality = row["speed"], row["quality"] or {}
    entry = next(entry for entry in speed["scenarios"] if entry["kind"] == "decode")
    decode, joules = entry["tokens_per_s"], entry["energy_per_token"]["value"]
    n_parameters, peak_bytes = row["n_parameters"], speed["memory"]["peak_rss_bytes"]["value"]
    return [
        row["row"],
        speed["engine"],
        "unknown" if n_parameters is None else format_count(n_parameters),
        format_bytes(speed["file_bytes"]),
        f"{1000 / decode['mean']:.2f}",
        f"{decode['mean']:.1f} \u00b1 {decode['stdev'] or 0:.1f}",
        "unknown" if peak_bytes is None else format_bytes(peak_bytes),
        "unavailable" if joules is None else f"{joules:.3f}",
        *(
            "not asked" if (value := quality.get(name)) is None else format(value, shape)
            for name, shape in _QUALITY_CELLS.items()
        ),
    ]
