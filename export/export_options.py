"""What an export may be given beside a model: data to round on, and a size to stay within.

Apart from what carries it out, which needs torch: a plain export does not.
"""

from dataclasses import dataclass
from pathlib import Path

N_CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large the matrices may be; one of the two."""

    file_bytes: int | None = None
    """Of the whole GGUF file; ONNX takes the same types."""
    bits_per_weight: float | None = None
    """Of the matrices, scales included: 4.5 is all Q4_0, 8.5 all Q8_0."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Where the data comes from; nothing for rounding without data."""

    text: Path | None = None
    n_tokens: int = N_CALIBRATION_TOKENS
    imatrix: Path | None = None
    """An importance matrix in llama.cpp's GGUF format."""
    save_imatrix: Path | None = None
    """Where to write the one that is measured on ``text``."""
