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
        self._can_skip_logits = any(
            entry.name == "logits_to_keep" for entry in self._session.get_inputs()
        )
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return self._position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        import numpy as np

        check_fits(self, len(ids))
        self._position += len(ids)
        binding = self._session.io_binding()
        inputs = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, self._position), np.int64),
        }
        if self._can_skip_logits:
            inputs["logits_to_keep"] = np.asarray([len(ids) if every_logit else 1], np.int64)
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")  # first, so that it is the first of the outputs
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the library raises a family without a common base
            raise EngineError(f"ONNX Runtime failed on {len(ids)} tokens: {error}") from error
        logits_TV: Logits = binding.get_outputs()[0].numpy()[0]
        return logits_TV if every_logit else logits_TV[-1]

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on: later steps overwrite their slots."""
        self._position = min(position, self._position)

    def close(self) -> None:
        """Free the model and the cache."""
        self._cache.clear()
        self._session = None


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
    if missing or not any(name.startswith("past_key_values.") for name in names):
        raise ModelError(
            f"{path} is no decoder with a KV cache: its inputs are {', '.join(sorted(names)[:6])}; "
            "make one with: edgekd export MODEL --format onnx"
        )
    return session


def _allocate_cache(session: Any, context_tokens: int) -> dict[str, Any]:
    """Return one zeroed buffer [1, heads, context, head_dim] per layer and side."""
    import numpy as np
    import onnxruntime as ort

    prefix = "past_key_values."
    cache = {}
    for entry in session.get_inputs():
        if entry.name.startswith(prefix):
            _, n_heads, _, head_dim = entry.shape
            zeros = np.zeros((1, n_heads, context_tokens, head_dim), np.float32)
            cache[entry.name.removeprefix(prefix)] = ort.OrtValue.ortvalue_from_numpy(zeros)
    return cache
