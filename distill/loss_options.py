"""What a student is pulled towards, and how the loss is computed."""

from dataclasses import dataclass

from edgekd.distill.divergences import DIVERGENCES, USES_MIX
from edgekd.distill.heads import HeadPrecision, HeadShape
from edgekd.distill.recipe import DivergenceName
from edgekd.errors import RecipeError

_PLAIN = HeadShape()


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the student is pulled towards."""

    divergence: DivergenceName = "forward_kl"
    mix: float = 0.5
    """Share of the teacher in the mixture of jsd (b) and of the skew divergences (a)."""
    temperature: float = 1.0
    """Softens both distributions; above 1 the teacher's small probabilities weigh more."""
    hard_label_weight: float = 0.0
    """Share of plain cross entropy: 0 is distillation alone, 1 is training without a teacher."""
    t_squared: bool = True
    """Multiply the divergence by T^2."""
    chunk_tokens: int | None = None
    """Tokens per chunk; chosen by the hidden size when left out."""
    head_precision: HeadPrecision = "fp32"
    """Of the products with the heads."""
    student_shape: HeadShape = _PLAIN
    teacher_shape: HeadShape = _PLAIN
    compiled: bool = False
    """Fuse what happens between the matrix products with torch.compile."""

    def __post_init__(self) -> None:
        """Check the ranges; all faults are reported together."""
        faults = []
        if self.divergence not in DIVERGENCES:
            faults.append(f"divergence {self.divergence!r} is none of {', '.join(DIVERGENCES)}")
        if self.divergence in USES_MIX and not 0 < self.mix < 1:
            faults.append(f"mix {self.mix} must lie between 0 and 1 for {self.divergence}")
        if not self.temperature > 0:
            faults.append(f"temperature {self.temperature} must be above 0")
        if not 0 <= self.hard_label_weight <= 1:
            faults.append(f"hard_label_weight {self.hard_label_weight} must lie in 0..1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            faults.append(f"chunk_tokens {self.chunk_tokens} must be at least 1")
        if faults:
            raise RecipeError("; ".join(faults))

    @property
    def soft_factor(self) -> float:
        """What the divergence is multiplied by."""
        scale = self.temperature**2 if self.t_squared else 1.0
        return (1 - self.hard_label_weight) * scale
