"""Embeddings of texts by a GGUF model: its last hidden states, averaged over the tokens.

They are read token by token and averaged here, not by llama.cpp's pooling, which wants a whole
text in one batch and so a compute buffer of that size. Functions: llama.h of llama.cpp.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError
from edgekd.runtime.batch_engine import Work
from edgekd.runtime.llamacpp_batch import Batch, LlamaCppBatchEngine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# T tokens of one batch, H hidden

_BATCH_TOKENS = 64  # llama.cpp computes logits beside them: 64 rows, as in other steps
_NO_POOLING = 0  # enum llama_pooling_type


class LlamaCppEmbedder:
    """A context beside the engine's, over the same weights; for one thread."""

    def __init__(self, engine: LlamaCppBatchEngine) -> None:
        """Make the context.

        Raises:
            EngineError: there is no memory for it.
        """
        self._c = c = engine.c
        params = c.llama_context_default_params()
        params.n_ctx = engine.context_tokens
        params.n_batch = params.n_ubatch = params.n_outputs_max = _BATCH_TOKENS
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = engine.n_threads
        params.embeddings = True
        params.pooling_type = _NO_POOLING
        self._context: Any = c.llama_init_from_model(engine.model, params)
        if not self._context:
            raise EngineError(
                f"llama.cpp cannot make a context of {engine.context_tokens} tokens for "
                "embeddings; lower --ctx"
            )
        self._width = int(c.llama_model_n_embd_out(engine.model))
        self._batch = Batch(c, _BATCH_TOKENS)

    def embed(self, ids: Sequence[int]) -> "NDArray[np.float32]":
        """Return the mean of the last hidden states after each of ``ids`` [H], of length 1.

        Raises:
            EngineError: llama.cpp fails on them.
        """
        import numpy as np

        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        sum_H = np.zeros(self._width)
        for start in range(0, len(ids), _BATCH_TOKENS):
            sum_H += self._states_TH(ids[start : start + _BATCH_TOKENS], start).sum(0)
        length = float(np.linalg.norm(sum_H))
        if not 0 < length < float("inf"):
            raise EngineError("the model's hidden states are no numbers; check the file")
        return (sum_H / length).astype(np.float32)

    def close(self) -> None:
        """Free the context, which must happen before the engine's model is freed."""
        self._c.llama_free(self._context)

    def _states_TH(self, ids: Sequence[int], position: int) -> "NDArray[np.float32]":
        import numpy as np

        self._batch.clear()
        self._batch.add(Work(0, ids, len(ids)), position)
        status = self._c.llama_decode(self._context, self._batch.struct)
        if status != 0:
            raise EngineError(f"llama.cpp failed to embed {len(ids)} tokens (status {status})")
        pointer = self._c.llama_get_embeddings(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(ids), self._width))
