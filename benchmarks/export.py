"""What an export costs and what its file is worth, beside the tools of each format.

    python benchmarks/export.py --model CHECKPOINT --out benchmarks/results/export.json

ONNX beside onnxruntime-genai's model builder, GGUF beside llama.cpp's converter and its quantizer.
Exports: every command in a process of its own, from start to end with its imports, in turns;
peak memory is that of the largest process it needs. "edgekd" verifies what it writes against the
checkpoint, which the others do not do; "edgekd, unverified" is the same with --no-verify. Sizes are
those of graph and weights, without the tokenizer, or of the GGUF file.

Decoding: the files in turns in one process, ONNX in onnxruntime-genai, and ours also in edgekd's
engine, GGUF in edgekd's engine; ratios are those of neighbouring turns. ONNX files are compared at
equal bits: 4 in all matrices, the embedding included, blocks of 32, int8 activations. Not measured:
quality.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decoding import N_DECODE, edgekd_turn, genai_turn, in_turn, measure_decoding
from record import record

from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.bench_worker import text_ids
from edgekd.runtime.loading import default_threads
from edgekd.runtime.stats import summarise
from edgekd.runtime.tokenizer import FileTokenizer

N_PROMPT = 64
OURS, OURS_UNVERIFIED = "edgekd", "edgekd, unverified"
BUILDER, LLAMA_CPP = "genai builder", "llama.cpp"
GGUF_QUANTS = ("q4_0", "q4_k_m")


def ours(*options: str) -> Callable[[Path, Path], list[str]]:
    """Return what makes the command of a user, with ``options``."""
    command = [sys.executable, "-m", "edgekd", "export", "--quiet", *options]
    return lambda model, out: [*command, str(model), "--out", str(out)]


def genai_builder(model: Path, out: Path) -> list[str]:
    """Return the builder's command for a checkpoint on disk."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "unused"]
    paths = ["-i", str(model), "-o", str(out), "-c", str(out.with_name("builder-cache"))]
    return [*command, *paths, "-p", "int4", "-e", "cpu"]


Commands = Mapping[str, Callable[[Path, Path], list[str]]]
_AS_ONNX = ("--format", "onnx", "--quant", "q4_0", "--head", "q4_0")
ONNX: Commands = {
    OURS: ours(*_AS_ONNX),
    OURS_UNVERIFIED: ours(*_AS_ONNX, "--no-verify"),
    BUILDER: genai_builder,
}


def gguf_commands(quant: str) -> Commands:
    """Return the commands that write a GGUF of type ``quant``."""

    def llama_cpp(model: Path, out: Path) -> list[str]:
        script = Path(__file__).with_name("llama_cpp_gguf.py")
        return [sys.executable, str(script), str(model), str(out), quant]

    as_gguf = ("--format", "gguf", "--quant", quant)
    return {
        OURS: ours(*as_gguf),
        OURS_UNVERIFIED: ours(*as_gguf, "--no-verify"),
        LLAMA_CPP: llama_cpp,
    }


def measure_exports(
    commands: Commands, model: Path, folder: Path, rounds: int
) -> dict[str, dict[str, Any]]:
    """Run every export ``rounds`` times in turns; the last files stay in ``folder``."""
    folder.mkdir()
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in in_turn(list(commands), number):
            runs[name].append(_run(commands[name](model, folder / name)))
    return {
        name: {
            "seconds": asdict(summarise([seconds for seconds, _ in found])),
            "peak_rss_bytes": max(rss_bytes for _, rss_bytes in found),
            "file_bytes": sum(path.stat().st_size for path in _weights(folder / name)),
        }
        for name, found in runs.items()
    }


def _weights(result: Path) -> list[Path]:
    return list(result.glob("*.onnx*")) if result.is_dir() else [result]


def measure_onnx_decoding(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Return tokens per second of our folder and of the builder's, in turns."""
    ids = text_ids(FileTokenizer(model), N_PROMPT)
    threads = default_threads()
    turns = {
        f"{OURS} in genai": genai_turn(folder / OURS, ids, threads),
        f"{BUILDER} in genai": genai_turn(folder / BUILDER, ids, threads),
        f"{OURS} in edgekd": edgekd_turn(folder / OURS, ids, threads),
    }
    return measure_decoding(turns, f"{BUILDER} in genai", rounds)


def measure_gguf_decoding(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Return tokens per second of our file and of llama.cpp's, in turns."""
    ids = text_ids(FileTokenizer(model), N_PROMPT)
    threads = default_threads()
    turns = {name: edgekd_turn(folder / name, ids, threads) for name in (OURS, LLAMA_CPP)}
    return measure_decoding(turns, LLAMA_CPP, rounds)


def _run(command: Sequence[str]) -> tuple[float, int]:
    """Return wall-clock seconds and peak resident bytes of ``command``."""
    script = str(Path(__file__).with_name("run_measured.py"))
    measured = [sys.executable, "-I", "-S", script, *command]
    done = subprocess.run(measured, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found["seconds"], found["peak_rss_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="of the exports")
    parser.add_argument("--decode-rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, rounds, decode_rounds = arguments.model, arguments.rounds, arguments.decode_rounds
    result: dict[str, Any] = {
        "model_sha256": open_checkpoint(model).weights_sha256(),
        "prompt_tokens": N_PROMPT,
        "decoded_tokens": N_DECODE,
    }
    with tempfile.TemporaryDirectory() as holder:
        for quant in GGUF_QUANTS:
            folder = Path(holder) / quant
            result[f"gguf {quant}"] = {
                "exports": measure_exports(gguf_commands(quant), model, folder, rounds),
                "decoding": measure_gguf_decoding(model, folder, decode_rounds),
            }
        folder = Path(holder) / "onnx"
        result["onnx q4_0"] = {
            "exports": measure_exports(ONNX, model, folder, rounds),
            "decoding": measure_onnx_decoding(model, folder, decode_rounds),
        }
    record(result, arguments.out, peers=["onnxruntime-genai", "llama-cpp-python"])


if __name__ == "__main__":
    main()
