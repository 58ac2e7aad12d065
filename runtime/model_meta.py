"""What llama-server's ``/v1/models`` says of a model beside its name, as far as its files tell."""

import math
from pathlib import Path
from typing import Any

from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.tokenizer import FileTokenizer, Tokenizer, read_json

Json = dict[str, Any]

_GGUF_VOCABULARIES = {"llama": 1, "gpt2": 2, "bert": 3, "t5": 4, "rwkv": 5}
_FILE_VOCABULARIES = {"BPE": 2, "WordPiece": 3, "Unigram": 4}
"""Both to ``enum llama_vocab_type`` of llama.h; 1 is SentencePiece's BPE."""
_WEIGHT_SUFFIXES = (".onnx", ".data", ".bin", ".safetensors")


def read_meta(kind: ModelKind, path: Path, tokenizer: Tokenizer) -> Json:
    """Return kind of vocabulary, context, width, parameters and bytes; None where unknown.

    Raises:
        ModelError: the files are malformed.
    """
    return _meta_of_gguf(path) if kind == ModelKind.GGUF else _meta_of_folder(kind, path, tokenizer)


def _meta_of_gguf(path: Path) -> Json:
    header = read_gguf_header(path)
    named = header.metadata
    family = named.get("general.architecture")
    return {
        "vocab_type": _GGUF_VOCABULARIES.get(str(named.get("tokenizer.ggml.model"))),
        "n_ctx_train": _count(named.get(f"{family}.context_length")),
        "n_embd": _count(named.get(f"{family}.embedding_length")),
        "n_params": sum(math.prod(tensor.shape) for tensor in header.tensors),
        "size": sum(tensor.size_bytes for tensor in header.tensors),
    }


def _meta_of_folder(kind: ModelKind, path: Path, tokenizer: Tokenizer) -> Json:
    config = read_json(path / "config.json")
    # Packed matrices of a graph do not tell how many weights they hold.
    n_params = read_facts(kind, path).n_parameters.value if kind == ModelKind.CHECKPOINT else None
    return {
        "vocab_type": _vocabulary_of(tokenizer),
        "n_ctx_train": _count(config.get("max_position_embeddings")),
        "n_embd": _count(config.get("hidden_size")),
        "n_params": None if n_params is None else int(n_params),
        "size": sum(file.stat().st_size for file in path.iterdir() if _is_weights(file)),
    }


def _vocabulary_of(tokenizer: Tokenizer) -> int | None:
    if not isinstance(tokenizer, FileTokenizer):
        return None
    model = tokenizer.core.model
    if getattr(model, "byte_fallback", False):
        return _GGUF_VOCABULARIES["llama"]
    return _FILE_VOCABULARIES.get(type(model).__name__)


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES and file.is_file()


def _count(found: Any) -> int | None:
    """Return a number that a file gives, which may give anything."""
    return found if isinstance(found, int) and not isinstance(found, bool) else None
