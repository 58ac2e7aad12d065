"""``edgekd eval``: how good models are, measured on the files that run.

The teacher runs first and alone; its logits wait on the disk, so that no two models need memory
at a time. With a reference pack there is no teacher at all, and without torch nothing needs it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.progress import Progress, Silence
from edgekd.runtime.choices import ChoiceQuality, Question, answer, grade
from edgekd.runtime.estimate import METHOD
from edgekd.runtime.eval_options import EvalOptions, check_options, plain_settings
from edgekd.runtime.eval_reference import open_reference, read_text
from edgekd.runtime.identity import weights_sha256
from edgekd.runtime.loading import LoadedModel, opened_model
from edgekd.runtime.model_kind import locate_model
from edgekd.runtime.providers import ProviderUse
from edgekd.runtime.questions import read_questions, with_shots
from edgekd.runtime.reference import Reference
from edgekd.runtime.text_quality import TextQuality, score_text, summarise
from edgekd.runtime.windows import Windows, cut_windows, n_scored, windows_sha256

__all__ = ["EvalOptions", "Evaluation", "ModelQuality", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class ModelQuality:
    """Everything measured on one model."""

    model: str
    engine: str
    provider: ProviderUse | None
    """Of an ONNX folder alone."""
    weights_sha256: str
    text: TextQuality | None
    questions: ChoiceQuality | None
    windows_sha256: str | None = None
    """Of the ids of the text: equal where models predicted the same tokens."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured."""

    models: list[ModelQuality]
    reference: dict[str, Any] | None
    """Which teacher or pack the models were compared with."""
    wrote: str | None
    """The pack that was written."""
    settings: dict[str, Any]
    """Every option, and how standard errors were found."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def evaluate(
    models: Sequence[str],
    options: EvalOptions,
    progress: Progress | None = None,
    *,
    recorded: Path | None = None,
) -> Evaluation:
    """Return the quality of each of ``models``.

    ``recorded`` is a folder of ``record_reference``: what the teacher said is read from there.

    Raises:
        RecipeError: the options contradict each other; all faults are named.
        DataError: text, questions or pack are missing or malformed.
        VocabularyError: a model has other tokens than its reference.
        ModelError, EngineError: a model cannot be read or run.
    """
    check_options(models, options)
    said = progress or Silence()
    asked = _read_questions(options)
    located = [locate_model(model, options.revision) for model in models]
    with ExitStack() as stack:
        reference, described = open_reference(located, options, stack, said, recorded)
        text = read_text(options.text) if options.text and not reference else None
        measured = [_measure(path, reference, text, asked, options, said) for _, path in located]
    return Evaluation(
        models=measured,
        reference=described,
        wrote=str(options.write_reference) if options.write_reference else None,
        settings=plain_settings(options) | {"standard_errors": METHOD},
    )


def _read_questions(options: EvalOptions) -> list[Question]:
    if not options.questions:
        return []
    pool = read_questions(options.shots_from) if options.shots_from else None
    asked = with_shots(read_questions(options.questions), options.shots, pool, options.seed)
    return asked[: options.n_questions]


def _measure(
    path: Path,
    reference: Reference | None,
    text: str | None,
    asked: Sequence[Question],
    options: EvalOptions,
    progress: Progress,
) -> ModelQuality:
    window_tokens = max(map(len, reference.windows)) if reference else options.window_tokens
    context_tokens = max(window_tokens, options.context_tokens if asked else 0)
    with opened_model(
        path,
        context_tokens=context_tokens,
        n_threads=options.n_threads,
        provider=options.provider,
        require_npu=options.require_npu,
    ) as loaded:
        windows: Windows | None = None
        if reference:
            windows = reference.windows
        elif text:
            windows = cut_windows(loaded.tokenizer, text, options.n_tokens, window_tokens)
        return ModelQuality(
            model=str(path),
            engine=loaded.engine.name,
            provider=loaded.provider_use,
            weights_sha256=weights_sha256(loaded.kind, path),
            text=_text_quality(loaded, windows, reference, progress) if windows else None,
            questions=_choice_quality(loaded, asked, progress) if asked else None,
            windows_sha256=windows_sha256(windows) if windows else None,
        )


def _text_quality(
    loaded: LoadedModel, windows: Windows, reference: Reference | None, progress: Progress
) -> TextQuality:
    with progress.track(f"text {loaded.path.name}", n_scored(windows)) as advance:
        scores = score_text(loaded.engine, windows, reference, lambda done: advance(done, ""))
    return summarise(scores, reference.kl_kind if reference else "exact")


def _choice_quality(
    loaded: LoadedModel, asked: Sequence[Question], progress: Progress
) -> ChoiceQuality:
    with progress.track(f"questions {loaded.path.name}", len(asked)) as advance:
        return grade(answer(loaded, asked, lambda done: advance(done, "")))
