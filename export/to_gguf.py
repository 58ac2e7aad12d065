"""Write a checkpoint as one GGUF file that llama.cpp reads.

Tensors are read, rounded and written one at a time, so memory stays near the largest of them as
it is stored; torch is not loaded.
"""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import (
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.gguf_general import write_general
from edgekd.export.gguf_tensors import FLOATS, stored_shape, stored_tensor
from edgekd.export.gguf_tokenizer import write_tokenizer
from edgekd.export.plan import Plan, Quant
from edgekd.export.rope import (
    long_rope,
    original_context,
    rope_factors,
    rope_settings,
    rope_theta,
    rotary_dim,
)
from edgekd.progress import Advance, Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer

if TYPE_CHECKING:
    import torch

_FILE_TYPES: dict[Quant, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}


def write_gguf(
    checkpoint: Checkpoint, plan: Plan, path: Path, progress: Progress | None = None
) -> None:
    """Write ``checkpoint`` to ``path`` with the types of ``plan``.

    Raises:
        ExportError: the architecture or the tokenizer has no GGUF form.
        ModelError: the model card is malformed.
    """
    writer = GGUFWriter(path, checkpoint.architecture.gguf)
    try:
        _write_front(writer, checkpoint, plan)
        with (progress or Silence()).track(f"writing {path.name}", len(plan.types)) as advance:
            _write_tensors(writer, checkpoint, plan, advance)
    finally:
        writer.close()


def overhead_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Return at most how many bytes of a GGUF file are no quantized matrix.

    That is metadata with the tokenizer, tensors kept as float, and the padding of each tensor.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        path = Path(folder) / "front.gguf"
        writer = GGUFWriter(path, checkpoint.architecture.gguf)
        try:
            _write_front(writer, checkpoint, plan)
        finally:
            writer.close()
        front_bytes = path.stat().st_size
    floats = [name for name in plan.types if plan.types[name] in FLOATS]
    # float32 is the widest; rope tensors have a value for every second channel of a head
    float_bytes = 4 * sum(math.prod(checkpoint.shape(name)) for name in floats)
    rope_bytes = sum(4 * len(factors) for factors in _rope_tensors(checkpoint).values())
    padding_bytes: int = GGUF_DEFAULT_ALIGNMENT * (len(plan.types) + 3)
    return front_bytes + float_bytes + rope_bytes + padding_bytes


def _write_front(writer: GGUFWriter, checkpoint: Checkpoint, plan: Plan) -> None:
    """Write everything in front of the weights."""
    tokenizer = FileTokenizer(checkpoint.folder)
    _declare_tensors(writer, checkpoint, plan)
    write_general(writer, checkpoint, tokenizer.core, _FILE_TYPES[plan.quant])
    _write_shape(writer, checkpoint)
    _write_rope(writer, checkpoint)
    template = read_chat_template(checkpoint.folder)
    write_tokenizer(writer, tokenizer, checkpoint.config, template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_shape(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_block_count(checkpoint.n_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(checkpoint.n_kv_heads)
    writer.add_key_length(checkpoint.head_dim)
    writer.add_value_length(checkpoint.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if (softcap := config.get("final_logit_softcapping")) is not None:
        writer.add_final_logit_softcapping(float(softcap))
    if checkpoint.architecture.global_every:
        writer.add_sliding_window(config["sliding_window"])
    elif checkpoint.architecture.gguf == "phi3":  # 0 is none; left out, builds differ in what it is
        writer.add_sliding_window(config.get("sliding_window") or 0)


def _write_rope(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(rope_theta(config))
    settings = rope_settings(config)
    if settings.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
    if checkpoint.architecture.global_every:
        writer.add_rope_freq_base_swa(rope_theta(config, is_windowed=True))
    if checkpoint.architecture.gguf == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original_context(config))
    if (scaling := long_rope(config)) is not None:
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)


def _declare_tensors(writer: GGUFWriter, checkpoint: Checkpoint, plan: Plan) -> None:
    for name, stored in plan.types.items():
        ggml_type = GGMLQuantizationType[stored.upper()]
        shape, dtype = stored_shape(checkpoint, name, stored)
        n_bytes = math.prod(shape) * dtype.itemsize
        gguf_name = checkpoint.architecture.to_gguf_name(name)
        writer.add_tensor_info(gguf_name, shape, dtype, n_bytes, ggml_type)
    for name, factors in _rope_tensors(checkpoint).items():
        writer.add_tensor_info(name, factors.shape, np.dtype(np.float32), 4 * len(factors))


def _write_tensors(
    writer: GGUFWriter, checkpoint: Checkpoint, plan: Plan, advance: Advance
) -> None:
    for number, name in enumerate(plan.types, 1):
        writer.write_tensor_data(stored_tensor(checkpoint, name, plan))
        advance(number, "tensors")
    for factors in _rope_tensors(checkpoint).values():
        writer.write_tensor_data(factors.float().numpy())


def _rope_tensors(checkpoint: Checkpoint) -> dict[str, "torch.Tensor"]:
    """Return the divisors of rotary frequencies that llama.cpp reads as tensors.

    Llama 3.1's scaling is one list of them; LongRoPE has one for contexts up to the original length
    and one for longer ones, between which llama.cpp chooses by the length it is started with.
    """
    if (scaling := long_rope(checkpoint.config)) is not None:
        return {
            "rope_factors_long.weight": scaling.long,
            "rope_factors_short.weight": scaling.short,
        }
    is_linear = rope_settings(checkpoint.config).get("rope_type") == "linear"
    factors = None if is_linear else rope_factors(checkpoint.config)
    return {} if factors is None else {"rope_freqs.weight": factors}
