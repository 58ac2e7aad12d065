"""Speeds that others published, and those of the user's own ``edgekd bench --json``.

Published speeds name a public model and a runtime's format; the bytes follow from the model's
shape, since nobody publishes them. Files: published/models.toml and published/speeds.toml.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekd.devices.predict import Point
from edgekd.errors import DeviceError
from edgekd.untrusted import parse_json

# Bits per weight of a runtime's format: of the body, and of the head.
_FORMAT_BITS = {
    "mlc_q4f16_1": (4.5, 4.5),
    "q4_0": (4.5, 6.5625),
    "int4_awq_128": (4.125, 16.0),
    "genie_w4a16": (4.0, 8.0),
}
_K_BITS, _K_MORE_BITS = 4.5, 6.5625


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the number of a public model's weights."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def read_bytes(self, format: str) -> float:
        """Return the bytes of weights read for one token; the embedding is one row of many.

        Raises:
            DeviceError: the format is unknown.
        """
        value = self.hidden * self.kv_heads * self.head_dim
        down = self.hidden * self.ffn
        rest = 2 * self.hidden * self.heads * self.head_dim + value + 2 * down
        head = self.hidden * self.vocab
        if format == "q4_k_m":
            return self._mixture_bytes(value + down, rest, head)
        if format not in _FORMAT_BITS:
            raise DeviceError(f"unknown format {format!r}; known are {', '.join(_FORMAT_BITS)}")
        body_bits, head_bits = _FORMAT_BITS[format]
        return (self.layers * (value + down + rest) * body_bits + head * head_bits) / 8

    def _mixture_bytes(self, valued: int, rest: int, head: int) -> float:
        """Return the bytes of llama.cpp's Q4_K_M: more bits for part of values and down."""
        eighth = self.layers // 8
        n_more = sum(
            layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
            for layer in range(self.layers)
        )
        more = valued * (n_more * _K_MORE_BITS + (self.layers - n_more) * _K_BITS)
        return (more + self.layers * rest * _K_BITS + head * _K_MORE_BITS) / 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """What was measured on one device with one backend in one power mode."""

    device: str
    backend: str
    power_mode: str
    points: tuple[Point, ...]
    models: tuple[str, ...]
    source: str
    in_survey: bool
    """Whether it is one of the groups that the formula was found on."""


@cache
def published_groups() -> tuple[Group, ...]:
    """Return every published group of speeds."""
    shapes = {name: Shape(**shape) for name, shape in _read("models.toml").items()}
    return tuple(_group(entry, shapes) for entry in _read("speeds.toml")["group"])


def groups_of(device: str) -> list[Group]:
    """Return the published groups of the device called ``device``."""
    return [group for group in published_groups() if group.device == device]


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """One model that ``edgekd bench`` measured."""

    model: str
    backend: str
    mean_depth_tokens: float
    """Tokens in the cache, averaged over the decoded ones."""
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    load_s: float


def read_bench(path: Path) -> list[OwnRun]:
    """Return the runs in the output of ``edgekd bench --json``, one for each depth of a model.

    Raises:
        DeviceError: the file is missing, is no such output, or holds times that are no device's.
    """
    try:
        document = parse_json(path.read_text("utf-8"))
        real = document["machine"].get("emulated_on")
        runs = [run for result in document["results"] for run in _own_runs(result)]
    except OSError as error:
        raise DeviceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DeviceError(
            f"{path} is no output of 'edgekd bench MODEL... --json': {error!r}"
        ) from error
    if real:
        raise DeviceError(
            f"{path} was measured in an emulator on {real}, whose times are no device's; "
            "measure on the device itself"
        )
    return runs


def _own_runs(result: dict[str, Any]) -> list[OwnRun]:
    entries = result["scenarios"]
    prefill = _middle([entry for entry in entries if entry["kind"] == "prefill"][-1])
    decodes = [entry for entry in entries if entry["kind"] == "decode"]
    return [
        OwnRun(
            model=str(result["model"]),
            backend=str(result["engine"]),
            mean_depth_tokens=entry["n_depth"] + entry["n_tokens"] / 2,
            decode_tokens_per_s=_middle(entry),
            prefill_tokens_per_s=prefill,
            load_s=float(result["warm_start"]["load_s"]),
        )
        for entry in decodes
    ]


def _middle(entry: dict[str, Any]) -> float:
    value = float(entry["tokens_per_s"]["median"])
    if not value > 0:
        raise ValueError(f"a speed of {value}")
    return value


def _group(entry: dict[str, Any], shapes: dict[str, Shape]) -> Group:
    runs = entry["runs"]
    points = tuple(
        Point(
            shapes[run["model"]].read_bytes(run["format"]),
            1 / run["tokens_per_s"],
            run["format"],
            shapes[run["model"]].layers,
        )
        for run in runs
    )
    return Group(
        device=entry["device"],
        backend=entry["backend"],
        power_mode=entry["power_mode"],
        points=points,
        models=tuple(run["model"] for run in runs),
        source=entry["source"],
        in_survey=entry["in_survey"],
    )


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files("edgekd.devices") / "published" / name).read_text("utf-8"))
