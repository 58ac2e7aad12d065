"""Training on the int4 grid against rounding afterwards, at the same number of tokens.

    python benchmarks/qad.py --teacher T --student S --text F --held-out G \
        --out benchmarks/results/qad.json

The student, already distilled, is trained on twice from the same point, tokens and settings: in
float, and on the grid that ships. The first is exported as F16, Q4_0 and Q4_K_M with an importance
matrix (made by llama.cpp itself), the second as Q4_0. KL is to the teacher, each file on llama.cpp,
on held-out text. Closed is the share of the KL that rounding adds and training on the grid takes
back.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record

ROW_TOKENS, ROWS = 256, 4
N_EVAL_TOKENS = 4096


def train(teacher: Path, student: Path, text: Path, out: Path, steps: int, grid: Any) -> None:
    """Continue ``student`` on ``text``."""
    from edgekd.distill.distill import distill
    from edgekd.distill.recipe import Job, Recipe

    recipe = Recipe(
        steps=steps,
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS,
        learning_rate=2e-4,
        warmup_steps=max(1, steps // 20),
        compile="full",
        save_steps=10_000,
        grid=grid,
    )
    job = Job(teacher=str(teacher), student=str(student), data=[str(text)], recipe=recipe)
    distill(job, out)


def importance_matrix(checkpoint: Path, text: str) -> dict[str, Any]:
    """Return the mean square of every matrix's input, under its GGUF name."""
    from edgekd.export.checkpoint import open_checkpoint
    from edgekd.runtime.tokenizer import FileTokenizer
    from edgekd.runtime.torch_engine import load_causal_lm

    architecture = open_checkpoint(checkpoint).architecture
    model = load_causal_lm(checkpoint, torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            flat = args[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + flat.square().sum(0)
            counts[name] = counts.get(name, 0) + len(flat)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            module.register_forward_hook(watch(architecture.to_gguf_name(f"{name}.weight")))
    ids = FileTokenizer(checkpoint).encode(text)[:8192]
    with torch.no_grad():
        for start in range(0, len(ids), 512):
            model(torch.tensor([ids[start : start + 512]]), logits_to_keep=1)
    return {name: (sums[name] / counts[name]).numpy().astype(np.float32) for name in sums}


def quantize_k(source: Path, target: Path, importance: dict[str, Any]) -> None:
    """Write ``source`` as Q4_K_M by llama.cpp's own quantizer."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert status == 0, status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=190)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from edgekd.export.export_model import export_model
    from edgekd.files import size_of
    from edgekd.runtime.five_rows import measure_quality

    teacher, text = arguments.teacher, arguments.text
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder)
        train(teacher, arguments.student, text, folder / "float", arguments.steps, "none")
        train(teacher, arguments.student, text, folder / "grid", arguments.steps, "q4_0")
        files = {}
        for name, source, quant in (
            ("float F16", "float", "f16"),
            ("float rounded to Q4_0", "float", "q4_0"),
            ("trained on the grid Q4_0", "grid", "q4_0"),
        ):
            files[name] = folder / f"{source}-{quant}.gguf"
            export_model(str(folder / source), "gguf", files[name], quant=quant)
        k_quant = folder / "float-q4_k_m.gguf"
        calibration = text.read_text("utf-8")[:100_000]
        quantize_k(files["float F16"], k_quant, importance_matrix(folder / "float", calibration))
        files["float Q4_K_M with importance matrix"] = k_quant
        held_out = arguments.held_out.read_text("utf-8")
        quality = measure_quality(teacher, list(files.values()), held_out, N_EVAL_TOKENS)
        rows = {
            name: {
                "kl_nats": quality[path].kl_nats,
                "top1_agreement": quality[path].top1_agreement,
                "perplexity": quality[path].perplexity,
                "bytes": size_of(path),
            }
            for name, path in files.items()
        }
    kl = {name: row["kl_nats"] for name, row in rows.items()}
    gap = kl["float rounded to Q4_0"] - kl["float F16"]
    closed = (kl["float rounded to Q4_0"] - kl["trained on the grid Q4_0"]) / gap
    grid, k = rows["trained on the grid Q4_0"], rows["float Q4_K_M with importance matrix"]
    result = {
        "trained_tokens": arguments.steps * ROW_TOKENS * ROWS,
        "rows": rows,
        "gap_closed": closed,
        "kl_over_q4_k_m": grid["kl_nats"] / k["kl_nats"],
        "bytes_over_q4_k_m": grid["bytes"] / k["bytes"],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
