"""``genai_config.json``: what onnxruntime-genai needs to know to run an ONNX folder as it is.

Keys after https://onnxruntime.ai/docs/genai/reference/config.html
"""

from typing import Any, Literal

from edgekd.export.checkpoint import Checkpoint
from edgekd.runtime.tokenizer import FileTokenizer

Target = Literal["cpu", "cuda"]


def genai_config(
    checkpoint: Checkpoint, model_file: str, context_tokens: int, target: Target = "cpu"
) -> dict[str, Any]:
    """Return the content of the file for a graph of ours of ``context_tokens`` positions.

    Positions are no input: the graph derives them from the attention mask. Decoding is greedy
    unless the caller asks for something else.
    """
    config = checkpoint.config
    tokenizer = FileTokenizer(checkpoint.folder)
    stop_ids = sorted(tokenizer.stop_ids)
    ids = {
        "bos_token_id": _first(config.get("bos_token_id"), tokenizer.special_id("bos")),
        "eos_token_id": stop_ids,
        "pad_token_id": _first(config.get("pad_token_id"), tokenizer.special_id("pad"), *stop_ids),
    }
    return {
        "model": {
            "type": config.get("model_type") or checkpoint.architecture.model_type,
            **{name: value for name, value in ids.items() if value is not None},
            "context_length": context_tokens,
            "vocab_size": config["vocab_size"],
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [] if target == "cpu" else [{target: {}}],
                },
                "filename": model_file,
                "head_size": checkpoint.head_dim,
                "hidden_size": config["hidden_size"],
                "num_attention_heads": config["num_attention_heads"],
                "num_hidden_layers": checkpoint.n_layers,
                "num_key_value_heads": checkpoint.n_kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context_tokens,
            "past_present_share_buffer": True,
        },
    }


def _first(*found: int | None) -> int | None:
    return next((token_id for token_id in found if token_id is not None), None)
