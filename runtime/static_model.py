"""What lies in an ONNX folder for NPUs, and whether its binaries fit the machine.

``npu.json`` names the graphs, the sizes that they were made for, and what they were compiled for.
A graph is one file, or several parts of consecutive layers that run one after the other:

    read_static(folder).parts("prefill")    # ["prefill"], or ["prefill_1", "prefill_2"]
"""

import json
import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from edgekd.devices.snapdragon import detect_soc
from edgekd.errors import ModelError
from edgekd.runtime.providers import PROVIDERS, choose, is_emulated
from edgekd.runtime.tokenizer import read_json

NPU_FILE = "npu.json"
HOST_GRAPH = "host.onnx"
GRAPHS = ("prefill", "decode")
Activations = Literal["fp16", "a16"]
HIDDEN = -30_000.0
"""Added to scores of slots that hold nothing: within fp16, and nothing after a softmax."""
_FILE_NAME = re.compile(r"\w[\w.-]{0,254}", re.ASCII)
_WHOLE_SCHEMA, _SPLIT_SCHEMA = 1, 2
"""Versions of ``npu.json``: an edgekd that knows no parts refuses those, and reads the rest."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Context binaries for one chip."""

    soc: str
    soc_model: int
    htp_arch: int
    sdk: str
    """Version of Qualcomm's AI Engine Direct SDK that wrote them."""
    graphs: dict[str, str]
    """Each part of ``prefill`` and ``decode`` to the file that wraps its binary."""
    binaries: dict[str, int]
    """File of a binary to its bytes."""


@dataclass(frozen=True, kw_only=True)
class StaticModel:
    """The content of ``npu.json``."""

    context_tokens: int
    """Slots of the KV cache."""
    prefill_tokens: int
    """Tokens that the prefill graph takes at once."""
    windows: dict[str, int | None]
    """How inputs of a kind of layer begin, to how many tokens back it attends; None for all."""
    activations: Activations = "fp16"
    """What the graphs calculate in; ``a16`` is unsigned whole numbers of 16 bits."""
    hidden: float = HIDDEN
    """Added to the scores of slots that a token may not see."""
    n_parts: int = 1
    """Files that each graph is cut into."""
    compiled: Compiled | None = None
    """None where only the graphs are there, which the CPU runs."""

    def parts(self, graph: str) -> list[str]:
        """Return what the files of ``graph`` are called, without their ends, in running order."""
        return part_names(graph, self.n_parts)

    def all_parts(self) -> list[str]:
        """Return the parts of every graph."""
        return [part for graph in GRAPHS for part in self.parts(graph)]


def part_names(graph: str, n_parts: int) -> list[str]:
    """Return the names of a graph's parts, in order; of one part it is the graph's."""
    return [graph] if n_parts == 1 else [f"{graph}_{1 + part}" for part in range(n_parts)]


def is_static(folder: Path) -> bool:
    """Whether ``folder`` holds graphs of fixed shapes."""
    return (folder / NPU_FILE).is_file()


def read_static(folder: Path) -> StaticModel:
    """Return what ``npu.json`` in ``folder`` says.

    Raises:
        ModelError: it is damaged, or of another version of edgekd.
    """
    content: dict[str, Any] = read_json(folder / NPU_FILE)
    try:
        if content.pop("schema_version") != _schema(content.get("n_parts", 1)):
            raise ValueError("another schema version")
        compiled = content.pop("compiled")
        model = StaticModel(**content, compiled=Compiled(**compiled) if compiled else None)
        _check_parts(model)
        _check_names(model)
        return model
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / NPU_FILE} is not what this edgekd writes ({error}); export the model again"
        ) from error


def _check_parts(model: StaticModel) -> None:
    """Return only if every part has a file, named as it may be in a folder and a shell script."""
    if type(model.n_parts) is not int or model.n_parts < 1:
        raise ValueError(f"n_parts is {model.n_parts!r}")
    if model.compiled is None:
        return
    graphs, binaries = model.compiled.graphs, model.compiled.binaries
    if missing := set(model.all_parts()) - graphs.keys():
        raise ValueError(f"no file for {', '.join(sorted(missing))}")
    for name in (*graphs.values(), *binaries.keys()):
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name[:100]!r} is no plain file name")


def write_static(folder: Path, model: StaticModel) -> None:
    """Write ``npu.json`` into ``folder``."""
    content = {"schema_version": _schema(model.n_parts), **asdict(model)}
    if model.n_parts == 1:
        del content["n_parts"]
    (folder / NPU_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def provider_for(folder: Path, model: StaticModel, asked: str) -> str:
    """Return the provider to run ``folder`` on; ``auto`` takes QNN only where it is no emulator."""
    if asked != "auto":
        return choose(asked)
    plugin = PROVIDERS["qnn"].plugin or ""
    is_ready = (
        model.compiled is not None and find_spec(plugin) is not None and not is_emulated("qnn")
    )
    return "qnn" if is_ready else "cpu"


def graph_files(folder: Path, model: StaticModel, provider: str, root: Path) -> dict[str, Path]:
    """Return the file of every part of the prefill and decode graphs for ``provider``.

    Raises:
        ModelError: QNN is asked for, and nothing is compiled for the chip below ``root``; or
            another is, and only binaries are there.
    """
    if provider != "qnn":
        files = {part: folder / f"{part}.onnx" for part in model.all_parts()}
        if not all(path.is_file() for path in files.values()):
            raise ModelError(f"{folder} holds binaries for an NPU only; use --ep qnn")
        return files
    compiled = model.compiled
    if compiled is None:
        raise ModelError(
            f"{folder} is not compiled for an NPU; {_rebuild(model, 'sm8650')} (with the package "
            f"{PROVIDERS['qnn'].pip_name} installed), or use --ep cpu"
        )
    found = detect_soc(root)
    if found is not None and found != compiled.soc:
        raise ModelError(
            f"{folder} is compiled for {compiled.soc} (Hexagon v{compiled.htp_arch}), this machine "
            f"is {found}; {_rebuild(model, found)}"
        )
    return {part: folder / compiled.graphs[part] for part in model.all_parts()}


def provider_options(model: StaticModel, provider: str) -> dict[str, str]:
    """Return what ``provider`` must be told of the chip that ``model`` is compiled for."""
    if provider != "qnn" or model.compiled is None:
        return {}
    return chip_options(model.compiled.soc_model, model.compiled.htp_arch)


def chip_options(soc_model: int, htp_arch: int) -> dict[str, str]:
    """Return what QNN must be told of a chip.

    Without the numbers the emulator calculates in fp32, which no chip does. What the graph's ends
    round or expand would be left to the CPU.
    """
    return {
        "soc_model": str(soc_model),
        "htp_arch": str(htp_arch),
        "offload_graph_io_quantization": "0",
    }


def _check_names(model: StaticModel) -> None:
    """Return only if the files are named as in a folder and in a shell script they may be."""
    if model.compiled is None:
        return
    for name in (*model.compiled.graphs.values(), *model.compiled.binaries):
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name[:100]!r} is no plain file name")


def _schema(n_parts: int) -> int:
    return _WHOLE_SCHEMA if n_parts == 1 else _SPLIT_SCHEMA


def _rebuild(model: StaticModel, soc: str) -> str:
    return (
        f"build it with: edgekd export MODEL --format onnx --target qnn --soc {soc} "
        f"--ctx {model.context_tokens} --prefill {model.prefill_tokens} "
        + ("--calibrate-activations TEXT " if model.activations == "a16" else "")
        + ("--max-binary SIZE " if model.n_parts > 1 else "")
        + "--out OUT"
    )
