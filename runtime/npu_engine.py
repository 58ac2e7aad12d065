"""An ONNX folder of fixed shapes, as NPUs want them, behind the protocol of every engine.

Prompts go through the prefill graph in pieces of its size, the last one padded; single tokens go
through the decode graph. Both see the whole cache, of which a mask hides what is not filled, and
hand out new keys and values, which are written into their slots here: nothing ever moves, and to
forget is to fill the mask from an earlier slot on. Embeddings and rotary tables are looked up by a
graph of their own on the CPU, whatever runs the layers. A graph in parts runs part after part, each
on the cache of its own layers and on what the part before hands on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.providers import create_session, describe_use, engine_name
from edgekd.runtime.static_model import (
    HIDDEN,
    HOST_GRAPH,
    graph_files,
    provider_for,
    provider_options,
    read_static,
)
from edgekd.runtime.tokenizer import read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.runtime.engine import Logits

# S tokens of a graph, C slots of the cache, V vocabulary

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int16)": "int16",  # of a graph that calculates in whole numbers
}


class NpuEngine:
    """One model of fixed shapes with the KV cache of one sequence."""

    def __init__(
        self,
        folder: Path,
        context_tokens: int,
        n_threads: int,
        provider: str = "auto",
        *,
        require_npu: bool = False,
        root: Path = Path("/"),
    ) -> None:
        """Load the graphs in ``folder`` on ``provider``; ``root`` is where the machine is read.

        Raises:
            ModelError: they are damaged, or not compiled for this machine.
            EngineError: the provider cannot be used, or leaves to the CPU what ``require_npu``
                forbids.
            RecipeError: the provider is not known or not installed.
        """
        self._model = read_static(folder)
        chosen = provider_for(folder, self._model, provider)
        self.name = engine_name(chosen)
        self.vocab_size = int(read_json(folder / "config.json")["vocab_size"])
        self.context_tokens = min(context_tokens, self._model.context_tokens)
        self._sessions = {
            part: create_session(
                path,
                chosen,
                n_threads=n_threads,
                require_npu=require_npu,
                options=provider_options(self._model, chosen),
            )
            for part, path in graph_files(folder, self._model, chosen, root).items()
        }
        self._host = create_session(folder / HOST_GRAPH, "cpu", n_threads=n_threads)
        self.provider_use = describe_use(self._sessions, chosen)
        self._cache = _allocate([self._sessions[part] for part in self._model.parts("decode")])
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return self._position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        import numpy as np

        check_fits(self, len(ids))
        found, size = [], self._model.prefill_tokens
        for start in range(0, len(ids), size):
            logits_TV = self._append(ids[start : start + size])
            found.append(logits_TV if every_logit else logits_TV[-1:])
        logits_TV = np.concatenate(found)
        return logits_TV if every_logit else logits_TV[-1]

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on: later steps overwrite their slots."""
        self._position = min(position, self._position)

    def close(self) -> None:
        """Free the graphs and the cache."""
        self._sessions.clear()
        self._cache.clear()
        self._host = None

    def _append(self, ids: Sequence[int]) -> "Logits":
        """Run a graph's parts; return the logits [T, V] of the tokens without the padding."""
        import numpy as np

        graph = "decode" if len(ids) == 1 else "prefill"
        n_slots = 1 if len(ids) == 1 else self._model.prefill_tokens
        try:
            outputs = self.run_graph(graph, self._inputs(ids, n_slots))
        except Exception as error:  # the library raises a family without a common base
            reason = str(error).strip().splitlines()[0]
            raise EngineError(f"{self.name} failed on {len(ids)} tokens: {reason}") from error
        self._keep({side: outputs[f"new_key_values.{side}"] for side in self._cache}, len(ids))
        logits_TV: Logits = outputs["logits"][0, : len(ids)].astype(np.float32)
        return logits_TV

    def run_graph(self, graph: str, inputs: "dict[str, NDArray[Any]]") -> "dict[str, NDArray[Any]]":
        """Return every output of the parts of ``graph``, by its name."""
        outputs: dict[str, NDArray[Any]] = {}
        for part in self._model.parts(graph):
            session = self._sessions[part]
            known = inputs | outputs
            taken = {entry.name: known[entry.name] for entry in session.get_inputs()}
            names = [entry.name for entry in session.get_outputs()]
            outputs |= zip(names, session.run(names, taken), strict=True)
        return outputs

    def _inputs(self, ids: Sequence[int], n_slots: int) -> "dict[str, NDArray[Any]]":
        """Return everything that a graph of ``n_slots`` tokens takes, whichever part of it."""
        import numpy as np

        padded = np.zeros((1, n_slots), np.int64)
        padded[0, : len(ids)] = ids
        # Padding beyond the last position borrows its angles; nothing real ever attends to it.
        positions = np.minimum(self._position + np.arange(n_slots), self._model.context_tokens - 1)
        prepared = self._host.run(None, {"input_ids": padded, "position_ids": positions[None]})
        names = [output.name for output in self._host.get_outputs()]
        inputs = dict(zip(names, prepared, strict=True))
        for kind, window in self._model.windows.items():
            mask_SC = attention_mask(
                self._position, n_slots, self._model.context_tokens, window, self._model.hidden
            ).astype(inputs["hidden"].dtype)
            inputs[f"{kind}mask"] = mask_SC[None, None]
        return inputs | {f"past_key_values.{side}": rows for side, rows in self._cache.items()}

    def _keep(self, new: "dict[str, NDArray[Any]]", n_tokens: int) -> None:
        """Write keys and values of the real tokens into their slots."""
        slots = slice(self._position, self._position + n_tokens)
        for side, rows in new.items():
            if side.endswith("key"):
                self._cache[side][..., slots] = rows[..., :n_tokens]
            else:
                self._cache[side][:, :, slots] = rows[:, :, :n_tokens]
        self._position += n_tokens


def attention_mask(
    n_past: int,
    n_new: int,
    n_slots: int,
    window: int | None = None,
    hidden: float = HIDDEN,
) -> "NDArray[np.float32]":
    """Return what is added to the scores [S, C + S]: 0 where a token may look, else ``hidden``.

    The first ``n_slots`` columns are the cache, of which ``n_past`` slots are filled; behind them
    are the ``n_new`` tokens themselves. A token with a ``window`` sees so many, itself included.
    """
    import numpy as np

    filled_C = np.where(np.arange(n_slots) < n_past, np.arange(n_slots), np.iinfo(np.int64).max)
    position_S = n_past + np.arange(n_new)
    position_T = np.concatenate([filled_C, position_S])
    is_seen = position_T[None] <= position_S[:, None]
    if window is not None:
        is_seen &= position_T[None] > position_S[:, None] - window
    mask: NDArray[np.float32] = np.where(is_seen, 0, hidden).astype(np.float32)
    return mask


def _allocate(sessions: Sequence[Any]) -> "dict[str, NDArray[Any]]":
    """Return a zeroed buffer for each layer and side of the cache, keyed like ``0.key``."""
    import numpy as np

    prefix = "past_key_values."
    return {
        entry.name.removeprefix(prefix): np.zeros(entry.shape, _TYPES[entry.type])
        for session in sessions
        for entry in session.get_inputs()
        if entry.name.startswith(prefix)
    }
