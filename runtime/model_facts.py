"""What a model's files say about the work of one token: weights read, weights multiplied, KV cache.

A decode step reads every matrix once, so its speed is bounded by bytes over bandwidth; a prompt
token multiplies every parameter of the body once, and the head only for the last one. A table
from which only rows are looked up counts for neither.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.devices.reading import Reading
from edgekd.runtime.gguf_header import GgufHeader, read_gguf_header
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.onnx_check import check_onnx
from edgekd.runtime.static_model import is_static, read_static
from edgekd.runtime.tokenizer import read_json
from edgekd.untrusted import parse_json, untrusted

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
_LLAMACPP_KV_BYTES = 2  # f16, the engine's default for both sides
# Models that do not keep one key and one value of every layer for every token.
_OTHER_CACHES = ("ssm.", "attention.kv_lora_rank", "attention.sliding_window", "wkv.")
_RESHAPING = ("Cast", "Transpose")
_ONNX_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 10: 2, 16: 2}  # TensorProto.DataType


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes that bound the speed; each names its source, or why it is unknown."""

    n_parameters: Reading
    prefill_parameters: Reading
    """Multiplied for each prompt token: without embedding and head."""
    weight_bytes_per_token: Reading
    """Read by one decode step."""
    kv_bytes_per_token: Reading
    """Added to the KV cache by each token."""


def read_facts(kind: ModelKind, path: Path) -> ModelFacts:
    """Return what the files of the model at ``path`` say.

    Raises:
        ModelError: they are malformed.
    """
    reader = {
        ModelKind.GGUF: _facts_of_gguf,
        ModelKind.ONNX: _facts_of_onnx,
        ModelKind.CHECKPOINT: _facts_of_checkpoint,
    }[kind]
    with untrusted(path):
        return reader(path)


def _facts(source: str, n_all: float, n_body: float, read_bytes: float, kv: Reading) -> ModelFacts:
    return ModelFacts(
        n_parameters=Reading.measured(n_all, "parameters", source),
        prefill_parameters=Reading.measured(n_body, "parameters", source),
        weight_bytes_per_token=Reading.measured(read_bytes, "bytes/token", source),
        kv_bytes_per_token=kv,
    )


def _unknown(source: str, reason: str) -> ModelFacts:
    names = ("parameters", "parameters", "bytes/token", "bytes/token")
    one, two, three, four = (Reading.unavailable(unit, source, reason) for unit in names)
    return ModelFacts(
        n_parameters=one,
        prefill_parameters=two,
        weight_bytes_per_token=three,
        kv_bytes_per_token=four,
    )


def _facts_of_gguf(path: Path) -> ModelFacts:
    header = read_gguf_header(path)
    used = _expert_share(header)
    is_tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
    n_all = n_body = read_bytes = 0.0
    for tensor in header.tensors:
        n_values = math.prod(tensor.shape)
        n_all += n_values
        share = used if "_exps" in tensor.name else 1.0
        is_table = tensor.name == "token_embd.weight"
        if not is_table and tensor.name != "output.weight" and len(tensor.shape) > 1:
            n_body += n_values * share
        if is_tied or not is_table:
            read_bytes += tensor.size_bytes * share
    return _facts(f"header of {path.name}", n_all, n_body, read_bytes, _kv_of_gguf(header))


def _expert_share(header: GgufHeader) -> float:
    n_experts = _setting(header, "expert_count")
    n_used = _setting(header, "expert_used_count")
    return n_used / n_experts if n_experts and n_used else 1.0


