"""Many sequences of one GGUF file in one llama.cpp context.

The batch that llama_decode reads is made once, over numpy arrays, so that a step costs a few
assignments and no allocation. Functions: llama.h of llama.cpp.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.batch_engine import (
    BATCH_TOKENS,
    MAX_OUTPUTS,
    EngineOptions,
    Work,
    check_step,
)
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.huge_pages import in_huge_pages
from edgekd.runtime.llamacpp_engine import load_gguf, load_library

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# T tokens of one batch, N outputs of one slot, V vocabulary

_KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # enum ggml_type
_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # enum llama_flash_attn_type
_NO_KV_CELLS = 1  # what llama_decode returns when the cache is full


class LlamaCppBatchEngine:
    """One GGUF model with the KV caches of many sequences."""

    name = "llama.cpp"
    batch_tokens = BATCH_TOKENS

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load the model at ``path``; its trained context bounds ``context_tokens``.

        Raises:
            ModelError: the file is malformed, or llama.cpp refuses it.
            EngineError: there is no memory for the contexts.
            RecipeError: the library cannot do what ``options`` ask for.
        """
        self.c = c = load_library()
        read_gguf_header(path)
        _check_options(c, options)
        with in_huge_pages():
            self.model = load_gguf(path, gpu_layers=options.gpu_layers, mmap=options.mmap)
        self.n_slots = options.n_slots
        self.n_threads = options.n_threads
        self.max_outputs = max(MAX_OUTPUTS, options.n_slots)
        self.context_tokens = min(
            options.context_tokens, int(c.llama_model_n_ctx_train(self.model))
        )
        self.vocab_size = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model)))
        self._row_type = ctypes.c_float * self.vocab_size
        self._is_unified = options.unified_kv
        self._context = self._new_context(options)
        self._memory = c.llama_get_memory(self._context)
        self._batch = Batch(c, self.batch_tokens)
        self._lengths = [0] * options.n_slots

    def length(self, slot: int) -> int:
        """Return how many tokens ``slot`` holds."""
        return self._lengths[slot]

    def step(self, work: Sequence[Work]) -> "list[Logits]":
        """Append the tokens; return each item's logits [N, V], valid until the next step."""
        check_step(self, work)
        self._batch.clear()
        # In the order of the slots: llama.cpp passes once over the weights for every run of
        # sequences whose ids go up by one (llama_batch_allocr::split_equal).
        rows = {
            item.slot: self._batch.add(item, self._lengths[item.slot])
            for item in sorted(work, key=lambda item: item.slot)
        }
        status = self.c.llama_decode(self._context, self._batch.struct)
        if status != 0:
            self._drop_half_done(work)
            raise EngineError(self._what_failed(status, work))
        for item in work:
            self._lengths[item.slot] += len(item.ids)
        return [self._read_logits(rows[item.slot]) for item in work]

    def forget(self, slot: int, position: int = 0) -> int:
        """Drop every token from ``position`` on; return how many are left.

        A recurrent model keeps all or nothing.
        """
        if position >= self._lengths[slot]:
            return self._lengths[slot]
        if not self.c.llama_memory_seq_rm(self._memory, slot, position, -1):
            self.c.llama_memory_seq_rm(self._memory, slot, -1, -1)
            position = 0
        self._lengths[slot] = position
        return position

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> int:
        """Make ``target`` begin as ``source`` does, drop the rest; return how many tokens."""
        self.forget(target, 0)
        n_tokens = min(n_tokens, self._lengths[source])
        if n_tokens == 0:
            return 0
        # Between pools, only whole sequences can be copied.
        end = n_tokens if self._is_unified else -1
        self.c.llama_memory_seq_cp(self._memory, source, target, -1, end)
        self._lengths[target] = n_tokens if self._is_unified else self._lengths[source]
        return self.forget(target, n_tokens)

    def close(self) -> None:
        """Free the model and its context; the engine cannot be used after."""
        self.c.llama_free(self._context)
        self.c.llama_model_free(self.model)

    def _new_context(self, options: EngineOptions) -> Any:
        c = self.c
        params = c.llama_context_default_params()
        params.n_ctx = self.context_tokens * options.n_slots
        params.n_batch = params.n_ubatch = self.batch_tokens
        params.n_seq_max = options.n_slots
        params.n_outputs_max = self.max_outputs
        params.n_threads = options.n_threads
        params.n_threads_batch = options.n_threads_batch or options.n_threads
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.type_k = params.type_v = _KV_TYPES[options.kv_type]
        params.kv_unified = options.unified_kv
        context = c.llama_init_from_model(self.model, params)
        if not context:
            c.llama_model_free(self.model)
            raise EngineError(
                f"llama.cpp cannot make {options.n_slots} contexts of {self.context_tokens} "
                f"tokens with a {options.kv_type} KV cache; lower --ctx or --parallel (and a "
                "quantized cache needs a head size that is a multiple of 32)"
            )
        return context

    def _read_logits(self, rows: range) -> "Logits":
        """Return the logits after the tokens ``rows`` of the batch, one row without a copy."""
        import numpy as np

        found = [self._logits_at(row) for row in rows]
        if len(found) == 1:
            return found[0][None]
        return np.stack(found) if found else np.empty((0, self.vocab_size), np.float32)

    def _logits_at(self, row: int) -> "Logits":
        import numpy as np

        pointer = self.c.llama_get_logits_ith(self._context, row)
        # Not np.ctypeslib.as_array: of a pointer it takes 40 us, for each text of a step.
        memory: Any = self._row_type.from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memory, np.float32)

    def _drop_half_done(self, work: Sequence[Work]) -> None:
        """Remove what a failed step left in the cache."""
        for item in work:
            kept = self._lengths[item.slot]
            if not self.c.llama_memory_seq_rm(self._memory, item.slot, kept, -1):
                self.c.llama_memory_seq_rm(self._memory, item.slot, -1, -1)
                self._lengths[item.slot] = 0

    def _what_failed(self, status: int, work: Sequence[Work]) -> str:
        n_tokens = sum(len(item.ids) for item in work)
        if status == _NO_KV_CELLS:
            return (
                f"no room for {n_tokens} more tokens in the KV cache of {self.n_slots} times "
                f"{self.context_tokens} tokens; lower --parallel or raise --ctx"
            )
        return f"llama.cpp failed to decode {n_tokens} tokens (status {status})"


