"""A checkpoint run by torch: the reference, and the engine of a model that is not exported."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, MissingExtraError, ModelError
from edgekd.runtime.engine import check_fits
from edgekd.untrusted import MALFORMED

if TYPE_CHECKING:
    import torch

    from edgekd.runtime.engine import Logits


class TorchEngine:
    """A causal language model of transformers."""

    name = "torch"

    def __init__(self, model: Any, context_tokens: int) -> None:
        """Wrap ``model`` (a ``PreTrainedModel``), limited to ``context_tokens``."""
        self.model = model.eval()
        self.vocab_size = int(model.config.vocab_size)
        self.context_tokens = min(context_tokens, int(model.config.max_position_embeddings))
        # transformers 5.24 renamed it.
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._cache = self._new_cache()

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return int(self._cache.get_seq_length())

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        import torch

        check_fits(self, len(ids))
        with torch.inference_mode():
            output = self.model(
                input_ids=torch.tensor([list(ids)], device=self.model.device),
                use_cache=True,
                logits_to_keep=0 if every_logit else 1,
                **{self._cache_name: self._cache},
            )
        logits_TV: Logits = output.logits[0].float().cpu().numpy()
        return logits_TV if every_logit else logits_TV[-1]

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on."""
        if position == 0:
            self._cache = self._new_cache()
        elif position < self.position:
            try:
                self._cache.crop(position - self.position)
            except RuntimeError as error:
                raise EngineError(f"this model's KV cache cannot be cut: {error}") from error

    def close(self) -> None:
        """Free the model."""
        self._cache = self.model = None

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


def load_causal_lm(
    folder: Path,
    dtype: "torch.dtype | None" = None,
    *,
    trust_remote_code: bool = False,
    **placement: Any,
) -> Any:
    """Return the causal language model in ``folder``, in ``dtype`` or as stored.

    Only safetensors are read: pickled weights can run code. ``placement`` is what transformers
    takes to quantize or spread the weights: ``device_map``, ``quantization_config`` and so on.

    Raises:
        ModelError: transformers cannot load it.
    """
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("transformers", "torch") from error
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **placement,
        )
    except (OSError, RuntimeError, SafetensorError, *MALFORMED) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(f"transformers cannot load {folder}: {reason}") from error
