"""Write a checkpoint as an ONNX folder for NPUs: fixed shapes, compiled where QNN is installed.

The folder holds three graphs over the same weights (``host``, ``prefill``, ``decode``), and with
QNN a context binary for either of the latter two, which are cut into parts where a binary would be
too large. Blocks are those of the GGUF file; the graphs calculate in fp16, so nothing has to be
calibrated, or by choice in 16-bit integers, for which a text is. What the host looks up lies in a
file of its own: it is all that a device needs beside the binaries.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.devices.snapdragon import find_soc
from edgekd.errors import ExportError
from edgekd.export.blocks import BITS
from edgekd.export.calibrate import read_ids
from edgekd.export.checkpoint import TOKENIZER_FILES, Checkpoint
from edgekd.export.npu_calibrate import measure_ranges
from edgekd.export.npu_parts import MAX_BINARY_BYTES, Part, cut_into_parts
from edgekd.export.npu_quantize import hidden_score, quantize_graph
from edgekd.export.onnx_graph import FloatType, GraphBuilder
from edgekd.export.onnx_weights import WeightFiles
from edgekd.export.plan import Plan
from edgekd.export.qnn_compile import compile_graphs
from edgekd.export.static_attention import StaticShape
from edgekd.export.static_decoder import add_host_graph, add_static_decoder
from edgekd.files import sha256_of
from edgekd.progress import Progress
from edgekd.runtime.providers import PROVIDERS
from edgekd.runtime.static_model import (
    HOST_GRAPH,
    Compiled,
    StaticModel,
    part_names,
    write_static,
)
from edgekd.units import format_bytes

WEIGHTS_FILE = "model.onnx.data"
HOST_DATA_FILE = "host.data"
PLACEMENT_FILE = "placement.json"
_HOST_WEIGHTS = ("model.embed_tokens.", "cos_table", "sin_table", "local_cos", "local_sin")
N_ACTIVATION_TOKENS = 2_048
"""Of the text: ends of ranges settle soon, and calibration runs at prompt speed."""
_OPSET = 23  # the first with RMSNormalization and RotaryEmbedding
_QUANTS = ("f16", *BITS)


@dataclass(frozen=True, kw_only=True)
class NpuOptions:
    """What the graphs are made for."""

    soc: str = "sm8650"
    context_tokens: int = 1024
    prefill_tokens: int = 64
    activations_text: Path | None = None
    """Text on which ranges of 16-bit integer activations are calibrated; None for fp16."""
    emulate: bool = True
    """Whether what was compiled is run too, in QNN's emulator: minutes for a large model."""
    max_binary_bytes: int = MAX_BINARY_BYTES
    """Of one context binary; layers are dealt out over as many as it takes."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ExportError: one is out of range.
            RecipeError: the chip is unknown.
        """
        find_soc(self.soc)
        if not 2 <= self.prefill_tokens <= self.context_tokens:
            raise ExportError(
                f"--prefill {self.prefill_tokens} and --ctx {self.context_tokens} do not go "
                "together: 2 or more tokens are taken at once, and no more than the context holds"
            )

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of them: a text by its hash."""
        content = asdict(self)
        text = content.pop("activations_text")
        return content | ({} if text is None else {"activations_text_sha256": sha256_of(text)})


def write_npu(
    checkpoint: Checkpoint, plan: Plan, folder: Path, options: NpuOptions, progress: Progress
) -> dict[str, Any]:
    """Write ``checkpoint`` into the empty ``folder``; return what was compiled, for its report.

    Raises:
        ExportError: the plan asks for a type that the graphs do not have, the context is longer
            than the model's, a layer or a binary is larger than allowed, or the compiler fails or
            leaves nodes out.
        DataError: the text for activations cannot be read, is short, or drives them to infinity.
    """
    _check(checkpoint, plan, options)
    text = options.activations_text
    ids = None if text is None else read_ids(checkpoint, text, N_ACTIVATION_TOKENS)
    parts = write_graphs(checkpoint, plan, folder, options)
    if len(parts) > 1:
        progress.say(f"cut the layers into {len(parts)} parts")
    model = _describe(checkpoint, options, len(parts))
    write_static(folder, model)
    described = {"parts": [part.describe() for part in parts]}
    activations: dict[str, Any] = {"type": model.activations}
    if ids is not None:
        progress.say(f"calibrating activations on {len(ids)} tokens of {text}")
        model, left = round_activations(checkpoint, folder, model, ids)
        activations = {"type": model.activations, "n_tokens": len(ids), "values_in_fp16": left}
    if find_spec(str(PROVIDERS["qnn"].plugin)) is None:
        progress.say(
            "not compiled: install the compiler with pip install onnxruntime-qnn and export again; "
            "until then the graphs run on the CPU"
        )
        return {"label": "untested", **described, "activations": activations, "compiled": None}
    progress.say(f"compiling for {options.soc}; minutes for large models")
    result = compile_graphs(folder, find_soc(options.soc))
    check_binaries(result.compiled, options.max_binary_bytes)
    write_static(folder, replace(model, compiled=result.compiled))
    placed = {"soc": options.soc, "graphs": result.placement}
    (folder / PLACEMENT_FILE).write_text(json.dumps(placed, indent=1) + "\n", "utf-8")
    return {**described, "activations": activations, **result.report()}


def write_graphs(
    checkpoint: Checkpoint, plan: Plan, folder: Path, options: NpuOptions
) -> list[Part]:
    """Write the graphs, their weights and the text side into ``folder``; return the parts of each.

    Raises:
        ExportError: a layer or the head is larger than a binary may be.
    """
    parts = cut_into_parts(checkpoint, plan, options.max_binary_bytes)
    apart = dict.fromkeys(_HOST_WEIGHTS, folder / HOST_DATA_FILE)
    sizes = {"prefill": options.prefill_tokens, "decode": 1}
    # Scales of 16-bit codes may be too small for fp16, so those graphs are of fp32 around them.
    floats: FloatType = np.float16 if options.activations_text is None else np.float32
    with WeightFiles(folder / WEIGHTS_FILE, apart) as weights:
        host = GraphBuilder(weights, floats)
        add_host_graph(host, checkpoint, plan, options.context_tokens)
        host.save(folder / HOST_GRAPH, "edgekd host", _OPSET)
        for graph, n_tokens in sizes.items():
            shape = StaticShape(n_tokens, options.context_tokens)
            for name, part in zip(part_names(graph, len(parts)), parts, strict=True):
                builder = GraphBuilder(weights, floats)
                add_static_decoder(builder, checkpoint, plan, shape, part)
                builder.save(folder / f"{name}.onnx", f"edgekd {name}", _OPSET)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    config = checkpoint.config | {"max_position_embeddings": options.context_tokens}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return parts


def round_activations(
    checkpoint: Checkpoint, folder: Path, model: StaticModel, ids: list[int]
) -> tuple[StaticModel, dict[str, int]]:
    """Give the float graphs in ``folder`` activations of 16 bits, calibrated on ``ids``.

    Returns ``model`` as it then is, and for each part how many of its values stay floats.

    Raises:
        DataError: there are too few tokens, or they drive a value to infinity.
    """
    first_id = checkpoint.config.get("bos_token_id")
    ranges = measure_ranges(
        folder, ids, first_id if isinstance(first_id, int) else None, os.cpu_count() or 1
    )
    rounded = replace(model, activations="a16", hidden=hidden_score(ranges))
    left = {
        part: quantize_graph(folder / f"{part}.onnx", ranges, rounded.hidden)
        for part in model.all_parts()
    }
    write_static(folder, rounded)
    return rounded, left


def check_binaries(compiled: Compiled, limit_bytes: int) -> None:
    """Hold what came out against what was asked for.

    Raises:
        ExportError: a binary is larger than ``limit_bytes``.
    """
    for name, n_bytes in compiled.binaries.items():
        if n_bytes > limit_bytes:
            raise ExportError(
                f"{name} is {format_bytes(n_bytes)}, and --max-binary allows "
                f"{format_bytes(limit_bytes)}: QNN added more than expected; allow more if the "
                "chip takes it, or less to cut the layers into more parts"
            )


def _check(checkpoint: Checkpoint, plan: Plan, options: NpuOptions) -> None:
    if plan.quant not in _QUANTS:
        raise ExportError(f"NPU graphs know {', '.join(_QUANTS)}, not {plan.quant}")
    trained = int(checkpoint.config["max_position_embeddings"])
    if options.context_tokens > trained:
        raise ExportError(
            f"--ctx {options.context_tokens} is longer than the model's {trained} positions"
        )
    if options.activations_text is not None and plan.quant == "f16":
        raise ExportError("16-bit activations go with matrices on a grid, not with f16; use q4_0")


def _describe(checkpoint: Checkpoint, options: NpuOptions, n_parts: int) -> StaticModel:
    architecture, config = checkpoint.architecture, checkpoint.config
    layers = (architecture.window(layer, config) for layer in range(checkpoint.n_layers))
    windows = {"" if window is None else "local_": window for window in layers}
    return StaticModel(
        context_tokens=options.context_tokens,
        prefill_tokens=options.prefill_tokens,
        windows=windows,
        n_parts=n_parts,
    )
