"""Rotary embeddings as configs describe them: bases, scaling, and the tables that graphs hold."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import ExportError

if TYPE_CHECKING:
    import torch

_LONG_KINDS = ("longrope", "su")  # "su" is what Phi-3 first called it


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): two lists of divisors, chosen by the length of the text."""

    short: "torch.Tensor"
    """Divisor of each frequency up to the original context, float64 [rotary_dim / 2]."""
    long: "torch.Tensor"
    """The same beyond it."""
    attention_factor: float
    """What cosines and sines are multiplied by."""


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


def original_context(config: dict[str, Any]) -> int:
    """Return how many tokens the model was pretrained with, before its context was extended."""
    key = "original_max_position_embeddings"
    return int(rope_settings(config).get(key) or config.get(key) or 4096)  # as in Phi3Config


def long_rope(config: dict[str, Any]) -> LongRope | None:
    """Return the LongRoPE scaling of ``config``; none if it has another kind or none.

    Raises:
        ExportError: the lists are no list of one divisor for each frequency.
    """
    rope = rope_settings(config)
    if _kind(rope) not in _LONG_KINDS:
        return None
    import torch

    n_frequencies = rotary_dim(config) // 2
    short, long = (
        torch.tensor(rope.get(f"{name}_factor") or [], dtype=torch.float64)
        for name in ("short", "long")
    )
    if len(short) != n_frequencies or len(long) != n_frequencies:
        raise ExportError(
            f"LongRoPE has {len(short)} short and {len(long)} long factors for {n_frequencies} "
            "rotary frequencies; config.json is damaged"
        )
    return LongRope(short, long, _attention_factor(config, rope))


def _attention_factor(config: dict[str, Any], rope: dict[str, Any]) -> float:
    """Return ``attention_factor``, else what the paper derives from the contexts' ratio."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    original = original_context(config)
    ratio = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0


def rope_factors(config: dict[str, Any], *, is_windowed: bool = False) -> "torch.Tensor | None":
    """Return what each rotary frequency is divided by, float64 [rotary_dim / 2]; none if nothing.

    "linear" as in transformers; "llama3" after Llama 3.1: high frequencies stay, low ones are
    divided by the factor, those between are interpolated.

    Raises:
        ExportError: a RoPE scaling of another kind.
    """
    rope = rope_settings(config, is_windowed=is_windowed)
    kind = _kind(rope)
    if kind == "default":
        return None
    import torch

    freqs = _plain_inv_freq(config, is_windowed)
    if kind == "linear":
        return torch.full_like(freqs, float(rope["factor"]))
    if kind in _LONG_KINDS:
        raise ExportError(
            "RoPE scaling 'longrope' has two sets of frequencies, which only GGUF can hold; "
            "export as gguf"
        )
    if kind != "llama3":
        raise ExportError(f"RoPE scaling {kind!r} is not supported; known: default, linear, llama3")
    factor, low, high = (rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope["original_max_position_embeddings"] * freqs / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.reciprocal((1 - smooth) / factor + smooth)


def rope_inv_freq(config: dict[str, Any], *, is_windowed: bool = False) -> "torch.Tensor":
    """Return the rotary frequencies in radians per token, float64 [rotary_dim / 2]."""
    freqs = _plain_inv_freq(config, is_windowed)
    factors = rope_factors(config, is_windowed=is_windowed)
    return freqs if factors is None else freqs / factors


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _plain_inv_freq(config: dict[str, Any], is_windowed: bool) -> "torch.Tensor":
    import torch

    n_rotated = rotary_dim(config)
    exponents = torch.arange(0, n_rotated, 2, dtype=torch.float64) / n_rotated
    return torch.pow(rope_theta(config, is_windowed=is_windowed), -exponents)
