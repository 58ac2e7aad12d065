"""A KV cache that goes into an ONNX graph and comes out longer, at every step.

On the CPU one buffer is bound as past and present, and GroupQueryAttention writes in place
(``onnx_engine.CacheBinding``). Another provider copies past and present to memory of its own, where
they are two: from the second step on it would attend to what nobody wrote (seen with
onnxruntime-webgpu 1.27). So there the past is handed over exactly as long as it is.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# H heads, P tokens of the past, D head size

_PAST, _PRESENT = "past_key_values.", "present."


class CopiedCache:
    """Runs a graph of one sequence, and keeps the keys and values that it returns."""

    def __init__(self, session: Any, empty: "dict[str, NDArray[Any]]") -> None:
        """Begin with ``empty`` rows [1, H, 0, D], keyed like ``0.key``."""
        self._session = session
        self._rows = empty

    def run(self, inputs: "dict[str, NDArray[Any]]", shape: tuple[int, ...]) -> "NDArray[Any]":
        """Return the logits of ``shape`` for ``inputs``, whose mask says how long the past is."""
        n_past = inputs["attention_mask"].shape[1] - inputs["input_ids"].shape[1]
        past = {f"{_PAST}{side}": rows[:, :, :n_past] for side, rows in self._rows.items()}
        names = ["logits", *(f"{_PRESENT}{side}" for side in self._rows)]
        logits, *present = self._session.run(names, inputs | past)
        self._rows = dict(zip(self._rows, present, strict=True))
        found: NDArray[Any] = logits.reshape(shape)
        return found
