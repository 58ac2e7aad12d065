"""How close each export of a model is to its checkpoint, over 2,048 positions of a text.

    python benchmarks/export_fidelity.py --model CHECKPOINT --text TEXT \
        --out benchmarks/results/export_fidelity.json

Each row compares an artifact on its engine with the float checkpoint in torch. The row
"fake-quantized" is torch running the rounded weights: what Q4_0 costs before any engine adds
its own arithmetic. Not measured: speed.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import record

from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import Format, export_model
from edgekd.export.plan import make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.files import sha256_of
from edgekd.runtime.fidelity import compare_engines
from edgekd.runtime.loading import open_model
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

N_POSITIONS, WINDOW_TOKENS = 2048, 256
EXPORTS: list[tuple[Format, str]] = [
    ("gguf", "f16"),
    ("gguf", "q8_0"),
    ("gguf", "q4_0"),
    ("onnx", "f32"),
    ("onnx", "q4_0"),
]


def measure(model: Path, text: str) -> dict[str, Any]:
    """Return the distance of every export of ``model`` from it."""
    checkpoint = open_checkpoint(model)
    ids = FileTokenizer(model).encode(text)[:N_POSITIONS]
    windows = [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids), WINDOW_TOKENS)]
    reference = TorchEngine(load_causal_lm(model, torch.float32), WINDOW_TOKENS)
    rounded = TorchEngine(rounded_model(checkpoint, make_plan(checkpoint, "q4_0")), WINDOW_TOKENS)
    rows = {"fake-quantized q4_0": asdict(compare_engines(reference, rounded, windows))}
    for output_format, quant in EXPORTS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / ("model.gguf" if output_format == "gguf" else "model")
            export_model(str(model), output_format, out, quant=quant)
            engine = open_model(out, context_tokens=WINDOW_TOKENS).engine
            rows[f"{output_format} {quant}"] = asdict(compare_engines(reference, engine, windows))
            engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "model_sha256": open_checkpoint(arguments.model).weights_sha256(),
        "text_sha256": sha256_of(arguments.text),
        "rows": measure(arguments.model, arguments.text.read_text("utf-8")),
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
