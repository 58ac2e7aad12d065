"""What ``edgekd eval`` is asked to measure, and which questions contradict each other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError
from edgekd.runtime.loading import DEFAULT_CONTEXT_TOKENS
from edgekd.runtime.reference_pack import DEFAULT_TOP_K
from edgekd.runtime.windows import DEFAULT_WINDOW_TOKENS

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


def check_options(models: Sequence[str], options: EvalOptions) -> None:
    """Check that ``options`` can be followed for ``models``.

    Raises:
        RecipeError: they contradict each other; all faults are named.
    """
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


def plain_settings(options: EvalOptions) -> dict[str, Any]:
    """Return every option as a JSON value."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
