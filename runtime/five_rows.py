"""The five rows: was it worth it? Speed, size and quality of each model, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import DataError
from edgekd.runtime.bench import BenchResult
from edgekd.runtime.fidelity import kl_per_token, log_softmax
from edgekd.runtime.loading import open_model
from edgekd.units import format_bytes

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


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    quality: QualityFigures
    speed: BenchResult


def measure_quality(
    teacher: Path, models: Sequence[Path], text: str, n_tokens: int
) -> dict[Path, QualityFigures]:
    """Return the quality of each of ``models`` against ``teacher`` on the start of ``text``.

    Raises:
        DataError: the text has fewer than ``n_tokens`` tokens.
    """
    reference = open_model(teacher, context_tokens=_WINDOW_TOKENS)
    ids = reference.tokenizer.encode(text)[:n_tokens]
    if len(ids) < n_tokens:
        raise DataError(f"held-out text has {len(ids)} tokens, {n_tokens} are needed")
    windows = [ids[i : i + _WINDOW_TOKENS] for i in range(0, n_tokens, _WINDOW_TOKENS)]
    references = []
    for window in windows:
        reference.engine.rewind()
        references.append(reference.engine.forward(window, every_logit=True))
    reference.engine.close()
    figures = {}
    for path in models:
        loaded = open_model(path, context_tokens=_WINDOW_TOKENS)
        kl_sum = nll_sum = 0.0
        n_same = n_predicted = 0
        for window, reference_logits in zip(windows, references, strict=True):
            loaded.engine.rewind()
            model_TV = log_softmax(loaded.engine.forward(window, every_logit=True))
            teacher_TV = log_softmax(reference_logits)
            kl_sum += float(kl_per_token(teacher_TV, model_TV).sum())
            n_same += int((teacher_TV.argmax(-1) == model_TV.argmax(-1)).sum())
            nll_sum -= sum(float(model_TV[i, token]) for i, token in enumerate(window[1:]))
            n_predicted += len(window) - 1
        loaded.engine.close()
        figures[path] = QualityFigures(
            math.exp(nll_sum / n_predicted), kl_sum / n_tokens, n_same / n_tokens, n_tokens
        )
    return figures


def render_rows(rows: Sequence[Row]) -> "Table":
    """Return ``rows`` as a table for the terminal."""
    from rich.table import Table

    table = Table(title="five rows, measured on this machine")
    for column in ("row", "engine", "file", "ms/token", "tokens/s", "peak memory"):
        table.add_column(column, justify="left" if column in ("row", "engine") else "right")
    for column in ("perplexity", "KL to teacher", "top-1"):
        table.add_column(column, justify="right")
    for row in rows:
        speed, quality = row.speed, row.quality
        decode = speed.decode_tokens_per_s
        table.add_row(
            row.name,
            speed.engine,
            format_bytes(speed.file_bytes),
            f"{1000 / decode.mean:.2f}",
            f"{decode.mean:.1f} \u00b1 {decode.stdev or 0:.1f}",
            format_bytes(speed.peak_rss_bytes),
            f"{quality.perplexity:.2f}",
            f"{quality.kl_nats:.4f}",
            f"{quality.top1_agreement:.1%}",
        )
    return table
