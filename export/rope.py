"""Rotary embeddings as configs describe them: bases, scaling, and the tables that graphs hold."""

import math
from typing import Any

import torch

from edgekd.errors import ExportError


def rope_settings(config: dict[str, Any], *, is_windowed: bool = False) -> dict[str, Any]:
    """Return the rotary settings of a layer, wherever this transformers version put them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = "sliding_attention" if is_windowed else "full_attention"
    if kind in rope:
        return dict(rope[kind])
    if is_windowed and (base := config.get("rope_local_base_freq")):
        return {"rope_type": "default", "rope_theta": base}
    return dict(rope)


def rope_theta(config: dict[str, Any], *, is_windowed: bool = False) -> float:
    """Return the base of the rotary frequencies."""
    settings = rope_settings(config, is_windowed=is_windowed)
    return float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def rotary_dim(config: dict[str, Any]) -> int:
    """Return how many channels of a head are rotated."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    settings = rope_settings(config)
    share = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(head_dim * share)


def rope_factors(config: dict[str, Any], *, is_windowed: bool = False) -> torch.Tensor | None:
    """Return what each rotary frequency is divided by, float64 [rotary_dim / 2]; none if nothing.

    "linear" as in transformers; "llama3" after Llama 3.1: high frequencies stay, low ones are
    divided by the factor, those between are interpolated.

    Raises:
        ExportError: a RoPE scaling of another kind.
    """
    rope = rope_settings(config, is_windowed=is_windowed)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    freqs = _plain_inv_freq(config, is_windowed)
    if kind == "linear":
        return torch.full_like(freqs, float(rope["factor"]))
    if kind != "llama3":
        raise ExportError(f"RoPE scaling {kind!r} is not supported; known: default, linear, llama3")
    factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def rope_inv_freq(config: dict[str, Any], *, is_windowed: bool = False) -> torch.Tensor:
    """Return the rotary frequencies in radians per token, float64 [rotary_dim / 2]."""
    freqs = _plain_inv_freq(config, is_windowed)
    factors = rope_factors(config, is_windowed=is_windowed)
    return freqs if factors is None else freqs / factors


def _plain_inv_freq(config: dict[str, Any], is_windowed: bool) -> torch.Tensor:
    n_rotated = rotary_dim(config)
    exponents = torch.arange(0, n_rotated, 2, dtype=torch.float64) / n_rotated
    return torch.pow(rope_theta(config, is_windowed=is_windowed), -exponents)
