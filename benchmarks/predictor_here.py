"""How near ``edgekd devices fit --on this`` is on artifacts that it was not calibrated on.

    python benchmarks/predictor_here.py --calibrate A B C D --predict E F G --out R.json
    python benchmarks/predictor_here.py --checkpoint FOLDER --work DIR --out R.json

The second form makes the artifacts: the checkpoint with 12, 21 and 30 layers (or as --layers says)
as Q4_0 and Q8_0 GGUF and as int4 ONNX; the middle one of each format is predicted from the others.
All are measured by ``edgekd bench`` in processes of their own, on a machine that should be quiet:
passes go through all models in turn and each model's fastest repetition in any pass counts, for
calibration and comparison alike.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import record

from edgekd.devices.fit import Wish, fit
from edgekd.devices.measured import OwnRun, read_bench
from edgekd.devices.this_machine import this_machine
from edgekd.runtime.model_workload import read_workload

FORMS = (("gguf", "q4_0"), ("gguf", "q8_0"), ("onnx", "q4_0"))


def edgekd(*arguments: str) -> str:
    """Run a command of edgekd and return its last line."""
    command = [sys.executable, "-m", "edgekd", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1]


def make_artifacts(
    checkpoint: str, work: Path, layers: Sequence[int]
) -> tuple[list[str], list[str]]:
    """Return the artifacts to calibrate on and to predict, made from cuts of ``checkpoint``."""
    calibration: list[str] = []
    predicted: list[str] = []
    for count in layers:
        cut = work / f"cut-{count}"
        if not cut.exists():
            kept = ",".join(map(str, range(count)))
            edgekd("prune", checkpoint, "--keep", kept, "--out", str(cut), "--quiet", "--json")
        for container, quant in FORMS:
            out = work / (
                f"{count}-{quant}.gguf" if container == "gguf" else f"{count}-{quant}-onnx"
            )
            if not out.exists():
                form = ["--format", container, "--quant", quant, "--out", str(out)]
                edgekd("export", str(cut), *form, "--quiet", "--json")
            (predicted if count == layers[1] else calibration).append(str(out))
    return calibration, predicted


def measure(models: Sequence[str], passes: int, options: Sequence[str], work: Path) -> list[OwnRun]:
    """Return the fastest run of each model over ``passes``."""
    best: dict[str, OwnRun] = {}
    file = work / "bench.json"
    for _ in range(passes):
        document = json.loads(edgekd("bench", *models, *options, "--quiet", "--json"))
        for run in document:
            run["decode_tokens_per_s"]["samples"] = [max(run["decode_tokens_per_s"]["samples"])]
        file.write_text(json.dumps(document))
        for model, run in zip(models, read_bench(file), strict=True):
            known = best.setdefault(model, run)
            if run.decode_tokens_per_s > known.decode_tokens_per_s:
                best[model] = run
    return [best[model] for model in models]


def compare(run: OwnRun, own: Sequence[tuple[OwnRun, Any]]) -> dict[str, Any]:
    """Return measured and predicted speed of one model that ``own`` does not hold."""
    workload = read_workload(run.model)
    # fit() reads half of the context with every token; the bench read this much.
    wish = Wish(context_tokens=round(2 * run.mean_depth_tokens))
    of_engine = [pair for pair in own if pair[0].backend == run.backend]
    target = this_machine(needs_probe=not of_engine)
    (first, *_) = fit(workload, target, wish, of_engine).predictions
    predicted = first.decode.value or 0.0
    return {
        "model": Path(run.model).name,
        "engine": run.backend,
        "format": workload.format,
        "read_bytes": workload.read_bytes,
        "measured_tokens_per_s": run.decode_tokens_per_s,
        "predicted_tokens_per_s": predicted,
        "interval": [first.decode.low, first.decode.high],
        "basis": first.basis,
        "error": predicted / run.decode_tokens_per_s - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate", nargs="+", default=[])
    parser.add_argument("--predict", nargs="+", default=[])
    parser.add_argument("--checkpoint")
    parser.add_argument("--layers", type=int, nargs=3, default=[12, 21, 30])
    parser.add_argument("--work", type=Path, default=Path("predictor-here"))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    calibration, predicted = arguments.calibrate, arguments.predict
    if arguments.checkpoint:
        calibration, predicted = make_artifacts(
            arguments.checkpoint, arguments.work, arguments.layers
        )
    if not calibration or not predicted:
        parser.error("give --checkpoint, or both --calibrate and --predict")
    options = ["-p", "32", "-n", "64", "-r", "5"]
    runs = measure([*calibration, *predicted], arguments.passes, options, arguments.work)
    pairs = [(run, read_workload(run.model)) for run in runs]
    own = pairs[: len(calibration)]
    rows = [compare(run, own) for run, _ in pairs[len(calibration) :]]
    untold = [compare(run, []) for run, _ in pairs[len(calibration) :]]
    result = {
        "settings": {"prompt_tokens": 32, "decode_tokens": 64, "passes": arguments.passes},
        "worst_error": max(abs(row["error"]) for row in rows),
        "predicted": rows,
        "from_probe_alone": untold,
        "calibration": [
            {
                "model": Path(run.model).name,
                "engine": run.backend,
                "read_bytes": load.read_bytes,
                "tokens_per_s": run.decode_tokens_per_s,
            }
            for run, load in own
        ],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
