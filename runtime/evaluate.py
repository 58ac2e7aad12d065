"""``edgekd eval``: how good models are, measured on the files that run.

The teacher runs first and alone; its logits wait on the disk, so that no two models need memory
at a time. With a reference pack there is no teacher at all, and without torch nothing needs it.
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import DataError, RecipeError
from edgekd.files import sha256_of
from edgekd.progress import Progress, Silence
from edgekd.runtime.choices import ChoiceQuality, Question, answer, grade
from edgekd.runtime.estimate import METHOD
from edgekd.runtime.identity import (
    check_same_tokens,
    tokenizer_of,
    tokenizer_sha256,
    weights_sha256,
)
from edgekd.runtime.loading import DEFAULT_CONTEXT_TOKENS, LoadedModel, opened_model
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.providers import ProviderUse
from edgekd.runtime.questions import read_questions, with_shots
from edgekd.runtime.reference import FullReference, PackReference, Reference, record_teacher
from edgekd.runtime.reference_pack import (
    DEFAULT_TOP_K,
    PackBuilder,
    PackIdentity,
    read_pack,
    write_pack,
)
from edgekd.runtime.text_quality import TextQuality, score_text, summarise
from edgekd.runtime.windows import (
    DEFAULT_WINDOW_TOKENS,
    Windows,
    cut_windows,
    n_scored,
)

DEFAULT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure, and against what."""

    teacher: str | None = None
    """Model to compare with, over ``text``."""
    reference: Path | None = None
    """Pack to compare with; it brings its own text."""
    text: Path | None = None
    n_tokens: int = DEFAULT_TOKENS
    """Of the text, at most."""
    window_tokens: int = DEFAULT_WINDOW_TOKENS
    questions: Path | None = None
    n_questions: int | None = None
    """The first so many; all where None."""
    shots: int = 0
    """Answered questions in front of each."""
    shots_from: Path | None = None
    """File to draw them from; the head of ``questions`` where None."""
    seed: int = 0
    """Of that draw."""
    write_reference: Path | None = None
    """Where to write a pack of the teacher."""
    top_k: int = DEFAULT_TOP_K
    """Tokens a position in that pack."""
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    """For questions; windows need no more than they have."""
    n_threads: int | None = None
    provider: str = "cpu"
    """Execution provider of ONNX folders among the models; a teacher runs on the CPU."""
    require_npu: bool = False
    """Refuse to leave any of them to the CPU."""
    revision: str | None = None


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
    models: Sequence[str], options: EvalOptions, progress: Progress | None = None
) -> Evaluation:
    """Return the quality of each of ``models``.

    Raises:
        RecipeError: the options contradict each other; all faults are named.
        DataError: text, questions or pack are missing or malformed.
        VocabularyError: a model has other tokens than its reference.
        ModelError, EngineError: a model cannot be read or run.
    """
    _check(models, options)
    said = progress or Silence()
    asked = _read_questions(options)
    located = [locate_model(model, options.revision) for model in models]
    with ExitStack() as stack:
        reference, described = _reference(located, options, stack, said)
        text = _read_text(options.text) if options.text and not reference else None
        measured = [_measure(path, reference, text, asked, options, said) for _, path in located]
    return Evaluation(
        models=measured,
        reference=described,
        wrote=str(options.write_reference) if options.write_reference else None,
        settings=_plain_settings(options) | {"standard_errors": METHOD},
    )


def _check(models: Sequence[str], options: EvalOptions) -> None:
    faults = []
    if options.teacher and not options.text:
        faults.append("--teacher needs --text, on which to compare")
    if options.reference and (options.teacher or options.text):
        faults.append("--reference brings teacher and text; leave out --teacher and --text")
    if options.write_reference and not options.teacher:
        faults.append("--write-reference needs --teacher and --text")
    if not models and not options.write_reference:
        faults.append("give at least one MODEL")
    if models and not (options.text or options.reference or options.questions):
        faults.append("nothing to measure; give --text, --reference or --questions")
    if options.shots < 0 or (options.shots and not options.questions):
        faults.append("--shots counts examples in front of --questions")
    for name, value, least in (
        ("--tokens", options.n_tokens, 2),
        ("--window", options.window_tokens, 2),
        ("--limit", options.n_questions or 1, 1),
    ):
        if value < least:
            faults.append(f"{name} {value} is too small; give {least} or more")
    if faults:
        raise RecipeError("; ".join(faults))


