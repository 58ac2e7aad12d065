"""An ONNX folder run by plain ONNX Runtime.

The KV cache is allocated once and bound as past and present of every step, so that
GroupQueryAttention writes new keys and values in place and nothing is copied per token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, MissingExtraError, ModelError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.tokenizer import read_json

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

_MODEL_FILE = "model.onnx"
_PAST = "past_key_values."


class OnnxEngine:
    """One ONNX model with the KV cache of one sequence."""

    name = "onnxruntime"

    def __init__(self, folder: Path, context_tokens: int, n_threads: int) -> None:
        """Load the model in ``folder`` on ``n_threads`` CPU threads.

        Raises:
            ModelError: ONNX Runtime refuses the model, or it is not one of ours.
        """
        config = read_json(folder / "config.json")
        self._session = open_session(folder, n_threads)
        self.vocab_size = int(config["vocab_size"])
        self.context_tokens = min(context_tokens, int(config["max_position_embeddings"]))
        self._cache = _allocate_cache(self._session, self.context_tokens)
        self._binding = _bind_cache(self._session, self._cache)
        entries = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self._can_skip_logits = any(entry.name == "logits_to_keep" for entry in entries)
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return self._position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        import numpy as np
        import onnxruntime as ort

        check_fits(self, len(ids))
        self._position += len(ids)
        inputs = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, self._position), np.int64),
        }
        if self._can_skip_logits:
            inputs["logits_to_keep"] = np.asarray([len(ids) if every_logit else 1], np.int64)
        # Not bind_cpu_input: it does not know inputs that have a default. Bindings of older
        # versions do not keep what is bound.
        bound = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        for name, value in bound.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits")  # again, or they are written over the last step's
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library raises a family without a common base
            raise EngineError(f"ONNX Runtime failed on {len(ids)} tokens: {error}") from error
        logits_TV: Logits = self._binding.get_outputs()[0].numpy()[0]
        logits_TV = logits_TV.astype(np.float32, copy=False)  # of a graph in fp16
        return logits_TV if every_logit else logits_TV[-1]

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on: later steps overwrite their slots."""
        self._position = min(position, self._position)

    def close(self) -> None:
        """Free the model and the cache."""
        self._binding = self._session = None
        self._cache.clear()


def open_session(folder: Path, n_threads: int, provider: str = "CPUExecutionProvider") -> Any:
    """Return the session of the decoder in ``folder``; the CPU runs what ``provider`` does not.

    Raises:
        ModelError: ONNX Runtime refuses the model, or it is no decoder with a KV cache.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    # Threads that spin between operators starve whatever else runs on a small machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    path = folder / _MODEL_FILE
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the library raises a family without a common base
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"ONNX Runtime cannot load {path}: {reason}") from error
    names = {entry.name for entry in session.get_inputs()}
    missing = {"input_ids", "attention_mask"} - names
    if missing or not any(name.startswith(_PAST) for name in names):
        raise ModelError(
            f"{path} is no decoder with a KV cache: its inputs are {', '.join(sorted(names)[:6])}; "
            "make one with: edgekd export MODEL --format onnx"
        )
    return session


def _allocate_cache(session: Any, context_tokens: int) -> dict[str, Any]:
    """Return one zeroed buffer [1, heads, context, head_dim] per layer and side."""
    import numpy as np
    import onnxruntime as ort

    cache = {}
    for entry in session.get_inputs():
        if entry.name.startswith(_PAST):
            _, n_heads, _, head_dim = entry.shape
            dtype = np.float16 if entry.type == "tensor(float16)" else np.float32
            zeros = np.zeros((1, n_heads, context_tokens, head_dim), dtype)
            cache[entry.name.removeprefix(_PAST)] = ort.OrtValue.ortvalue_from_numpy(zeros)
    return cache


def _bind_cache(session: Any, cache: dict[str, Any]) -> Any:
    """Return a binding in which each buffer is past and present, from step to step."""
    binding = session.io_binding()
    binding.bind_output("logits")  # first, so that it is the first of the outputs
    for name, buffer in cache.items():
        binding.bind_ortvalue_input(f"{_PAST}{name}", buffer)
        binding.bind_ortvalue_output(f"present.{name}", buffer)
    return binding
