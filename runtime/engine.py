"""The one protocol behind which torch, llama.cpp and ONNX Runtime look alike.

An engine holds one sequence and its KV cache. Token ids go in, logits come out; text, sampling
and timing are other modules' business.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

from edgekd.errors import EngineError

# T tokens, V vocabulary


class Engine(Protocol):
    """Turns token ids into next-token logits, keeping the KV cache of one sequence."""

    name: str
    """As in reports: ``torch``, ``llama.cpp`` or ``onnxruntime``."""
    vocab_size: int
    context_tokens: int
    """How many tokens fit into the KV cache."""

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids`` and return the logits after the last one [V], or after each [T, V]."""

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on."""

    def close(self) -> None:
        """Free the model."""


def check_fits(engine: Engine, n_tokens: int) -> None:
    """Refuse ``n_tokens`` more tokens where the KV cache has no room for them.

    Raises:
        EngineError: the context would overflow.
    """
    if engine.position + n_tokens > engine.context_tokens:
        raise EngineError(
            f"{engine.position} + {n_tokens} tokens do not fit into a context of "
            f"{engine.context_tokens}; raise --ctx or shorten the text"
        )