def _read_questions(options: EvalOptions) -> list[Question]:
    if not options.questions:
        return []
    pool = read_questions(options.shots_from) if options.shots_from else None
    asked = with_shots(read_questions(options.questions), options.shots, pool, options.seed)
    return asked[: options.n_questions]


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read text from {path}: {error}") from error


def _reference(
    located: Sequence[tuple[ModelKind, Path]],
    options: EvalOptions,
    stack: ExitStack,
    progress: Progress,
) -> tuple[Reference | None, dict[str, Any] | None]:
    """Return what to compare with, and what the report says of it."""
    if options.reference:
        pack = read_pack(options.reference)
        name = f"{options.reference.name} (teacher {pack.identity.teacher})"
        described = {"pack": str(options.reference), **asdict(pack.identity)}
        _check_tokens(located, name, pack.identity.tokenizer_sha256)
        return PackReference(pack), described
    if not options.teacher:
        return None, None
    kind, path = locate_model(options.teacher, options.revision)
    described = {
        "teacher": str(path),
        "weights_sha256": weights_sha256(kind, path),
        "tokenizer_sha256": tokenizer_sha256(tokenizer_of(kind, path)),
    }
    _check_tokens(located, path.name, described["tokenizer_sha256"])
    reference = _run_teacher(path, described, options, bool(located), progress)
    return stack.enter_context(closing(reference)), described


def _check_tokens(located: Sequence[tuple[ModelKind, Path]], reference: str, expected: str) -> None:
    """Refuse a model with other tokens before anything long begins."""
    for kind, path in located:
        found = tokenizer_sha256(tokenizer_of(kind, path))
        check_same_tokens(path.name, found, reference, expected)


def _run_teacher(
    path: Path,
    described: dict[str, Any],
    options: EvalOptions,
    is_compared: bool,
    progress: Progress,
) -> FullReference:
    """Run the teacher over the text, keep its logits if asked, and write a pack if asked."""
    assert options.text
    text = _read_text(options.text)
    with opened_model(
        path, context_tokens=options.window_tokens, n_threads=options.n_threads
    ) as teacher:
        windows = cut_windows(teacher.tokenizer, text, options.n_tokens, options.window_tokens)
        builder = None
        if options.write_reference:
            builder = PackBuilder(_pack_identity(teacher, described, options), windows)
        with progress.track(f"teacher {path.name}", n_scored(windows)) as advance:
            reference = record_teacher(
                teacher,
                windows,
                is_kept=is_compared,
                builder=builder,
                advance=lambda done: advance(done, ""),
            )
    if builder and options.write_reference:
        write_pack(options.write_reference, builder.finish())
    return reference


def _pack_identity(
    teacher: LoadedModel, described: dict[str, Any], options: EvalOptions
) -> PackIdentity:
    assert options.text
    return PackIdentity(
        teacher=teacher.path.name,
        teacher_sha256=described["weights_sha256"],
        teacher_engine=teacher.engine.name,
        tokenizer_sha256=described["tokenizer_sha256"],
        text_sha256=sha256_of(options.text),
        vocab_size=teacher.engine.vocab_size,
        top_k=options.top_k,
    )


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
        text_quality = None
        if reference:
            text_quality = _text_quality(loaded, reference.windows, reference, progress)
        elif text:
            windows = cut_windows(loaded.tokenizer, text, options.n_tokens, window_tokens)
            text_quality = _text_quality(loaded, windows, None, progress)
        return ModelQuality(
            model=str(path),
            engine=loaded.engine.name,
            provider=loaded.provider_use,
            weights_sha256=weights_sha256(loaded.kind, path),
            text=text_quality,
            questions=_choice_quality(loaded, asked, progress) if asked else None,
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


def _plain_settings(options: EvalOptions) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
