"""What the exporters know about each family of models: names, row order, norms, attention.

One table serves every direction: GGUF out, GGUF in, ONNX out. A config that asks for something the
table would translate wrongly is refused.
"""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ExportError

if TYPE_CHECKING:
    import torch

Matrix = TypeVar("Matrix", "torch.Tensor", "NDArray[np.generic]")
Activation = Literal["silu", "gelu_tanh"]

# HF name without "model.layers.N." -> GGUF name without "blk.N."
_LLAMA_NAMES = {
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
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA3_NAMES = {
    **_LLAMA_NAMES,
    **_QK_NORMS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_PHI3_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """One family."""

    hf_names: tuple[str, ...]
    """As in ``architectures`` of config.json."""
    model_type: str
    """As in config.json; of a GGUF that is read back."""
    gguf: str
    """As in ``general.architecture``."""
    layer_names: dict[str, str] = field(default_factory=lambda: _LLAMA_NAMES)
    interleaves_rope: bool = False
    """Whether llama.cpp rotates neighbours, so that rows of q and k change places."""
    biases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Option of config.json to the matrices that have a bias where it is set."""
    fixed_biases: tuple[str, ...] = ()
    """The matrices that always have one."""
    ties_by_default: bool = False
    """Whether the head is the embedding where config.json does not say."""
    norm_offset: float = 0.0
    """What is added to a norm's stored weight: 1 for Gemma."""
    has_post_norms: bool = False
    """Whether outputs of attention and MLP are normalized before they are added."""
    activation: Activation = "silu"
    scales_embedding: bool = False
    """Whether the embedding is multiplied by the root of the hidden size."""
    no_rope_every: int = 0
    """Every so many layers one has no rotary embedding."""
    global_every: int = 0
    """Every so many layers one attends to all; the others to a window, with a base of their own."""

    @property
    def has_qk_norms(self) -> bool:
        """Whether queries and keys are normalized per head."""
        return "self_attn.q_norm" in self.layer_names

    @property
    def has_fused_weights(self) -> bool:
        """Whether q, k and v are one matrix, and gate and up another."""
        return "self_attn.qkv_proj" in self.layer_names

    def to_gguf_name(self, name: str) -> str:
        """Return the GGUF name of the checkpoint tensor ``name``.

        Raises:
            ExportError: this family has no such tensor.
        """
        stem, _, suffix = name.rpartition(".")
        if stem in _OUTER_NAMES:
            return f"{_OUTER_NAMES[stem]}.{suffix}"
        match = _HF_LAYER.fullmatch(name)
        if match and match[2] in self.layer_names:
            return f"blk.{match[1]}.{self.layer_names[match[2]]}.{match[3]}"
        raise ExportError(
            f"tensor {name!r} is none of a {self.hf_names[0]}'s; its architecture differs"
        )

    def to_hf_name(self, name: str) -> str | None:
        """Return the checkpoint name of the GGUF tensor ``name``; none for derived ones."""
        stem, _, suffix = name.rpartition(".")
        outer = {gguf: hf for hf, gguf in _OUTER_NAMES.items()}
        if stem in outer:
            return f"{outer[stem]}.{suffix}"
        inner = {gguf: hf for hf, gguf in self.layer_names.items()}
        match = _GGUF_LAYER.fullmatch(name)
        if match and match[2] in inner:
            return f"model.layers.{match[1]}.{inner[match[2]]}.{match[3]}"
        return None

    def rotated_heads(self, hf_name: str, n_heads: int, n_kv_heads: int) -> int | None:
        """Return how many heads' rows GGUF interleaves in this tensor; none for most tensors."""
        if not self.interleaves_rope:
            return None
        return {"q_proj": n_heads, "k_proj": n_kv_heads}.get(hf_name.split(".")[-2])

    def is_norm(self, hf_name: str) -> bool:
        """Whether the tensor is the weight of a norm."""
        return hf_name.endswith("norm.weight")

    def has_rope(self, layer: int) -> bool:
        """Whether ``layer`` rotates queries and keys."""
        return not self.no_rope_every or (layer + 1) % self.no_rope_every != 0

    def window(self, layer: int, config: dict[str, Any]) -> int | None:
        """Return how many tokens back ``layer`` attends; None for all."""
        if not self.global_every or (layer + 1) % self.global_every == 0:
            return None
        return int(config["sliding_window"])


_LLAMA = Architecture(
    ("LlamaForCausalLM", "MistralForCausalLM"),
    "llama",
    "llama",
    biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
    interleaves_rope=True,
)
ARCHITECTURES = (
    _LLAMA,
    Architecture(
        ("SmolLM3ForCausalLM",),
        "smollm3",
        "smollm3",
        biases={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        ties_by_default=True,
        interleaves_rope=True,
        no_rope_every=4,
    ),
    Architecture(("Qwen2ForCausalLM",), "qwen2", "qwen2", fixed_biases=_ATTENTION[:3]),
    Architecture(
        ("Qwen3ForCausalLM",),
        "qwen3",
        "qwen3",
        layer_names={**_LLAMA_NAMES, **_QK_NORMS},
        biases={"attention_bias": _ATTENTION},
    ),
    Architecture(
        ("Gemma3ForCausalLM",),
        "gemma3_text",
        "gemma3",
        layer_names=_GEMMA3_NAMES,
        biases={"attention_bias": _ATTENTION},
        ties_by_default=True,
        norm_offset=1.0,
        has_post_norms=True,
        activation="gelu_tanh",
        scales_embedding=True,
        global_every=6,
    ),
    Architecture(("Phi3ForCausalLM",), "phi3", "phi3", layer_names=_PHI3_NAMES),
)
_ACTIVATIONS = {"silu": ("silu",), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_tanh")}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """Return the family of the model with this config.json.

    Raises:
        ExportError: it is unknown, or has an option that would be translated wrongly.
    """
    found = (config.get("architectures") or ["none"])[0]
    for architecture in ARCHITECTURES:
        if found in architecture.hf_names:
            if faults := list(_faults(architecture, found, config)):
                raise ExportError(f"{found} cannot be exported: {'; '.join(faults)}")
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.hf_names)
    raise ExportError(f"architecture {found} cannot be exported yet; supported are {known}")


def architecture_of_gguf(name: str) -> Architecture | None:
    """Return the family that GGUF calls ``name``; none if it is unknown."""
    return next((entry for entry in ARCHITECTURES if entry.gguf == name), None)


def ties_embedding(config: dict[str, Any]) -> bool:
    """Return whether the head of the model with this config.json is its embedding."""
    names = config.get("architectures") or ["none"]
    families = [entry for entry in ARCHITECTURES if names[0] in entry.hf_names]
    default = any(entry.ties_by_default for entry in families)
    return bool(config.get("tie_word_embeddings", default))


def attention_scale(config: dict[str, Any], head_dim: int) -> float:
    """Return what scores are multiplied by before the softmax."""
    return 1 / math.sqrt(config.get("query_pre_attn_scalar") or head_dim)


def interleave_rows(tensor: Matrix, n_heads: int) -> Matrix:
    """Return the rows of a q or k projection in llama.cpp's order.

    transformers rotates the first half of a head against the second, llama.cpp's
    ``LLAMA_ROPE_TYPE_NORM`` neighbours: rows i and i + d/2 become 2i and 2i + 1.
    """
    return _swap_halves(tensor, n_heads, 2, -1)


def deinterleave_rows(tensor: Matrix, n_heads: int) -> Matrix:
    """Return the rows in transformers' order, the inverse of :func:`interleave_rows`."""
    return _swap_halves(tensor, n_heads, -1, 2)


def _faults(architecture: Architecture, found: str, config: dict[str, Any]) -> Any:
    """Yield every option that would be translated wrongly."""
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if activation not in _ACTIVATIONS[architecture.activation]:
        yield f"activation {activation!r}, known is {architecture.activation}"
    if architecture.global_every == 0 and _uses_window(found, config):
        yield (
            f"a sliding window of {config['sliding_window']} tokens; set sliding_window to null in "
            "config.json if the model never exceeds it"
        )
    types = config.get("layer_types") or []
    for layer, kind in enumerate(types):
        is_windowed = architecture.window(layer, {"sliding_window": 1, **config}) is not None
        if architecture.global_every and (kind == "sliding_attention") != is_windowed:
            yield f"layer {layer} has {kind}, unlike llama.cpp's pattern of one in six"
            break
    no_rope = config.get("no_rope_layers")
    if no_rope and [bool(x) for x in no_rope] != [
        architecture.has_rope(layer) for layer in range(len(no_rope))
    ]:
        yield "other layers without rotary embedding than llama.cpp's one in four"
    scalar, head_dim = config.get("query_pre_attn_scalar"), config.get("head_dim")
    if scalar and head_dim and scalar != head_dim:
        yield f"query_pre_attn_scalar {scalar} is not head_dim {head_dim}, as llama.cpp takes it"
    if config.get("attn_logit_softcapping"):
        yield "attention softcapping"


def _uses_window(found: str, config: dict[str, Any]) -> bool:
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return False
    if found == "Qwen2ForCausalLM" or found == "Qwen3ForCausalLM":
        return bool(config.get("use_sliding_window"))
    if found == "Phi3ForCausalLM":  # a window of the whole context is none
        return int(config["sliding_window"]) < int(config["max_position_embeddings"]) - 1
    return True


def _swap_halves(tensor: Matrix, n_heads: int, outer: int, inner: int) -> Matrix:
    shape = tensor.shape
    return tensor.reshape(n_heads, outer, inner, *shape[1:]).swapaxes(1, 2).reshape(shape)
