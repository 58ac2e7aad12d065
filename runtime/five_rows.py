"""The five rows: was it worth it? Speed, size and quality of each model, side by side."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class QualityFigures:
    """How good a model is on held-out text, and how close to its teacher."""

    perplexity: float
    kl_nats: float
    """KL(teacher || model) per token."""
    top1_agreement: float
    n_positions: int
    task_accuracy: float | None
    """Share of questions answered right; None where none were asked."""
    n_questions: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    n_parameters: int
    quality: QualityFigures
    speed: BenchResult

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return {
            "row": self.name,
            "n_parameters": self.n_parameters,
            "quality": asdict(self.quality),
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
    from rich.table import Table

    energy = rows[0].speed.energy_per_token
    caption = None if energy.value is not None else f"energy unavailable: {energy.reason}"
    table = Table(title="five rows, measured on this machine", caption=caption)
    for column in ("row", "engine"):
        table.add_column(column)
    for column in ("params", "file", "ms/token", "tokens/s", "peak memory", "J/token"):
        table.add_column(column, justify="right")
    for column in ("task", "perplexity", "KL to teacher", "top-1"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    speed, quality = row.speed, row.quality
    decode, joules = speed.decode_tokens_per_s, speed.energy_per_token.value
    task = quality.task_accuracy
    return [
        row.name,
        speed.engine,
        format_count(row.n_parameters),
        format_bytes(speed.file_bytes),
        f"{1000 / decode.mean:.2f}",
        f"{decode.mean:.1f} \u00b1 {decode.stdev or 0:.1f}",
        format_bytes(speed.peak_rss_bytes),
        "unavailable" if joules is None else f"{joules:.3f}",
        "not asked" if task is None else f"{task:.0%}",
        f"{quality.perplexity:.2f}",
        f"{quality.kl_nats:.4f}",
        f"{quality.top1_agreement:.1%}",
    ]
