"""Tiny random models of every family, built in memory from a seed."""

from pathlib import Path
from typing import Any

import torch
import transformers

from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import make_tokenizer, save_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 405,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CARD = """---
license: apache-2.0
license_name: Apache
language: [en, de]
tags: [tiny, distillation]
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
datasets: [HuggingFaceTB/smoltalk, local]
---
# A tiny model
"""
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
GEMMA3 = {
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
    # Neither is llama.cpp's default.
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    },
}
PHI4 = {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("Llama", {"rope_parameters": LINEAR_ROPE, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3", {**GEMMA3, "tie_word_embeddings": True}),
    "gemma3 softcap": ("Gemma3", {**GEMMA3, "final_logit_softcapping": 5.0}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi4": ("Phi3", {**PHI4, "tie_word_embeddings": True}),
}

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
# Two sets of rotary frequencies, which no graph of ours holds: GGUF only.
LONG_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 longrope": (
        "Phi3",
        {
            "sliding_window": None,
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 256,
        },
    ),
}


def save_model(name: str, folder: Path, **changes: Any) -> Checkpoint:
    """Write the model called ``name``, with ``changes`` to its config, and a tokenizer."""
    family, settings = {**MODELS, **LONG_MODELS}[name]
    config_class = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**(COMMON | settings | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    _spread(model)
    model.save_pretrained(folder)
    save_tokenizer(folder, make_tokenizer())
    return open_checkpoint(folder)


def _spread(model: Any) -> None:
    """Make what is wrong with a tensor visible: in every logit, and far from a tie.

    At their initial ones and zeros norms and biases would hide a mistake. Rows of the head get
    lengths that differ, as trained ones do: the best token then leads by more than the rounding of
    llama.cpp's 16-bit KV cache, which no export can help.
    """
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        elif "norm" in name:
            parameter.data.add_(torch.empty_like(parameter).normal_(0.0, 0.3))
    head_VH = model.get_output_embeddings().weight.data
    head_VH *= torch.empty(len(head_VH), 1).normal_(0.0, 0.7).exp()
