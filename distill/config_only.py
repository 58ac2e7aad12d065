"""A model that is known by its config alone: enough to plan a run before anything is fetched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import as_checkpoint
from edgekd.runtime.tokenizer import read_json


@dataclass(frozen=True)
class ConfigOnly(Checkpoint):
    """Names and shapes of a checkpoint's tensors; there are no weights to read."""

    shapes: dict[str, tuple[int, ...]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the tensor called ``name`` would have."""
        return self.shapes[name]


def is_config_only(model: str) -> bool:
    """Whether ``model`` is a folder with ``config.json`` and no weights."""
    folder = Path(model).expanduser()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.onnx")]
    return (folder / "config.json").is_file() and not weights


def open_config(folder: Path) -> ConfigOnly:
    """Return what transformers would build from ``config.json`` in ``folder``, without storage.

    Raises:
        ModelError: transformers knows no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ModelError(
            f"no model can be built from {folder / 'config.json'}: {reason}"
        ) from error
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    path = folder / "config.json"
    return ConfigOnly(folder, read_json(path), dict.fromkeys(shapes, path), shapes)


@contextmanager
def as_planned(model: str, revision: str | None = None) -> Iterator[Checkpoint]:
    """Yield ``model`` as a checkpoint, or as what its config says where it has no weights.

    Raises:
        ModelError: it is neither.
    """
    if is_config_only(model):
        yield open_config(Path(model).expanduser())
        return
    with as_checkpoint(model, revision) as checkpoint:
        yield checkpoint
