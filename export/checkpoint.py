"""A Hugging Face folder, read tensor by tensor: memory stays near the largest one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgekd.errors import ModelError
from edgekd.export.architectures import Architecture, architecture_of, ties_embedding
from edgekd.export.stored_tensors import StoredTensor, stored_tensors
from edgekd.files import sha256_of_all
from edgekd.runtime.tokenizer import read_json
from edgekd.units import format_some

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Old checkpoints store the rotary frequencies, which follow from the config.
_DERIVED = "rotary_emb.inv_freq"
_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The folder, its config and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    shard_of: dict[str, Path]
    """Tensor name to safetensors file."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(
            self.config.get("head_dim")
            or self.config["hidden_size"] // self.config["num_attention_heads"]
        )

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])

    @property
    def architecture(self) -> Architecture:
        """The family of the model.

        Raises:
            ExportError: it is unknown, or has options that would be translated wrongly.
        """
        return architecture_of(self.config)

    @property
    def is_tied(self) -> bool:
        """Whether the head uses the embedding's weights."""
        return "lm_head.weight" not in self.shard_of

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(set(self.shard_of.values()))

    def tensor(self, name: str) -> "torch.Tensor":
        """Return the tensor called ``name`` as float32.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        tensor = self._tensor(name)
        self._check_finite(tensor.numpy())
        return tensor

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return rows of the tensor called ``name`` as float32, without torch; all by default.

        Raises:
            ModelError: they hold NaN or infinity.
        """
        values = self._rows(name, start, stop)
        self._check_finite(values)
        return values

    def faulty_values(self) -> str | None:
        """Return which tensors hold NaN or infinity, for an error; every weight is read."""
        names = [n for n in self.shard_of if not all(map(_is_finite, self._chunks(n)))]
        return f"{format_some(names)} hold NaN or infinity" if names else None

    def _check_finite(self, values: NDArray[np.float32]) -> None:
        if not _is_finite(values):
            raise ModelError(
                f"{self.folder}: {self.faulty_values()}; fetch the weights again, or train again"
            )

    def _tensor(self, name: str) -> "torch.Tensor":
        with safe_open(self.shard_of[name], framework="pt") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor.float()

    def _rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        stored = self._stored[name]
        stop = stored.shape[0] if stop is None else stop
        if stored.is_plain:
            return stored.rows(start, stop)
        values: NDArray[np.float32] = self._tensor(name)[start:stop].numpy()
        return values

    def _chunks(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Yield the values of a tensor a few at a time."""
        shape = self.shape(name) or (1,)
        step = max(1, _CHUNK_VALUES // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield self._rows(name, start, min(start + step, shape[0]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor called ``name`` without reading it."""
        return self._stored[name].shape

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        """Where each tensor lies in its file."""
        found: dict[str, StoredTensor] = {}
        for path in self.weight_files:
            found |= stored_tensors(path)
        return found

    @property
    def n_parameters(self) -> int:
        """Number of weights; a tied head is not counted twice."""
        return sum(math.prod(self.shape(name)) for name in self.shard_of)

    def weights_sha256(self) -> str:
        """Return one hash over all weight files: a file's own where there is only one."""
        return sha256_of_all(self.weight_files)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder``.

    Raises:
        ModelError: a file is missing, cut short or inconsistent.
    """
    config = read_json(folder / "config.json")
    shard_of: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as shard:
                shard_of.update(dict.fromkeys(shard.keys(), path))
        except SafetensorError as error:
            raise ModelError(f"{path} is no safetensors file or is cut short: {error}") from error
    missing = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"} - set(
        config
    )
    if missing or not shard_of:
        raise ModelError(f"{folder} is no checkpoint: config.json lacks {sorted(missing)}")
    if ties_embedding(config) and "model.embed_tokens.weight" in shard_of:
        shard_of.pop("lm_head.weight", None)  # some checkpoints store the tied copy again
    needed = {name: path for name, path in shard_of.items() if not name.endswith(_DERIVED)}
    return Checkpoint(folder, config, needed)


def _is_finite(values: NDArray[np.float32]) -> bool:
    """Return whether there is no NaN and no infinity among ``values``."""
    with np.errstate(over="ignore", invalid="ignore"):
        # One of them makes the sum one, and a sum takes no memory; large weights do so, too.
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def read_licence(folder: Path) -> str | None:
    """Return the licence that ``edgekd.json`` or the model card in ``folder`` names."""
    manifest = read_json(folder / "edgekd.json")
    if licence := manifest.get("licence"):
        return str(licence)
    card = folder / "README.md"
    for line in card.read_text("utf-8").splitlines()[:40] if card.is_file() else []:
        if line.startswith("license:"):
            return line.partition(":")[2].strip() or None
    return None
