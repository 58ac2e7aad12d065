"""What a MODEL argument is: an HF folder, a GGUF file, an ONNX folder or a hub id, by content."""

import re
from enum import StrEnum
from pathlib import Path

from edgekd.errors import DownloadError, MissingExtraError, ModelError
from edgekd.runtime.gguf_header import is_gguf

REJECTED = ".rejected"
"""Ends the name of an artifact that failed its checks."""
_ONNX_FILES = ("model.onnx", "npu.json")  # graphs of any shape, or of fixed ones for an NPU
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "grid.npz", "LICENSE*", "README.md"]


class ModelKind(StrEnum):
    """The forms in which a model can lie on disk."""

    CHECKPOINT = "checkpoint"
    GGUF = "gguf"
    ONNX = "onnx"


def locate_model(model: str, revision: str | None = None) -> tuple[ModelKind, Path]:
    """Return the kind of ``model`` and where it lies, fetching it when it is a hub id.

    Raises:
        ModelError: nothing is there, or it is no model.
        DownloadError: a hub id that cannot be fetched.
    """
    path = Path(model).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(model):
        path = _fetch_from_hub(model, revision)
    return detect_kind(path), path


def detect_kind(path: Path) -> ModelKind:
    """Return the kind of the model at ``path``, judged by what it contains.

    Raises:
        ModelError: nothing is there, it is no model, or one that failed its checks.
    """
    if path.name.endswith(REJECTED):
        raise ModelError(f"{path} failed its checks and is not used: {_reason(path)}")
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        raise ModelError(
            f"no model at {path}; give a folder with config.json and safetensors, "
            "a .gguf file, an ONNX folder or a hub id like HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    if any((path / name).is_file() for name in _ONNX_FILES):
        return ModelKind.ONNX
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return ModelKind.CHECKPOINT
    listing = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise ModelError(
        f"{path} is no model folder: it holds {listing}; needed are config.json and "
        "*.safetensors, or model.onnx (pickled weights are never loaded)"
    )


def _reason(rejected: Path) -> str:
    reason = rejected.with_name(f"{rejected.name}.txt")
    return reason.read_text("utf-8").strip() if reason.is_file() else "the reason is not beside it"


def _kind_of_file(path: Path) -> ModelKind:
    if is_gguf(path):
        return ModelKind.GGUF
    with open(path, "rb") as file:
        start = file.read(8)
    hint = "; for a checkpoint give its folder" if path.suffix == ".safetensors" else ""
    raise ModelError(
        f"{path} is no model: it has {path.stat().st_size} bytes and starts with {start!r}, "
        f"a GGUF file starts with b'GGUF'{hint}"
    )


def _fetch_from_hub(model: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "torch") from error
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DownloadError(
            f"{model} is no local path and cannot be fetched from the hub: {reason}"
        ) from error
