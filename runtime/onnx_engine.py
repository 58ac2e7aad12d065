"""An ONNX folder run by plain ONNX Runtime.

On the CPU the KV cache is allocated once and bound as past and present of every step, so that
GroupQueryAttention writes new keys and values in place and nothing is copied per token; other
providers get a cache that is copied.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, ModelError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.huge_pages import in_huge_pages
from edgekd.runtime.onnx_copied_cache import CopiedCache
from edgekd.runtime.onnx_inputs import Mask, StepInputs, make_inputs
from edgekd.runtime.providers import choose, create_session, describe_use, engine_name
from edgekd.runtime.tokenizer import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekd.runtime.engine import Logits
    from edgekd.runtime.onnx_inputs import Arrays

# R slots, H heads, C context, D head size

_MODEL_FILE = "model.onnx"
_PAST = "past_key_values."
_CACHE_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxEngine:
    """One ONNX model with the KV cache of one sequence."""

    def __init__(
        self,
        folder: Path,
        context_tokens: int,
        n_threads: int,
        provider: str = "cpu",
        *,
        require_npu: bool = False,
    ) -> None:
        """Load the model in ``folder`` on ``provider``, with ``n_threads`` CPU threads.

        Raises:
            ModelError: ONNX Runtime refuses the model, or it is not one of ours.
            RecipeError: the execution provider is not known or not installed.
            EngineError: it cannot be used, or leaves to the CPU what ``require_npu`` forbids.
        """
        config = read_json(folder / "config.json")
        chosen = choose(provider)
        self.name = engine_name(chosen)
        with in_huge_pages():
            self._session = open_session(folder, n_threads, chosen, require_npu=require_npu)
        self.provider_use = describe_use({"model": self._session}, chosen)
        self.vocab_size = int(config["vocab_size"])
        self.context_tokens = min(context_tokens, int(config["max_position_embeddings"]))
        is_shared = chosen == "cpu"
        self._cache = allocate_cache(self._session, 1, self.context_tokens if is_shared else 0)
        kind = CacheBinding if is_shared else CopiedCache
        self._binding = kind(self._session, self._cache)
        self._inputs = input_names(self._session)
        mask = Mask(1, self.context_tokens)
        self._step = StepInputs(mask, self._inputs) if is_shared else None
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return self._position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        check_fits(self, len(ids))
        n_kept = len(ids) if every_logit or "logits_to_keep" not in self._inputs else 1
        inputs = self._arrays(ids, n_kept)
        self._position += len(ids)
        binding = self._binding  # of a closed engine there is none: a bug, and no EngineError
        try:
            logits_TV: Logits = binding.run(inputs, (1, n_kept, self.vocab_size))[0]
        except Exception as error:  # the library raises a family without a common base
            raise EngineError(f"ONNX Runtime failed on {len(ids)} tokens: {error}") from error
        logits_TV = as_float32(logits_TV)
        return logits_TV if every_logit else logits_TV[-1]

    def _arrays(self, ids: Sequence[int], n_kept: int) -> "Arrays":
        import numpy as np

        if self._step is not None and len(ids) == 1:
            return self._step.fill(ids, [self._position])
        ids_1S = np.asarray([ids], np.int64)
        return make_inputs(ids_1S, [self._position], n_kept, self._inputs)

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on: later steps overwrite their slots."""
        self._position = min(position, self._position)

    def close(self) -> None:
        """Free the model and the cache."""
        self._cache.clear()
        del self._binding
        self._session = None


