"""Compile graphs of fixed shapes to context binaries for a Hexagon NPU, and say what went where.

Qualcomm's compiler is native code that may crash or take much memory, so each part of a graph is
compiled in a process of its own (this module, run as a program). What it says of success is not
believed: a part counts as compiled when the written model holds an ``EPContext`` node.

One binary for both graphs (``ep.share_ep_contexts``) would be half the size, but 2.7.0's emulator
crashes loading such a binary of these graphs, so nothing could be verified: each has its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgekd.devices.memory import peak_rss_bytes
from edgekd.devices.snapdragon import Soc, find_soc
from edgekd.errors import ExportError
from edgekd.runtime.providers import CPU, PROVIDERS, create_session, nodes_of
from edgekd.runtime.static_model import Compiled, chip_options, read_static

_TIMEOUT_S = 3600
_TRACE_FILE = "qnn_op_trace.json"
_UNTOLD = "left to the CPU without a reason"


@dataclass(frozen=True)
class CompileResult:
    """What compiling gave."""

    compiled: Compiled
    placement: dict[str, list[dict[str, str]]]
    """Of each part: every node with its operator, its provider, and why where that is the CPU."""
    costs: dict[str, dict[str, float]]
    """Of each part: seconds and peak memory of the compiler."""

    def report(self) -> dict[str, Any]:
        """Return the summary for manifest and user."""
        on_cpu = {
            part: [node for node in nodes if node["provider"] == CPU]
            for part, nodes in self.placement.items()
        }
        return {
            "label": "compile-only",
            "compiled": {
                "soc": self.compiled.soc,
                "htp_arch": self.compiled.htp_arch,
                "sdk": self.compiled.sdk,
                "binaries": self.compiled.binaries,
            },
            "nodes": {part: len(nodes) for part, nodes in self.placement.items()},
            "nodes_on_cpu": {part: len(nodes) for part, nodes in on_cpu.items()},
            "costs": self.costs,
        }


def compile_graphs(folder: Path, soc: Soc) -> CompileResult:
    """Compile every part of the prefill and decode graphs in ``folder`` for ``soc``, beside them.

    Raises:
        ExportError: the compiler crashed, refused a graph, or took no node of it.
    """
    done = {part: _compile_apart(folder, part, soc) for part in read_static(folder).all_parts()}
    files = {part: f"{part}_ctx.onnx" for part in done}
    sdks, binaries = set(), {}
    for name in files.values():
        for context in _contexts(folder / name):
            sdks.add(context["ep_sdk_version"])
            # Of several contexts in a file, one names the binary that holds all of them.
            if binary := context.get("ep_cache_context"):
                binaries[binary] = (folder / binary).stat().st_size
    compiled = Compiled(
        soc=soc.name,
        soc_model=soc.soc_model,
        htp_arch=soc.htp_arch,
        sdk=", ".join(sorted(sdks)),
        graphs=files,
        binaries=binaries,
    )
    return CompileResult(
        compiled,
        {part: result["nodes"] for part, result in done.items()},
        {part: result["cost"] for part, result in done.items()},
    )


def compile_here(folder: Path, part: str, soc: Soc, trace_folder: Path) -> list[dict[str, str]]:
    """Compile one part in this process; return every node with its provider and the reason."""
    session = create_session(
        folder / f"{part}.onnx",
        "qnn",
        n_threads=1,
        options={
            **chip_options(soc.soc_model, soc.htp_arch),
            "enable_framework_op_trace": "1",
            "framework_op_trace_dir": str(trace_folder),
        },
        entries={
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(folder / f"{part}_ctx.onnx"),
        },
    )
    reasons = _reasons(trace_folder / _TRACE_FILE)
    return [
        {"name": name, "op": op, "provider": provider}
        | ({"reason": reasons.get(name, _UNTOLD)} if provider == CPU else {})
        for name, (provider, op) in nodes_of(session).items()
    ]


def _compile_apart(folder: Path, part: str, soc: Soc) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", __name__, str(folder), part, soc.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"QNN compiled {part} for {_TIMEOUT_S} s without an end") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(
            f"QNN could not compile {part} for {soc.name} (exit code {done.returncode}): {said}"
        )
    result: dict[str, Any] = json.loads(lines[-1])
    if not _contexts(folder / f"{part}_ctx.onnx"):
        raise ExportError(
            f"QNN wrote no context binary of {part} for {soc.name}, though it reports success; "
            f"is {PROVIDERS['qnn'].pip_name} whole?"
        )
    return result


def _contexts(path: Path) -> list[dict[str, str]]:
    """Return the text attributes of every ``EPContext`` node in the model at ``path``."""
    model = onnx.load(str(path), load_external_data=False)
    return [
        {a.name: a.s.decode() for a in node.attribute if a.type == onnx.AttributeProto.STRING}
        for node in model.graph.node
        if node.op_type == "EPContext"
    ]


def _reasons(trace: Path) -> dict[str, str]:
    """Return node name to reason of every node that QNN's own trace calls unsupported."""
    if not trace.is_file():
        return {}
    found = json.loads(trace.read_text("utf-8")).get("unsupported_nodes", [])
    return {entry["node_name"]: entry["reason"] for entry in found}


def _main(folder: str, part: str, soc: str) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edgekd-trace-") as trace_folder:
        nodes = compile_here(Path(folder), part, find_soc(soc), Path(trace_folder))
    cost = {"compile_s": time.perf_counter() - start, "peak_memory_bytes": peak_rss_bytes()}
    print(json.dumps({"nodes": nodes, "cost": cost}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
