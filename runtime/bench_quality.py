"""Quality beside speed: each model against a teacher or a pack, in a process of its own.

It comes after the speed, so that it warms neither the machine nor a cache for it, and what it
needs of memory is in no figure. This side imports nothing that measures.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from edgekd.errors import EngineError, RecipeError
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench_process import MeasuringProcess
from edgekd.runtime.bench_result import BenchRun
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.conditions import Finding

_PREFIX = "edgekd-teacher-"
_LEFTOVER_S = 24 * 3600.0  # nothing that long ago is still in use


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """What the models are compared with, and on what text."""

    teacher: str | None = None
    """Runs once, over ``text``."""
    reference: Path | None = None
    """Reference pack, which stands in for teacher and text."""
    text: Path | None = None
    n_tokens: int = 4096
    """Of the text, at most."""

    def __post_init__(self) -> None:
        """Check that a text or a pack is given, and not both.

        Raises:
            RecipeError: there is nothing to measure on, or too much.
        """
        if self.reference and (self.teacher or self.text):
            raise RecipeError("--reference brings teacher and text; leave out --teacher and --text")
        if not (self.text or self.reference):
            raise RecipeError(
                "quality needs a text; give --text, with or without --teacher, or --reference"
            )


@dataclass
class Qualities:
    """What was found, as edgekd eval found it."""

    models: list[dict[str, Any] | None]
    """In the order of the models; see ``quality`` in docs/schemas/bench-1.json."""
    reasons: list[str] = field(default_factory=list)
    """Why one is missing: what was measured before is not thrown away for it."""
    settings: dict[str, Any] | None = None
    """None where all are missing."""
    reference: dict[str, Any] | None = None
    """The teacher or the pack; None where a text alone gave the perplexity."""


def check_quality(models: Sequence[str], asked: QualitySettings, settings: BenchSettings) -> None:
    """Refuse before anything is measured what cannot be compared.

    Raises:
        EngineError: text or pack cannot be read, or tokens differ; the reason is the process's.
    """
    who = str(asked.teacher or asked.reference or asked.text)
    _ask(who, "check_quality", models=list(models), options=_options(asked, settings))


def with_quality(
    run: BenchRun, asked: QualitySettings, progress: Progress | None = None
) -> BenchRun:
    """Return ``run`` with the quality of its models, or the reason why it has none."""
    models = [result.model for result in run.results]
    found = measure_qualities(models, asked, run.settings, progress)
    pairs = zip(run.results, found.models, strict=True)
    advice = "the speed stands; mend it and measure again, or run edgekd eval"
    missing = [
        Finding("no-quality", f"quality was not measured: {reason}", advice, False)
        for reason in found.reasons
    ]
    return replace(
        run,
        findings=run.findings + missing,
        results=[replace(result, quality=one) for result, one in pairs],
        quality_settings=found.settings,
        quality_reference=found.reference,
    )


def measure_qualities(
    models: Sequence[str],
    asked: QualitySettings,
    settings: BenchSettings,
    progress: Progress | None = None,
) -> Qualities:
    """Return the quality of each of ``models``, or the reason of its process."""
    _remove_leftovers()
    options, found = _options(asked, settings), Qualities([])
    n_steps = len(models) + (asked.teacher is not None)
    with (
        TemporaryDirectory(prefix=_PREFIX) as folder,
        (progress or Silence()).track("quality", n_steps) as advance,
    ):
        recorded = None if asked.teacher is None else folder
        if asked.teacher is not None:
            try:
                _ask(asked.teacher, "record_teacher", options=options, folder=folder)
            except EngineError as error:
                return Qualities([None] * len(models), [str(error)])
            advance(1, PurePath(asked.teacher).name)
        for done, model in enumerate(models, n_steps - len(models) + 1):
            _add(found, model, options, recorded)
            advance(done, PurePath(model).name)
    return found


def _remove_leftovers() -> None:
    """Remove the logits that a bench left which was killed, a day ago or longer."""
    for folder in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # of another user
            if time.time() - folder.lstat().st_mtime > _LEFTOVER_S:
                shutil.rmtree(folder)


def _add(found: Qualities, model: str, options: dict[str, Any], recorded: str | None) -> None:
    try:
        reply = _ask(model, "quality", model=model, options=options, recorded=recorded)
    except EngineError as error:
        found.models.append(None)
        found.reasons.append(str(error))
        return
    found.models.append(reply["quality"])
    found.settings, found.reference = reply["settings"], reply["reference"]


def _ask(who: str, what: str, /, **values: Any) -> dict[str, Any]:
    with MeasuringProcess(who) as process:
        return process.ask(what, **values)


def _options(asked: QualitySettings, settings: BenchSettings) -> dict[str, Any]:
    """Return the options of edgekd eval that mean the same, as JSON values."""
    return {
        "teacher": asked.teacher,
        "reference": str(asked.reference) if asked.reference else None,
        "text": str(asked.text) if asked.text else None,
        "n_tokens": asked.n_tokens,
        "n_threads": settings.n_threads,
        "provider": settings.provider,
        "require_npu": settings.require_npu,
    }
