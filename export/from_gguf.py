"""Read a GGUF file back into a Hugging Face folder: weights, config, tokenizer, chat template.

Weights are dequantized to float32. The tokenizer is rebuilt from the file's own tokens, merges
and splitter name; transformers' GGUF route drops the Digits step of SmolLM.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from edgekd.errors import ModelError
from edgekd.export.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of,
    architecture_of_gguf,
    deinterleave_rows,
)
from edgekd.export.gguf_general import card_head, sampling_settings
from edgekd.export.pieces import build_tokenizer
from edgekd.export.pretokenizer import build_splitter
from edgekd.files import atomic_folder
from edgekd.runtime.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from edgekd.untrusted import untrusted

_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_to_checkpoint(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file at ``path`` as a Hugging Face folder.

    Raises:
        ModelError: the file is malformed, or its architecture or tokenizer is not supported.
        OutputError: ``folder`` cannot be written; it is as it was.
    """
    header = read_gguf_header(path)
    with untrusted(path):
        config = _read_config(path, header)
    with atomic_folder(folder) as partial:
        with untrusted(path):
            weights = _read_weights(path, header, config)
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        _write_json(partial / "config.json", config)
        with untrusted(path):
            write_text_side(header, partial)
        if head := card_head(header.metadata):
            text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
            (partial / "README.md").write_text(f"---\n{text}---\n", "utf-8")


def write_text_side(header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer files of a GGUF into ``folder``.

    Raises:
        ModelError: its tokenizer is not supported.
    """
    _read_tokenizer(header.metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(header.metadata))
    _write_json(folder / "generation_config.json", _generation_config(header.metadata))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _read_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    metadata = header.metadata
    architecture = _architecture(path, header)

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture.gguf}.{key}", default)
        if found is None:
            raise ModelError(
                f"{path} lacks the metadata entry {architecture.gguf}.{key}; convert it again"
            )
        return found

    n_heads = value("attention.head_count")
    head_dim = value("attention.key_length", value("embedding_length") // n_heads)
    names = {tensor.name for tensor in header.tensors}
    scaling = value("rope.scaling.type", "none")
    if names & _ROPE_TENSORS or scaling not in ("none", "linear"):
        raise ModelError(f"{path} scales its rotary frequencies, which cannot be read back yet")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": value("rope.freq_base", 10_000.0),
    }
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    if (n_rotated := value("rope.dimension_count", head_dim)) != head_dim:
        rope["partial_rotary_factor"] = n_rotated / head_dim
    config = {
        "architectures": [architecture.hf_names[0]],
        "model_type": architecture.model_type,
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": value("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu" if architecture.activation == "silu" else "gelu_pytorch_tanh",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": float(np.float32(value("attention.layer_norm_rms_epsilon"))),
        "rope_parameters": rope,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", [])),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "dtype": "float32",
        **{
            f"{role}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
            for role, key in _SPECIAL_KEYS.items()
            if role in ("bos", "eos", "pad") and f"tokenizer.ggml.{key}_token_id" in metadata
        },
    }
    if architecture.global_every:
        config |= _windowed_config(config, architecture, value)
    return config


def _architecture(path: Path, header: GgufHeader) -> Architecture:
    name = str(header.metadata.get("general.architecture"))
    architecture = architecture_of_gguf(name)
    if architecture is None:
        known = ", ".join(entry.gguf for entry in ARCHITECTURES)
        raise ModelError(f"{path} has the architecture {name!r}; can be read back: {known}")
    return architecture


def _windowed_config(
    config: dict[str, Any], architecture: Architecture, value: Callable[..., Any]
) -> dict[str, Any]:
    """Return what a config with windowed layers (Gemma 3) says differently."""
    window = {"sliding_window": value("attention.sliding_window")}
    kinds = [
        "full_attention" if architecture.window(layer, window) is None else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    local = {"rope_type": "default", "rope_theta": value("rope.freq_base_swa", 10_000.0)}
    softcap = value("final_logit_softcapping", 0.0)
    return window | {
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["head_dim"],
        "final_logit_softcapping": softcap or None,
    }


def _read_weights(
    path: Path, header: GgufHeader, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    weights = {}
    architecture = architecture_of(config)
    for entry in header.tensors:
        name = architecture.to_hf_name(entry.name)
        if name is None:
            raise ModelError(
                f"{path} holds a tensor {entry.name!r} that no {architecture.hf_names[0]} has"
            )
        tensor = _read_tensor(path, entry)
        if architecture.is_norm(name):
            tensor = tensor - architecture.norm_offset
        n_rotated = architecture.rotated_heads(
            name, config["num_attention_heads"], config["num_key_value_heads"]
        )
        if n_rotated:
            tensor = deinterleave_rows(tensor, n_rotated)
        weights[name] = tensor.contiguous()
    return weights


def _read_tensor(path: Path, entry: GgufTensor) -> torch.Tensor:
    raw = np.fromfile(path, np.uint8, entry.size_bytes, offset=entry.offset_bytes)
    shape = entry.shape[::-1]
    rows = raw.reshape(shape[0], -1) if len(shape) > 1 else raw[None]
    try:
        values = dequantize(rows, GGMLQuantizationType[entry.type_name])
    except (KeyError, NotImplementedError) as error:
        raise ModelError(f"{path}: tensors of type {entry.type_name} cannot be read") from error
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _read_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if (model := metadata.get("tokenizer.ggml.model")) == "gpt2":
        tokenizer = _build_byte_level(metadata, tokens, kinds)
    elif model == "llama":
        tokenizer = build_tokenizer(metadata)
    else:
        raise ModelError(
            f"the file has a tokenizer of kind {model!r}; can be read back: 'gpt2', a byte-level "
            "BPE, and 'llama', SentencePiece's"
        )
    for kind, add in (
        (TokenType.UNKNOWN, tokenizer.add_special_tokens),
        (TokenType.CONTROL, tokenizer.add_special_tokens),
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
    ):
        add(
            [
                AddedToken(token, normalized=False, special=kind != TokenType.USER_DEFINED)
                for i, token in enumerate(tokens)
                if kinds[i] == kind
            ]
        )
    is_sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    if metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece):  # llama.cpp's defaults
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A".replace("<bos>", tokens[bos_id]),
            special_tokens=[(tokens[bos_id], bos_id)],
        )
    return tokenizer


def _build_byte_level(metadata: dict[str, Any], tokens: list[str], kinds: list[int]) -> Tokenizer:
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] != TokenType.UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = build_splitter(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in _SPECIAL_KEYS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    stops = [
        metadata[f"tokenizer.ggml.{key}_token_id"]
        for key in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{key}_token_id" in metadata
    ]
    return ({"eos_token_id": stops} if stops else {}) | sampling_settings(metadata)