def _kv_of_gguf(header: GgufHeader) -> Reading:
    unit, source = "bytes/token", "header, f16 cache"
    architecture = header.metadata.get("general.architecture")
    others = [name for name in _OTHER_CACHES for key in header.metadata if f".{name}" in key]
    if others:
        reason = f"{architecture} does not keep keys and values of every layer for every token"
        return Reading.unavailable(unit, source, reason)
    n_layers, n_heads = _setting(header, "block_count"), _setting(header, "attention.head_count")
    n_kv_heads = _setting(header, "attention.head_count_kv") or n_heads
    width = _setting(header, "embedding_length")
    if not all(isinstance(value, int) and value for value in (n_layers, n_heads, width)):
        return Reading.unavailable(unit, source, "the header names no layers, heads or width")
    sides = [_setting(header, f"attention.{side}_length") for side in ("key", "value")]
    head_dims = sum(side or width // n_heads for side in sides)
    all_heads = sum(n_kv_heads) if isinstance(n_kv_heads, list) else n_layers * n_kv_heads
    return Reading.measured(all_heads * head_dims * _LLAMACPP_KV_BYTES, unit, source)


def _setting(header: GgufHeader, name: str) -> Any:
    return header.metadata.get(f"{header.metadata.get('general.architecture')}.{name}")


def _facts_of_checkpoint(path: Path) -> ModelFacts:
    config = read_json(path / "config.json")
    is_tied = bool(config.get("tie_word_embeddings"))
    tensors = dict(_safetensors(sorted(path.glob("*.safetensors"))))
    source = f"safetensors of {path.name}"
    sizes = {
        name: (math.prod(entry["shape"]), len(entry["shape"]), _ITEM_BYTES.get(entry["dtype"], 0))
        for name, entry in tensors.items()
    }
    outside = {name for name in sizes if "embed_tokens" in name or name.startswith("lm_head")}
    tables = {name for name in outside if "embed_tokens" in name and not is_tied}
    return _facts(
        source,
        sum(n for n, _, _ in sizes.values()),
        sum(n for name, (n, rank, _) in sizes.items() if name not in outside and rank > 1),
        sum(n * item for name, (n, _, item) in sizes.items() if name not in tables),
        _kv_of_config(config, max((item for _, _, item in sizes.values()), default=0)),
    )


def _safetensors(files: Iterable[Path]) -> Iterable[tuple[str, dict[str, Any]]]:
    for file in files:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
            header = parse_json(opened.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
        yield from header.items()


def _kv_of_config(config: dict[str, Any], item_bytes: int) -> Reading:
    unit, source = "bytes/token", "config.json, cache in the type of the weights"
    try:
        n_heads = config["num_attention_heads"]
        n_kv_heads = config.get("num_key_value_heads") or n_heads
        head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
        size = 2 * config["num_hidden_layers"] * n_kv_heads * head_dim * item_bytes
    except (KeyError, TypeError) as error:
        return Reading.unavailable(unit, source, f"config.json names no {error}")
    return Reading.measured(size, unit, source)


def _facts_of_onnx(path: Path) -> ModelFacts:
    source = f"graph of {path.name}"
    try:
        import onnx
    except ImportError:
        return _unknown(source, "reading a graph needs the onnx package: pip install onnx")
    names = read_static(path).parts("decode") if is_static(path) else ["model"]
    files = [path / f"{name}.onnx" for name in names]
    for file in files:
        if not file.is_file():
            return _unknown(source, f"{path.name} holds binaries for an NPU, and no {file.name}")
        check_onnx(file)
    graphs = [onnx.load(file, load_external_data=False).graph for file in files]
    nodes = [node for graph in graphs for node in graph.node]
    weights = {entry.name: entry for graph in graphs for entry in graph.initializer}
    origins = {node.output[0]: node.input[0] for node in nodes if node.op_type in _RESHAPING}
    looked_up: set[str] = set()
    multiplied: set[str] = set()
    n_all = n_body = 0
    for node in nodes:
        read_by = {_origin(name, origins) for name in node.input} & weights.keys()
        if node.op_type.startswith("Gather"):
            looked_up |= read_by
        elif node.op_type not in _RESHAPING:
            multiplied |= read_by
        if node.op_type in ("MatMulNBits", "MatMul", "Gemm"):
            n_values = _n_values(node, [weights[name].dims for name in read_by])
            n_all += n_values
            n_body += 0 if "logits" in node.output else n_values
    read = sum(_onnx_bytes(weights[name]) for name in weights.keys() - (looked_up - multiplied))
    n_slots = read_static(path).context_tokens if is_static(path) else 1
    inputs = [entry for graph in graphs for entry in graph.input]
    kv_bytes = sum(_kv_row_bytes(entry) for entry in inputs) // n_slots
    kv = Reading.measured(kv_bytes, "bytes/token", source)
    return _facts(f"{source}, matrices only", n_all, n_body, read, kv)


def _origin(name: str, origins: dict[str, str]) -> str:
    """Return the weight of which ``name`` is another form."""
    while name in origins:
        name = origins[name]
    return name


def _onnx_bytes(tensor: Any) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return int(math.prod(tensor.dims)) * _ONNX_ITEM_BYTES.get(tensor.data_type, 0)


def _n_values(node: Any, shapes: list[Any]) -> int:
    sizes = {entry.name: entry.i for entry in node.attribute}
    if "K" in sizes and "N" in sizes:
        return int(sizes["K"] * sizes["N"])
    return max((int(math.prod(dims)) for dims in shapes), default=0)


def _kv_row_bytes(entry: Any) -> int:
    """Return the bytes of an input ``past_key_values.*`` [B, heads, past, dim].

    Of one token, where ``past`` may be anything; of all of them where it is fixed.
    """
    if not entry.name.startswith("past_key_values."):
        return 0
    kind = entry.type.tensor_type
    fixed = [int(dim.dim_value) for dim in kind.shape.dim if dim.dim_value]
    return math.prod(fixed) * _ONNX_ITEM_BYTES.get(kind.elem_type, 0)
