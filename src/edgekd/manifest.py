"""The manifest ``edgekd.json``: what a result is made of, and what it was made from.

Beside a folder's files it is called ``edgekd.json``; beside ``model.gguf`` it is
``model.edgekd.json``, so that several artifacts can share a folder. Hashes in ``made_from``
are those of the manifests' own files, so the chain teacher, student, artifact can be walked.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgekd.errors import VerificationError
from edgekd.files import sha256_of, write_text_atomic
from edgekd.untrusted import is_plain_name, parse_json

SCHEMA_VERSION = 1
NAME = "edgekd.json"
TENSORS_KEY = "tensors_sha256"
_TOOLS = ("edgekd", "torch", "transformers", "tokenizers", "gguf", "onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One result: its kind, its files, its sources and how it was verified."""

    kind: str
    """``checkpoint`` or ``artifact``."""
    files: dict[str, dict[str, Any]]
    """File name to ``{"sha256": ..., "bytes": ...}``."""
    made_from: list[dict[str, Any]] = field(default_factory=list)
    """Sources, each with its role, its name and the sha256 of its weights."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Every setting of the run that made it."""
    verification: dict[str, Any] = field(default_factory=dict)
    """What was checked and measured, with its limits."""
    tensors_sha256: dict[str, str] = field(default_factory=dict)
    """Of an artifact: checkpoint tensor name to the hash of its dequantized values."""
    licence: str | None = None
    """SPDX identifier of the weights, where the source says so."""
    schema_version: int = SCHEMA_VERSION
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    tools: dict[str, str] = field(default_factory=lambda: tool_versions())


def manifest_path(result: Path) -> Path:
    """Return where the manifest of ``result`` (a folder or a file) lies."""
    return result / NAME if result.is_dir() else result.with_name(f"{result.stem}.{NAME}")


def describe_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return name, sha256 and size of each file in ``paths``, sorted by name."""
    return {
        path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(paths)
    }


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write ``manifest`` to ``path`` as JSON, whole or not at all."""
    write_text_atomic(path, manifest_text(manifest))


def manifest_text(manifest: Manifest) -> str:
    """Return ``manifest`` as the text of its file."""
    return json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest at ``path``.

    Raises:
        VerificationError: there is none, or it is not one of ours.
    """
    if not path.is_file():
        raise VerificationError(
            f"no manifest at {path}; only results of edgekd have one, export the model again"
        )
    try:
        manifest = parse_json(path.read_text("utf-8"))
        found = manifest["schema_version"]
        files, sources = manifest["files"], manifest["made_from"]
        well_formed = (
            isinstance(manifest["kind"], str)
            and isinstance(sources, list)
            and all(isinstance(entry, dict) for entry in sources)
            and isinstance(files, dict)
            and isinstance(manifest.get(TENSORS_KEY, {}), dict)
            and all(
                isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
                for entry in files.values()
            )
        )
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{path} is not an edgekd manifest: {error!r}") from error
    if found != SCHEMA_VERSION:
        raise VerificationError(
            f"{path} has schema version {found}, this edgekd reads {SCHEMA_VERSION}; "
            "install a matching edgekd"
        )
    if not well_formed:
        raise VerificationError(
            f"{path} lists no kind, sources, or files with their sha256; export the model again"
        )
    return dict(manifest)


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file that ``manifest`` names with what lies in ``folder``.

    Raises:
        VerificationError: a file is missing or changed; all of them are named.
    """
    faults = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not is_plain_name(name) or not path.is_file():
            faults.append(f"{name} is missing")
        elif (found := sha256_of(path)) != entry["sha256"]:
            faults.append(f"{name} has sha256 {found[:12]}, manifest says {entry['sha256'][:12]}")
    if faults:
        raise VerificationError(f"{folder}: {'; '.join(faults)}; export the model again")


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a result looks like."""
    found = {}
    for tool in (*_TOOLS, "onnxruntime-qnn", "llama-cpp-python"):
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
