"""What a model on disk asks of a machine, from headers alone: no engine, numpy or torch."""

import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from edgekd.devices.workload import Workload, kv_bytes
from edgekd.errors import ModelError
from edgekd.runtime.gguf_header import GgufHeader, read_gguf_header
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.onnx_header import OnnxHeader, read_onnx_header
from edgekd.runtime.tokenizer import read_json
from edgekd.untrusted import parse_json, untrusted

_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself allows
_VALUE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
_EMBEDDINGS = ("token_embd.weight", "model.embed_tokens.weight")
_HEADS = ("output.weight", "lm_head.weight")


def read_workload(model: str, quant: str | None = None, revision: str | None = None) -> Workload:
    """Return what ``model`` asks of a machine; with its weights as ``quant`` where that is given.

    Raises:
        ModelError: it cannot be read.
        DeviceError: there is no such quantization.
    """
    kind, path = locate_model(model, revision)
    reader = {
        ModelKind.GGUF: _read_gguf,
        ModelKind.ONNX: _read_onnx,
        ModelKind.CHECKPOINT: _read_checkpoint,
    }[kind]
    with untrusted(path):
        workload = reader(path)
    return workload.in_quant(quant) if quant else workload


def _read_gguf(path: Path) -> Workload:
    header = read_gguf_header(path)
    tensors = [(t.name, t.shape, t.size_bytes, t.type_name) for t in header.tensors]
    architecture = header.metadata.get("general.architecture")
    prefix = f"{architecture}."
    facts = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    kv, vocab = _gguf_kv_bytes(path, facts), _gguf_vocab(header, facts)
    return _workload(path, tensors, kv, vocab, int(facts["block_count"]), _share(facts))


def _gguf_kv_bytes(path: Path, facts: dict[str, Any]) -> int:
    """Return the bytes per token; a list of head counts, one for each layer, is summed."""
    try:
        layers, heads = int(facts["block_count"]), facts["attention.head_count"]
        kv_heads = facts.get("attention.head_count_kv", heads)
        n_heads = max(heads) if isinstance(heads, list) else int(heads)
        head_dim = facts.get("attention.key_length") or facts["embedding_length"] // n_heads
        total = sum(kv_heads) if isinstance(kv_heads, list) else layers * int(kv_heads)
        return kv_bytes(1, int(total), int(head_dim))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{path} does not tell its attention heads: {error!r}") from error


def _gguf_vocab(header: GgufHeader, facts: dict[str, Any]) -> int:
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    return len(tokens) if isinstance(tokens, list) and tokens else int(facts.get("vocab_size", 0))


def _share(facts: dict[str, Any]) -> float:
    """Return the part of its experts that a token uses, 1 where there are none."""
    used, count = facts.get("expert_used_count"), facts.get("expert_count")
    return used / count if isinstance(used, int) and isinstance(count, int) and count else 1.0


def _read_checkpoint(folder: Path) -> Workload:
    config = read_json(folder / "config.json")
    config = config.get("text_config", config)
    is_tied = bool(config.get("tie_word_embeddings"))
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _safetensors_header(file).items():
            # Some checkpoints store the tied copy again.
            if name != "__metadata__" and not (is_tied and name == "lm_head.weight"):
                shape, kind = entry["shape"], entry["dtype"]
                size = math.prod(shape) * _VALUE_BYTES.get(kind, 1)
                tensors.append((name, tuple(shape), size, kind))
    kv = _config_kv_bytes(folder, config)
    used = config.get("num_experts_per_tok")
    count = config.get("num_local_experts") or config.get("num_experts")
    share = used / count if used and count else 1.0
    vocab, layers = int(config.get("vocab_size", 0)), int(config["num_hidden_layers"])
    return _workload(folder, tensors, kv, vocab, layers, share)


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER_BYTES, file.stat().st_size):
                raise ModelError(f"{file} claims a header of {length} bytes; fetch it again")
            header = parse_json(stream.read(length))
    except (struct.error, ValueError, OSError) as error:
        raise ModelError(f"{file} is no safetensors file or is cut short: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is no safetensors file: its header is no table")
    return header


def _config_kv_bytes(folder: Path, config: dict[str, Any], value_bytes: int | None = None) -> int:
    try:
        heads = int(config["num_attention_heads"])
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = int(config.get("num_key_value_heads") or heads)
        return kv_bytes(int(config["num_hidden_layers"]), kv_heads, int(head_dim), value_bytes)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder}/config.json does not tell its attention: {error!r}") from error


def _read_onnx(folder: Path) -> Workload:
    header: OnnxHeader = read_onnx_header(folder / "model.onnx")
    config = read_json(folder / "config.json")
    kv = _config_kv_bytes(folder, config, header.cache_value_bytes)
    read_bytes = sum(t.size_bytes for t in header.tensors if not t.is_looked_up)
    stored_bytes = sum(t.size_bytes for t in header.tensors)
    hidden, vocab = int(config.get("hidden_size", 0)), int(config.get("vocab_size", 0))
    layers = int(config["num_hidden_layers"])
    head = hidden * vocab
    multiplied = sum(header.matrix_sizes)
    return Workload(
        name=str(folder),
        format=header.format,
        n_body=max(0, multiplied - head),
        n_head=head,
        n_embedding=head if header.has_own_embedding else 0,
        n_small=hidden * (2 * layers + 1),
        stored_bytes=stored_bytes,
        read_bytes=read_bytes,
        kv_bytes_per_token=kv,
        vocab_size=vocab,
        n_layers=layers,
    )


def _workload(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...], int, str]],
    kv_bytes_per_token: int,
    vocab_size: int,
    n_layers: int,
    active_share: float,
) -> Workload:
    """Return the workload of named tensors: name, shape, bytes and type of each."""
    embeddings = {row[0]: row for row in tensors if row[0] in _EMBEDDINGS}
    heads = {row[0]: row for row in tensors if row[0] in _HEADS}
    # Without a head of its own the model multiplies by its embedding.
    outer, looked_up = (heads, embeddings) if heads else (embeddings, {})
    rest = [row for row in tensors if row[0] not in embeddings | heads]
    body = [row for row in rest if len(row[1]) > 1]
    experts = [row for row in body if "exps" in row[0] or ".experts." in row[0]]
    body_bytes, expert_bytes = _bytes(body), _bytes(experts)
    read = body_bytes - expert_bytes + expert_bytes * active_share
    read += _bytes(outer.values()) + _bytes([row for row in rest if len(row[1]) == 1])
    return Workload(
        name=str(path),
        format=_commonest(body),
        n_body=_count(body),
        n_head=_count(outer.values()),
        n_embedding=_count(looked_up.values()),
        n_small=_count([row for row in rest if len(row[1]) == 1]),
        stored_bytes=_bytes(tensors),
        read_bytes=round(read),
        kv_bytes_per_token=kv_bytes_per_token,
        vocab_size=vocab_size,
        n_layers=n_layers,
        active_share=(body_bytes - expert_bytes * (1 - active_share)) / max(1, body_bytes),
    )


def _commonest(rows: list[tuple[str, tuple[int, ...], int, str]]) -> str:
    """Return the type that most bytes of ``rows`` have."""
    sizes: Counter[str] = Counter()
    for _, _, size_bytes, type_name in rows:
        sizes[type_name] += size_bytes
    return sizes.most_common(1)[0][0] if sizes else "F32"


def _bytes(rows: Any) -> int:
    return sum(row[2] for row in rows)


def _count(rows: Any) -> int:
    return sum(math.prod(row[1]) for row in rows)
