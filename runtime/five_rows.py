"""The five rows: was it worth it? Speed, size and quality of each model, side by side."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import DataError
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench import BenchResult
from edgekd.runtime.choices import Question, accuracy
from edgekd.runtime.fidelity import kl_per_token, log_softmax
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.table import Table

    from edgekd.runtime.engine import Logits

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
    with _opened(teacher) as reference:
        ids = reference.tokenizer.encode(text)[:n_tokens]
        if len(ids) < n_tokens:
            raise DataError(f"held-out text has {len(ids)} tokens, {n_tokens} are needed")
        windows = [ids[i : i + _WINDOW_TOKENS] for i in range(0, n_tokens, _WINDOW_TOKENS)]
        references = [_logits(reference, window) for window in windows]
    figures = {}
    with (progress or Silence()).track("quality", len(models)) as advance:
        for number, path in enumerate(models, 1):
            with _opened(path) as loaded:
                figures[path] = _quality(loaded, windows, references, questions)
            advance(number, path.name)
    return figures


def _quality(
    loaded: LoadedModel,
    windows: Sequence[Sequence[int]],
    references: Sequence["Logits"],
    questions: Sequence[Question],
) -> QualityFigures:
    kl_sum = nll_sum = 0.0
    n_same = n_predicted = 0
    for window, reference_TV in zip(windows, references, strict=True):
        model_TV = log_softmax(_logits(loaded, window))
        teacher_TV = log_softmax(reference_TV)
        kl_sum += float(kl_per_token(teacher_TV, model_TV).sum())
        n_same += int((teacher_TV.argmax(-1) == model_TV.argmax(-1)).sum())
        nll_sum -= sum(float(model_TV[i, token]) for i, token in enumerate(window[1:]))
        n_predicted += len(window) - 1
    n_positions = sum(map(len, windows))
    return QualityFigures(
        perplexity=math.exp(nll_sum / n_predicted),
        kl_nats=kl_sum / n_positions,
        top1_agreement=n_same / n_positions,
        n_positions=n_positions,
        task_accuracy=accuracy(loaded, questions) if questions else None,
        n_questions=len(questions),
    )


def _logits(loaded: LoadedModel, window: Sequence[int]) -> "Logits":
    loaded.engine.rewind()
    return loaded.engine.forward(window, every_logit=True)


@contextmanager
def _opened(path: Path) -> Iterator[LoadedModel]:
    loaded = open_model(path, context_tokens=_WINDOW_TOKENS)
    try:
        yield loaded
    finally:
        loaded.engine.close()


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
