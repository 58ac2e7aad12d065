"""What ``edgekd report`` measures: which models, and on what."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import RecipeError
from edgekd.runtime.bench_settings import BenchSettings

ROWS = {
    "teacher": "teacher",
    "baseline": "student baseline",
    "quantized": "student quantized",
    "distilled": "student distilled",
    "int4": "distilled + int4",
}
"""The name of each row by the setting that names its model."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Which models, and what they are measured on."""

    models: Mapping[str, str]
    """By keys of ``ROWS``; some may be missing."""
    text: Path | None = None
    """Held-out text; without it and ``reference`` there is no perplexity and no KL."""
    reference: Path | None = None
    """Reference pack, which stands in for teacher and text."""
    questions: Path | None = None
    n_tokens: int = 4096
    n_questions: int | None = None
    bench: BenchSettings = BenchSettings()

    def __post_init__(self) -> None:
        """Check the rows.

        Raises:
            RecipeError: there is none.
        """
        if not self.models:
            raise RecipeError(f"no model to report on; give one or more of {_named()}")


def _named() -> str:
    return ", ".join(f"--{key}" for key in ROWS)