def open_session(
    folder: Path, n_threads: int, provider: str = "cpu", *, require_npu: bool = False
) -> Any:
    """Return the session of the decoder in ``folder``; the CPU runs what ``provider`` does not.

    Raises:
        ModelError: ONNX Runtime refuses the model, or it is no decoder with a KV cache.
        RecipeError: the execution provider is not known or not installed.
        EngineError: it cannot be used, or leaves to the CPU what ``require_npu`` forbids.
    """
    path = folder / _MODEL_FILE
    session = create_session(path, provider, n_threads=n_threads, require_npu=require_npu)
    names = {entry.name for entry in session.get_inputs()}
    missing = {"input_ids", "attention_mask"} - names
    if missing or not any(name.startswith(_PAST) for name in names):
        raise ModelError(
            f"{path} is no decoder with a KV cache: its inputs are {', '.join(sorted(names)[:6])}; "
            "make one with: edgekd export MODEL --format onnx"
        )
    return session


def input_names(session: Any) -> set[str]:
    """Return the inputs of a graph, with those that have a default."""
    entries = (*session.get_inputs(), *session.get_overridable_initializers())
    return {entry.name for entry in entries}


def allocate_cache(session: Any, n_slots: int, context_tokens: int) -> "dict[str, NDArray[Any]]":
    """Return a zeroed buffer [R, H, C, D] for each layer and side of the KV cache."""
    import numpy as np

    cache = {}
    for entry in session.get_inputs():
        if entry.name.startswith(_PAST):
            _, n_heads, _, head_dim = entry.shape
            shape = (n_slots, n_heads, context_tokens, head_dim)
            cache[entry.name.removeprefix(_PAST)] = np.zeros(shape, _CACHE_TYPES[entry.type])
    return cache


def as_float32(logits: "NDArray[Any]") -> "Logits":
    """Return ``logits`` as the engines hand them out; those of a graph in fp16 are copied."""
    import numpy as np

    return logits if logits.dtype == np.float32 else logits.astype(np.float32)


class CacheBinding:
    """Runs a graph in which each buffer of the cache is past and present, step after step.

    Beside the graph a step costs what it binds and allocates, so an array that was bound for the
    step before stays, and logits of the same shape are written where those lay.
    """

    def __init__(self, session: Any, cache: "Arrays") -> None:
        """Bind the buffers, whose memory is shared: on the CPU an OrtValue holds the array."""
        self._session = session
        self._binding = session.io_binding()
        found = {entry.name: entry for entry in session.get_outputs()}
        self._logits_type = _CACHE_TYPES[found["logits"].type]
        # Bindings of older versions do not keep what is bound.
        self._values: dict[str, Any] = {}
        self._inputs: Arrays = {}
        self._logits: NDArray[Any] | None = None
        self._idle_references = 0
        for name, rows in cache.items():
            self._bind_input(f"{_PAST}{name}", rows)
            self._binding.bind_ortvalue_output(f"present.{name}", self._values[f"{_PAST}{name}"])

    def run(self, inputs: "Arrays", shape: tuple[int, ...]) -> "NDArray[Any]":
        """Return the logits for ``inputs``, of a known ``shape``, in memory of their own.

        The memory is used again only when nobody holds them, or a part of them, any more.
        """
        for name, array in inputs.items():
            if self._inputs.get(name) is not array:
                self._inputs[name] = array
                self._bind_input(name, array)
        if self._logits is None or self._logits.shape != shape or self._is_held():
            self._bind_logits(shape)
        self._session.run_with_iobinding(self._binding)
        assert self._logits is not None
        return self._logits

    def _bind_input(self, name: str, array: "NDArray[Any]") -> None:
        import onnxruntime as ort

        # Not bind_cpu_input: it does not know inputs that have a default.
        self._values[name] = ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(name, self._values[name])

    def _bind_logits(self, shape: tuple[int, ...]) -> None:
        import numpy as np
        import onnxruntime as ort

        # Asking for the outputs instead would wrap the whole cache at every step.
        self._logits = np.empty(shape, self._logits_type)
        self._values["logits"] = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._binding.bind_ortvalue_output("logits", self._values["logits"])
        self._idle_references = sys.getrefcount(self._logits)

    def _is_held(self) -> bool:
        """Return whether anybody but this object holds the logits; a view holds them too."""
        return sys.getrefcount(self._logits) > self._idle_references
