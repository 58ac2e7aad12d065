"""How near ``edgekd devices fit --on this`` is on artifacts that it was not calibrated on.

    python benchmarks/predictor_here.py --calibrate A B C D --predict E F G --out R.json
    python benchmarks/predictor_here.py --checkpoint FOLDER --work DIR --out R.json

The second form makes the artifacts: the checkpoint with 12, 21 and 30 layers (or as --layers says)
as Q4_0 and Q8_0 GGUF and as int4 ONNX; the middle one of each format is predicted from the others.
One ``edgekd bench`` measures all of them in turns, on a machine that should be quiet; its document
without the predicted models is what ``edgekd devices fit --measured`` gets, once for each of them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import record

FORMS = (("gguf", "q4_0"), ("gguf", "q8_0"), ("onnx", "q4_0"))
PROMPT_TOKENS, DECODE_TOKENS = 32, 64


def edgekd(*arguments: str) -> dict[str, Any]:
    """Return what a command of edgekd answers as JSON."""
    command = [sys.executable, "-m", "edgekd", *arguments, "--quiet", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


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
            edgekd("prune", checkpoint, "--keep", kept, "--out", str(cut))
        for container, quant in FORMS:
            out = work / (
                f"{count}-{quant}.gguf" if container == "gguf" else f"{count}-{quant}-onnx"
            )
            if not out.exists():
                form = ["--format", container, "--quant", quant, "--out", str(out)]
                edgekd("export", str(cut), *form)
            (predicted if count == layers[1] else calibration).append(str(out))
    return calibration, predicted


def measure(models: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Return the document of one bench of all ``models``, which take turns."""
    tokens = ["-p", str(PROMPT_TOKENS), "-n", str(DECODE_TOKENS), "--ttft", ""]
    return edgekd("bench", *models, *tokens, "-r", str(repetitions), "--no-cold", "--no-roofline")


def compare(result: dict[str, Any], measured: Path | None) -> dict[str, Any]:
    """Return measured and predicted speed of one model; without ``measured`` from a probe alone."""
    # fit reads half of the context with every token, as the bench did on average.
    wish = ["--on", "this", "--ctx", str(DECODE_TOKENS)]
    known = ["--measured", str(measured)] if measured else []
    report = edgekd("devices", "fit", result["model"], *wish, *known)
    engine = result["engine"] if measured else "any"
    (first,) = [entry for entry in report["predictions"] if entry["backend"] == engine]
    (speed,) = [e["tokens_per_s"] for e in result["scenarios"] if e["kind"] == "decode"]
    return {
        "model": Path(result["model"]).name,
        "engine": result["engine"],
        "format": report["format"],
        "measured_tokens_per_s": speed["median"],
        "measured_ci95": speed["ci95"],
        "predicted_tokens_per_s": first["decode"]["value"],
        "interval": [first["decode"]["low"], first["decode"]["high"]],
        "basis": first["basis"],
        "error": first["decode"]["value"] / speed["median"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrate", nargs="+", default=[])
    parser.add_argument("--predict", nargs="+", default=[])
    parser.add_argument("--checkpoint")
    parser.add_argument("--layers", type=int, nargs=3, default=[12, 21, 30])
    parser.add_argument("--work", type=Path, default=Path("predictor-here"))
    parser.add_argument("-r", "--repetitions", type=int, default=10)
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
    document = measure([*calibration, *predicted], arguments.repetitions)
    known, asked = document["results"][: len(calibration)], document["results"][len(calibration) :]
    file = arguments.work / "calibration.json"
    file.write_text(json.dumps(document | {"results": known}))
    rows = [compare(result, file) for result in asked]
    result = {
        "settings": document["settings"],
        "conditions": document["conditions"],
        "valid": document["valid"],
        "worst_error": max(abs(row["error"]) for row in rows),
        "predicted": rows,
        "from_probe_alone": [compare(result, None) for result in asked],
        "calibration": [
            {
                "model": Path(result["model"]).name,
                "engine": result["engine"],
                "tokens_per_s": result["scenarios"][-1]["tokens_per_s"]["median"],
            }
            for result in known
        ],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
