"""The Llama family (Llama 1-3, SmolLM, SmolLM2, Mistral): names, row order and RoPE.

One table serves both directions, GGUF out and GGUF in.
"""

import math
import re
from typing import Any

import torch

from edgekd.errors import ExportError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
GGUF_ARCHITECTURE = "llama"

# HF name without "model.layers.N." -> GGUF name without "blk.N."
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES_BACK = {gguf: hf for hf, gguf in _LAYER_NAMES.items()}
_OUTER_NAMES_BACK = {gguf: hf for hf, gguf in _OUTER_NAMES.items()}
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def check_supported(config: dict[str, Any]) -> None:
    """Refuse a config that this module would translate wrongly.

    Raises:
        ExportError: another architecture, or an option of it that is not supported.
    """
    found = (config.get("architectures") or ["none"])[0]
    if found not in ARCHITECTURES:
        raise ExportError(
            f"architecture {found} cannot be exported yet; supported are {', '.join(ARCHITECTURES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"activation {config['hidden_act']!r} is not one of Llama's: silu")
    if found == "MistralForCausalLM" and config.get("sliding_window"):
        raise ExportError(
            f"a sliding window of {config['sliding_window']} tokens is not supported; "
            "set sliding_window to null in config.json if the model never exceeds it"
        )
    rope_inv_freq(config)


def to_gguf_name(name: str) -> str:
    """Return the GGUF name of the checkpoint tensor ``name``.

    Raises:
        ExportError: a Llama model has no such tensor.
    """
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    match = _HF_LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    raise ExportError(f"tensor {name!r} is none of a Llama model's; its architecture differs")


def to_hf_name(name: str) -> str | None:
    """Return the checkpoint name of the GGUF tensor ``name``; none for derived ones."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_NAMES_BACK:
        return f"{_OUTER_NAMES_BACK[stem]}.{suffix}"
    match = _GGUF_LAYER.fullmatch(name)
    if match and match[2] in _LAYER_NAMES_BACK:
        return f"model.layers.{match[1]}.{_LAYER_NAMES_BACK[match[2]]}.{match[3]}"
    return None


def rotated_heads(hf_name: str, n_heads: int, n_kv_heads: int) -> int | None:
    """Return how many heads' rows GGUF interleaves in this tensor; none for most tensors."""
    return {"q_proj": n_heads, "k_proj": n_kv_heads}.get(hf_name.split(".")[-2])


def interleave_rows(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return the rows of a q or k projection in llama.cpp's order.

    transformers rotates the first half of a head against the second, llama.cpp's
    ``LLAMA_ROPE_TYPE_NORM`` neighbours: rows i and i + d/2 become 2i and 2i + 1.
    """
    return _swap_halves(tensor, n_heads, 2, -1)


def deinterleave_rows(tensor: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return the rows in transformers' order, the inverse of :func:`interleave_rows`."""
    return _swap_halves(tensor, n_heads, -1, 2)


def rope_theta(config: dict[str, Any]) -> float:
    """Return the base of the rotary frequencies, wherever this transformers version put it."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def rope_factors(config: dict[str, Any]) -> torch.Tensor | None:
    """Return what each rotary frequency is divided by, float64 [head_dim / 2]; none if nothing.

    "linear" as in transformers; "llama3" after Llama 3.1: high frequencies stay, low ones are
    divided by the factor, those between are interpolated.

    Raises:
        ExportError: a RoPE scaling of another kind.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    freqs = _plain_inv_freq(config)
    if kind == "linear":
        return torch.full_like(freqs, float(rope["factor"]))
    if kind != "llama3":
        raise ExportError(f"RoPE scaling {kind!r} is not supported; known: default, linear, llama3")
    factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def rope_inv_freq(config: dict[str, Any]) -> torch.Tensor:
    """Return the rotary frequencies in radians per token, float64 [head_dim / 2]."""
    freqs = _plain_inv_freq(config)
    factors = rope_factors(config)
    return freqs if factors is None else freqs / factors


def _plain_inv_freq(config: dict[str, Any]) -> torch.Tensor:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return torch.pow(rope_theta(config), -exponents)


def _swap_halves(tensor: torch.Tensor, n_heads: int, outer: int, inner: int) -> torch.Tensor:
    shape = tensor.shape
    return tensor.reshape(n_heads, outer, inner, *shape[1:]).transpose(1, 2).reshape(shape)
