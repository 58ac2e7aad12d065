"""Who a model is, as GGUF's ``general.*``: name, licence, base models, data, languages, sampling.

It comes from the model card's front matter, config.json, generation_config.json and our manifest;
gguf's own reader of the first three is what llama.cpp's converter uses.
"""

from typing import Any

import yaml
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, Metadata
from gguf.utility import size_label
from tokenizers import Tokenizer

from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.sentencepiece import fitting_name
from edgekd.runtime.tokenizer import read_json


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
