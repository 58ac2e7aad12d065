"""Q4_0 rounded plainly against Q4_0 rounded on calibration text.

    python benchmarks/calibrated_q4_0.py --model M --text F --held-out G \
        --out benchmarks/results/calibrated_q4_0.json

KL is to the model's own float logits on held-out text, of its weights as rounded, in torch: the
files are equal in size and speed, and engines add the same arithmetic to each. Not measured: models
that were trained on the grid, for which plain rounding is exact.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import record

from edgekd.export.calibrate import calibrate
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_options import CalibrationOptions
from edgekd.export.importance_matrix import measure_importance, write_importance
from edgekd.export.plan import Quant, make_plan
from edgekd.export.rounded_model import rounded_model
from edgekd.runtime.fidelity import compare_engines
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

WINDOW_TOKENS = 512


ROWS: dict[str, tuple[Quant, str]] = {
    "Q4_0": ("q4_0", "none"),
    "Q4_0 with importance matrix": ("q4_0", "imatrix"),
    "Q4_0 by GPTQ": ("q4_0", "text"),
    "Q4_K_M": ("q4_k_m", "none"),
    "Q4_K_M with importance matrix": ("q4_k_m", "imatrix"),
}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return KL and top-1 agreement of every way to round."""
    checkpoint = open_checkpoint(arguments.model)
    options = calibrations(checkpoint, arguments, folder)
    windows = held_out_windows(checkpoint, arguments)
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), WINDOW_TOKENS)
    rows = {}
    for label, (quant, data) in ROWS.items():
        start_s = time.perf_counter()
        plan = calibrate(checkpoint, make_plan(checkpoint, quant), options[data], folder)
        rounding_s = time.perf_counter() - start_s
        rounded = TorchEngine(rounded_model(checkpoint, plan), WINDOW_TOKENS)
        rows[label] = {**asdict(compare_engines(exact, rounded, windows)), "rounding_s": rounding_s}
    return {"calibration_tokens": arguments.tokens, "rows": rows}


def calibrations(
    checkpoint: Checkpoint, arguments: argparse.Namespace, folder: Path
) -> dict[str, CalibrationOptions]:
    """Return what each way to round is given; the importance matrix is measured here."""
    content = arguments.text.read_text("utf-8")[: 16 * arguments.tokens]
    ids = FileTokenizer(checkpoint.folder).encode(content)[: arguments.tokens]
    imatrix = folder / "imatrix.gguf"
    importance = measure_importance(checkpoint, ids, arguments.text.name)
    write_importance(importance, checkpoint.architecture, imatrix)
    return {
        "none": CalibrationOptions(),
        "imatrix": CalibrationOptions(imatrix=imatrix),
        "text": CalibrationOptions(text=arguments.text, n_tokens=arguments.tokens),
    }


def held_out_windows(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[list[int]]:
    """Return held-out text in windows of token ids."""
    ids = FileTokenizer(checkpoint.folder).encode(arguments.held_out.read_text("utf-8"))
    ids = ids[: arguments.held_out_tokens]
    return [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record(measure(arguments, Path(folder)), arguments.out)


if __name__ == "__main__":
    main()
