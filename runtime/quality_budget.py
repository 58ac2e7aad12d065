"""What a file may lose against its teacher on a text, and whether it stays within that."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError, VerificationError
from edgekd.progress import Progress
from edgekd.runtime.estimated import percent_text, value_text
from edgekd.runtime.eval_options import EvalOptions
from edgekd.runtime.eval_reference import check_evaluation
from edgekd.runtime.evaluate import evaluate
from edgekd.runtime.text_quality import Fidelities

_FIGURES = ("teacher_perplexity", "perplexity_ratio", "kl_nats", "top1_agreement")


@dataclass(frozen=True, kw_only=True)
class QualityBudget:
    """Limits of a file's distance to its teacher; None for no limit."""

    max_kl_nats: float | None = None
    """Of the mean KL(teacher || file) per token."""
    min_top1_agreement: float | None = None
    max_perplexity_ratio: float | None = None
    """Of the file's perplexity over the teacher's."""

    def __post_init__(self) -> None:
        """Check that each limit can be met and can be missed.

        Raises:
            RecipeError: one cannot.
        """
        faults = []
        if self.max_kl_nats is not None and not self.max_kl_nats > 0:
            faults.append(f"--max-kl {self.max_kl_nats:g} must be above 0 nats")
        if self.min_top1_agreement is not None and not 0 < self.min_top1_agreement <= 1:
            faults.append(f"--min-top1 {self.min_top1_agreement:g} must be a share, above 0 to 1")
        if self.max_perplexity_ratio is not None and not self.max_perplexity_ratio > 0:
            faults.append(f"--max-perplexity-ratio {self.max_perplexity_ratio:g} must be above 0")
        if faults:
            raise RecipeError("; ".join(faults))

    def faults(self, found: Fidelities) -> list[str]:
        """Return every figure that is out of its limit, with its standard error."""
        faults = []
        # So written, NaN is a fault.
        if (limit := self.max_kl_nats) is not None and not found.kl_nats.value <= limit:
            faults.append(f"KL {value_text(found.kl_nats, 4)} nats, limit {limit:g}")
        top1 = found.top1_agreement
        if (limit := self.min_top1_agreement) is not None and not top1.value >= limit:
            faults.append(f"top-1 {percent_text(top1)}, limit {limit:.2%}")
        ratio = found.perplexity_ratio
        if (limit := self.max_perplexity_ratio) is not None and not ratio.value <= limit:
            faults.append(f"perplexity {value_text(ratio, 4)} times as high, limit {limit:g}")
        return faults


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """A file, the teacher and text that it is held against, and its budget."""

    artifact: Path
    options: EvalOptions
    budget: QualityBudget

    @classmethod
    def asked(
        cls,
        artifact: Path,
        teacher: str | None,
        text: Path | None,
        n_tokens: int,
        limits: dict[str, float | None],
    ) -> "TeacherCheck":
        """Return the check once it is clear that it can be made, before anything runs.

        Raises:
            RecipeError: teacher or text is missing, or a limit cannot be met.
            DataError, VocabularyError: the text cannot be read, or the teacher has other tokens.
        """
        if teacher is None or text is None:
            raise RecipeError(
                "a file is held against a teacher on a text; give --teacher and --text"
            )
        options = EvalOptions(teacher=teacher, text=text, n_tokens=n_tokens)
        budget = QualityBudget(**limits)
        check_evaluation([str(artifact)], options)
        return cls(artifact=artifact, options=options, budget=budget)

    def carry_out(self, progress: Progress) -> dict[str, Any]:
        """Return how far the file is from its teacher.

        Raises:
            VerificationError: a figure is out of the budget.
            ModelError, EngineError: a model cannot be read or run.
        """
        options = self.options
        (measured,) = evaluate([str(self.artifact)], options, progress).models
        assert measured.text is not None and measured.text.to_teacher is not None  # as asked
        text, found = measured.text, measured.text.to_teacher
        if faults := self.budget.faults(found):
            raise VerificationError(
                f"{self.artifact.name} strays from its teacher {options.teacher}: "
                f"{'; '.join(faults)}"
            )
        return {
            "model": options.teacher,
            "n_positions": text.n_positions,
            "perplexity": asdict(text.perplexity),
            **{name: asdict(getattr(found, name)) for name in _FIGURES},
            "limits": asdict(self.budget),
        }