class Batch:
    """A llama_batch over numpy arrays; every token belongs to one sequence."""

    def __init__(self, c: Any, room: int) -> None:
        """Make room for ``room`` tokens."""
        import numpy as np

        self._ids_T = np.zeros(room, np.int32)
        self._positions_T = np.zeros(room, np.int32)
        self._slots_T = np.zeros(room, np.int32)
        self._has_output_T = np.zeros(room, np.int8)
        self._ones_T = np.ones(room, np.int32)
        start, width = self._slots_T.ctypes.data, self._slots_T.itemsize
        self._slot_pointers_T = (start + width * np.arange(room)).astype(np.uintp)
        self.struct = c.llama_batch()
        for field, array in (
            ("token", self._ids_T),
            ("pos", self._positions_T),
            ("n_seq_id", self._ones_T),
            ("seq_id", self._slot_pointers_T),
            ("logits", self._has_output_T),
        ):
            kind = dict(c.llama_batch._fields_)[field]
            setattr(self.struct, field, ctypes.cast(array.ctypes.data, kind))
        self.clear()

    def clear(self) -> None:
        """Begin a new batch."""
        self.struct.n_tokens = 0

    def add(self, item: Work, position: int) -> range:
        """Append the tokens of ``item``; return where those with an output stand."""
        start = self.struct.n_tokens
        end = start + len(item.ids)
        self._ids_T[start:end] = item.ids
        self._positions_T[start:end] = range(position, position + len(item.ids))
        self._slots_T[start:end] = item.slot
        self._has_output_T[start:end] = 0
        self._has_output_T[end - item.n_outputs : end] = 1
        self.struct.n_tokens = end
        return range(end - item.n_outputs, end)


def _check_options(c: Any, options: EngineOptions) -> None:
    if options.gpu_layers and not c.llama_supports_gpu_offload():
        raise RecipeError(
            f"{options.gpu_layers} layers on a GPU are asked for, and this llama-cpp-python is "
            "built for the CPU only; install one built for your GPU, or leave --gpu-layers out"
        )
    if options.kv_type in ("q8_0", "q4_0") and options.flash_attention is False:
        raise RecipeError(
            f"a {options.kv_type} KV cache needs flash attention, which is switched off; "
            "leave it on, or use f16"
        )
