"""A GGUF file run by llama.cpp, through the C functions that llama-cpp-python exposes.

The header is checked before the native loader sees the file; the library's high-level class
is left out, so that Python adds almost nothing between two tokens.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, MissingExtraError, ModelError
from edgekd.runtime.engine import check_fits
from edgekd.runtime.gguf_header import read_gguf_header

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

_BATCH_TOKENS = 512  # llama.cpp's own default for n_ubatch


class LlamaCppEngine:
    """One GGUF model with the KV cache of one sequence."""

    name = "llama.cpp"

    def __init__(self, path: Path, context_tokens: int, n_threads: int) -> None:
        """Load the model at ``path`` on ``n_threads`` CPU threads.

        Raises:
            ModelError: the file is malformed, or llama.cpp refuses it.
        """
        self._c = c = load_library()
        read_gguf_header(path)
        self.model = load_gguf(path)
        self._context = _new_context(self.model, path, context_tokens, n_threads)
        self._memory = c.llama_get_memory(self._context)
        self._batch = _new_batch(c)
        self.vocab_size = int(c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model)))
        self.context_tokens = context_tokens
        self._position = 0

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        return self._position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> "Logits":
        """Append ``ids``; return the logits after the last one [V], or after each [T, V]."""
        import numpy as np

        check_fits(self, len(ids))
        parts = []
        for start in range(0, len(ids), _BATCH_TOKENS):
            chunk = ids[start : start + _BATCH_TOKENS]
            is_last = start + len(chunk) == len(ids)
            n_outputs = len(chunk) if every_logit else int(is_last)
            self._decode(chunk, n_outputs)
            if n_outputs:
                parts.append(self._read_logits(n_outputs))
        logits_TV = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return logits_TV if every_logit else logits_TV[-1]

    def rewind(self, position: int = 0) -> None:
        """Forget every token from ``position`` on."""
        if not self._c.llama_memory_seq_rm(self._memory, 0, position, -1):
            raise EngineError("llama.cpp cannot drop part of this model's KV cache")
        self._position = min(position, self._position)

    def close(self) -> None:
        """Free the model and its context; the engine cannot be used after."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self.model)

    def _decode(self, ids: Sequence[int], n_outputs: int) -> None:
        """Run one batch; logits are computed for its last ``n_outputs`` tokens."""
        batch = self._batch
        batch.n_tokens = len(ids)
        tokens, positions, outputs = batch.token, batch.pos, batch.logits
        for i, token_id in enumerate(ids):
            tokens[i] = token_id
            positions[i] = self._position + i
            outputs[i] = i >= len(ids) - n_outputs
        status = self._c.llama_decode(self._context, batch)
        if status != 0:
            raise EngineError(f"llama.cpp failed to decode {len(ids)} tokens (status {status})")
        self._position += len(ids)

    def _read_logits(self, n_outputs: int) -> "Logits":
        import numpy as np

        pointer = self._c.llama_get_logits(self._context)
        # Not np.ctypeslib.as_array: of a pointer it takes 40 us, 1 % of a small model's token.
        room = ctypes.c_float * (n_outputs * self.vocab_size)
        memory: Any = room.from_address(ctypes.addressof(pointer.contents))
        flat_O = np.frombuffer(memory, np.float32)
        logits_OV: Logits = flat_O.reshape(n_outputs, self.vocab_size).copy()
        return logits_OV


class LlamaCppTokenizer:
    """The tokenizer inside a GGUF file, as llama.cpp applies it."""

    def __init__(self, model: Any) -> None:
        """Read the vocabulary of a loaded llama.cpp ``model``."""
        self._c = c = load_library()
        self._vocab = c.llama_model_get_vocab(model)
        self.n_ids = int(c.llama_vocab_n_tokens(self._vocab))
        self.stop_ids = frozenset(
            i for i in range(self.n_ids) if c.llama_vocab_is_eog(self._vocab, i)
        )

    @property
    def first_id(self) -> int | None:
        """BOS, or EOS where there is none: what a text begins after."""
        named = (self._c.llama_vocab_bos(self._vocab), self._c.llama_vocab_eos(self._vocab))
        return next((token_id for token_id in named if token_id >= 0), None)  # -1: there is none

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Return the ids of ``text``; names of special tokens in it become those tokens."""
        raw = text.encode("utf-8")
        room = len(raw) + 8  # at most one token a byte, and the ones added at the ends
        ids = (self._c.llama_token * room)()
        count = self._c.llama_tokenize(
            self._vocab, raw, len(raw), ids, room, add_special, parse_special
        )
        if count < 0:
            raise EngineError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes")
        return list(ids[:count])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of ``token_id``; none for a special token."""
        return self._piece(token_id, 256, False)

    def raw_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of ``token_id``, a special token's name included."""
        return self._piece(token_id, 256, True)

    def _piece(self, token_id: int, room: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(room)
        length = self._c.llama_token_to_piece(self._vocab, token_id, buffer, room, 0, special)
        return buffer.raw[:length] if length >= 0 else self._piece(token_id, -length, special)


class LlamaCppVocabulary(LlamaCppTokenizer):
    """The tokenizer of a GGUF file, loaded without the weights."""

    def __init__(self, path: Path) -> None:
        """Load only the vocabulary of the file at ``path``."""
        read_gguf_header(path)
        self.model = load_gguf(path, vocab_only=True)
        super().__init__(self.model)

    def close(self) -> None:
        """Free the vocabulary."""
        self._c.llama_model_free(self.model)


@cache
def load_library() -> Any:
    """Return llama.cpp's C functions, its log silenced.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        raise MissingExtraError("llama-cpp-python", "gguf") from error
    llama_cpp.llama_log_set(_drop_log_line(llama_cpp), None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache
def _drop_log_line(llama_cpp: Any) -> Any:
    """Return a C callback that drops a log line; cached, since C keeps only the pointer."""
    return llama_cpp.llama_log_callback(lambda level, text, user_data: None)


def load_gguf(
    path: Path, *, vocab_only: bool = False, gpu_layers: int | None = None, mmap: bool = True
) -> Any:
    """Return llama.cpp's handle of the model at ``path``; the caller has to free it.

    ``gpu_layers`` None puts all of them on a GPU where the library was built for one.

    Raises:
        ModelError: llama.cpp refuses the file.
    """
    c = load_library()
    params = c.llama_model_default_params()
    params.vocab_only = vocab_only
    if gpu_layers is not None:
        params.n_gpu_layers = gpu_layers
    if not mmap:
        params.load_mode = c.LLAMA_LOAD_MODE_NONE
    model = c.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise ModelError(
            f"llama.cpp cannot load {path}: its header is sound, so the architecture or the "
            "tokenizer is one that this build does not know"
        )
    return model


def _new_batch(c: Any) -> Any:
    """Return a batch whose tokens all belong to sequence 0, which never changes."""
    batch = c.llama_batch_init(_BATCH_TOKENS, 0, 1)
    for i in range(_BATCH_TOKENS):
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
    return batch


def _new_context(model: Any, path: Path, context_tokens: int, n_threads: int) -> Any:
    c = load_library()
    params = c.llama_context_default_params()
    params.n_ctx = context_tokens
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.n_threads = params.n_threads_batch = n_threads
    context = c.llama_init_from_model(model, params)
    if not context:
        raise EngineError(
            f"llama.cpp cannot make a context of {context_tokens} tokens for {path}; lower --ctx"
        )
    return context
