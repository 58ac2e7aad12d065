"""Write a checkpoint as an ONNX folder that ONNX Runtime and onnxruntime-genai run.

The graph is ours, node by node: ``MatMulNBits`` with the very blocks of the GGUF file,
``GroupQueryAttention`` over one shared past/present buffer, and standard operators between.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from edgekd.errors import ExportError
from edgekd.export.blocks import BITS
from edgekd.export.checkpoint import TOKENIZER_FILES, Checkpoint
from edgekd.export.genai_config import Target, genai_config
from edgekd.export.onnx_attention import n_positions
from edgekd.export.onnx_decoder import add_decoder
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.onnx_weights import WeightFiles
from edgekd.export.plan import Plan
from edgekd.export.rope import rope_inv_freq

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
_OPSET = 23  # the first with RMSNormalization
_QUANTS = ("f32", "f16", *BITS)


def write_onnx(checkpoint: Checkpoint, plan: Plan, folder: Path, target: Target = "cpu") -> None:
    """Write ``checkpoint`` into the empty ``folder`` with the types of ``plan``.

    For the target ``cuda`` the graph calculates in fp16, cache and logits included.

    Raises:
        ExportError: the plan asks for a type that the graph does not have, or for Q4_1 of a matrix
            that has no zero points, or the config for rotary frequencies that depend on the length
            of the text.
    """
    if plan.quant not in _QUANTS:
        raise ExportError(
            f"ONNX export knows {', '.join(_QUANTS)}; {plan.quant} has no kernels on the CPU"
        )
    rope_inv_freq(checkpoint.config)  # refuses before a file is opened
    floats = np.float16 if target == "cuda" else np.float32
    with WeightFiles(folder / DATA_FILE) as weights:
        builder = GraphBuilder(weights, floats)
        add_decoder(builder, checkpoint, plan)
        builder.save(folder / MODEL_FILE, "edgekd", _OPSET)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    n_tokens = n_positions(checkpoint)
    _write_json(folder / "config.json", checkpoint.config | {"max_position_embeddings": n_tokens})
    described = genai_config(checkpoint, MODEL_FILE, n_tokens, target)
    _write_json(folder / "genai_config.json", described)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
