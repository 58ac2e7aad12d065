"""``edgekd report``: the five rows for models of the user's own, and the document that holds them.

Speed is measured as ``edgekd bench`` does it, quality as ``edgekd eval`` does it; the models are
the files that ship. A row without a model is left out, and the report says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgekd.progress import Progress, Silence
from edgekd.runtime.bench import run_bench
from edgekd.runtime.bench_result import BenchRun
from edgekd.runtime.evaluate import EvalOptions, Evaluation, ModelQuality, evaluate
from edgekd.runtime.five_rows import QualityFigures, Row, figures_of
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import locate_model
from edgekd.runtime.report_settings import ROWS, ReportSettings

SCHEMA = "edgekd.report/1"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows, and all that was measured for them."""

    rows: list[Row]
    missing: dict[str, str]
    """Why a row is left out, by its name."""
    run: BenchRun
    evaluation: Evaluation | None

    def as_dict(self) -> dict[str, Any]:
        """Return the document; a row names its place among the results of the benchmark."""
        found = self.evaluation
        return {
            "schema": SCHEMA,
            "rows": [
                {
                    "row": row.name,
                    "n_parameters": row.n_parameters,
                    "quality": asdict(row.quality) if row.quality else None,
                    "result": place,
                }
                for place, row in enumerate(self.rows)
            ],
            "missing": self.missing,
            "quality_settings": found.settings if found else None,
            "quality_reference": found.reference if found else None,
            "bench": self.run.as_dict(),
        }


def measure_report(settings: ReportSettings, progress: Progress | None = None) -> Report:
    """Measure every row that has a model.

    Raises:
        RecipeError: the settings contradict each other.
        ModelError, EngineError, VocabularyError, DataError: a model or a text cannot be used.
    """
    progress = progress or Silence()
    given = [(name, settings.models[key]) for key, name in ROWS.items() if key in settings.models]
    located = [locate_model(model) for _, model in given]
    paths = [str(path) for _, path in located]
    evaluation = _evaluate(paths, settings, progress)
    run = run_bench(paths, settings.bench, progress)
    measured: Sequence[ModelQuality | None] = (
        evaluation.models if evaluation else [None] * len(paths)
    )
    rows = []
    for place, (kind, path) in enumerate(located):
        count = read_facts(kind, path).n_parameters.value
        quality = measured[place]
        figures = quality_figures(quality) if quality else None
        n_parameters = None if count is None else int(count)
        rows.append(Row(given[place][0], n_parameters, figures, run.results[place]))
    missing = {
        name: f"no --{key} was given" for key, name in ROWS.items() if key not in settings.models
    }
    return Report(rows=rows, missing=missing, run=run, evaluation=evaluation)


def _evaluate(
    paths: Sequence[str], settings: ReportSettings, progress: Progress
) -> Evaluation | None:
    if not (settings.text or settings.reference or settings.questions):
        return None
    is_compared = settings.text is not None and settings.reference is None
    options = EvalOptions(
        teacher=settings.models.get("teacher") if is_compared else None,
        reference=settings.reference,
        text=settings.text,
        questions=settings.questions,
        n_tokens=settings.n_tokens,
        n_questions=settings.n_questions,
        n_threads=settings.bench.n_threads,
    )
    return evaluate(paths, options, progress)


def quality_figures(quality: ModelQuality) -> QualityFigures:
    """Return what the table shows of ``quality``, with standard errors."""
    text, asked = quality.text, quality.questions
    return figures_of(asdict(text) if text else None, asdict(asked) if asked else None)
