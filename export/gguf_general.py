"""Who a model is, as GGUF's ``general.*``: name, licence, base models, data, languages, sampling.

It is written from the model card's front matter, config.json and generation_config.json, by gguf's
own reader, which llama.cpp's converter uses as well, and from our manifest.
"""

from typing import Any

import numpy as np
import yaml
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, Metadata
from gguf.utility import size_label
from tokenizers import Tokenizer

from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.pieces import fitting_name
from edgekd.runtime.tokenizer import read_json

# Of the same name in a model card and below general.*, where a dot divides the words.
_CARD_KEYS = (
    *("license", "license_name", "license_link", "name", "author", "version", "organization"),
    *("finetune", "basename", "description", "tags", "languages"),
)
_SAMPLING_NAMES = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}


def write_general(
    writer: GGUFWriter, checkpoint: Checkpoint, tokenizer: Tokenizer, file_type: LlamaFileType
) -> None:
    """Add ``general.*`` to ``writer``, whose tensors are declared already.

    Raises:
        ModelError: the model card's front matter is no YAML.
    """
    n_parameters = writer.get_total_parameter_count()[0]
    metadata = _read(checkpoint, n_parameters)
    metadata.size_label = metadata.size_label or size_label(n_parameters, 0, 0, 0)
    metadata.license = read_licence(checkpoint.folder) or metadata.license
    metadata.base_models = metadata.base_models or _sources(checkpoint)
    metadata.name = fitting_name(metadata.name or checkpoint.folder.absolute().name, tokenizer)
    writer.add_type("model")
    metadata.set_gguf_meta_model(writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _read(checkpoint: Checkpoint, n_parameters: int) -> Metadata:
    folder = checkpoint.folder.absolute()  # its name is the last resort for a model's
    try:
        metadata = Metadata.load(model_path=folder, total_params=n_parameters)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the head of {folder / 'README.md'} is no YAML: {reason}") from error
    if metadata.sampling_penalty_repeat is None:  # gguf 0.19 does not know transformers' name
        penalty = read_json(folder / "generation_config.json").get("repetition_penalty")
        metadata.sampling_penalty_repeat = penalty
    return metadata


def _sources(checkpoint: Checkpoint) -> list[dict[str, Any]] | None:
    """Return what the manifest says the checkpoint was made from, as base models."""
    sources = read_json(checkpoint.folder / "edgekd.json").get("made_from") or []
    return [
        {"name": Metadata.id_to_title(source["name"]), "description": source["role"]}
        for source in sources
    ] or None


def card_head(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the front matter of a model card that says what a GGUF's ``general.*`` says."""
    keys = {key: f"general.{key.replace('_', '.')}" for key in _CARD_KEYS}
    head = {key: metadata[found] for key, found in keys.items() if found in metadata}
    for key, group in (("base_model", "base_model"), ("datasets", "dataset")):
        if count := metadata.get(f"general.{group}.count"):
            head[key] = [_members(metadata, f"general.{group}.{i}.") for i in range(count)]
    return head


def sampling_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a GGUF's sampling settings under generation_config.json's names."""
    prefix = "general.sampling."
    found = _members(metadata, prefix)
    return {_SAMPLING_NAMES.get(key, key): value for key, value in found.items()}


def _members(metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries below ``prefix``; float32 numbers as short as they were written."""
    return {
        key.removeprefix(prefix): float(str(np.float32(value)))
        if isinstance(value, float)
        else value
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
