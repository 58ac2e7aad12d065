"""Our loop over ONNX Runtime beside onnxruntime-genai's, on the same folder and threads.

    python -m onnxruntime_genai.models.builder -m unused -i CHECKPOINT -o BUILT -c CACHE \
        -p int4 -e cpu
    python benchmarks/onnx_decode.py --model FOLDER --built BUILT --text F \
        --out benchmarks/results/onnx_decode.json

FOLDER comes from ``edgekd export --format onnx --quant q4_0 --head q4_0``, which writes
genai_config.json too, so both run the very same graph; with BUILT, genai also runs what its own
builder makes of the same checkpoint in as many bits. A prompt of 64 tokens, then 64 greedy tokens
timed, in turns; the ratio is that of neighbouring turns. Where a model's memory happens to lie
makes it some percent faster or slower for as long as it is open, so several processes open the
models anew, in an order drawn by lot. "edgekd batch" is the engine of the server, with one text.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from decoding import (
    CONTEXT_TOKENS,
    N_DECODE,
    compared,
    edgekd_turn,
    genai_turn,
    measure_decoding,
)
from record import record

GENAI, ENGINE, BATCH = "onnxruntime-genai", "edgekd", "edgekd batch"
BUILT = "onnxruntime-genai, its builder's file"
N_PROMPT, N_ROUNDS = 64, 4


def batch_turn(folder: Path, ids: Sequence[int], threads: int) -> Callable[[], float]:
    """Return a function that continues ``ids`` greedily and returns the seconds it decoded."""
    from edgekd.runtime.batch_engine import EngineOptions, Work
    from edgekd.runtime.batch_loading import open_batch_model

    options = EngineOptions(context_tokens=CONTEXT_TOKENS, n_slots=4, n_threads=threads)
    engine = open_batch_model(folder, options).engine

    def turn() -> float:
        engine.forget(0)
        token_id = int(engine.step([Work(0, tuple(ids), 1)])[0][-1].argmax())
        start_s = time.perf_counter()
        for _ in range(N_DECODE):
            token_id = int(engine.step([Work(0, (token_id,), 1)])[0][-1].argmax())
        return time.perf_counter() - start_s

    return turn


def measure(
    folder: Path, built: Path | None, text: str, threads: int, number: int
) -> dict[str, list[float]]:
    """Return each engine's tokens per second in every round of this process."""
    from edgekd.runtime.tokenizer import FileTokenizer

    ids = FileTokenizer(folder).encode(text[: 20 * N_PROMPT])[:N_PROMPT]
    makers = {
        GENAI: lambda: genai_turn(folder, ids, threads),
        ENGINE: lambda: edgekd_turn(folder, ids, threads),
        BATCH: lambda: batch_turn(folder, ids, threads),
    }
    if built:
        makers[BUILT] = lambda: genai_turn(built, ids, threads)
    order = random.Random(number).sample(list(makers), len(makers))
    turns = {name: makers[name]() for name in order}
    found = measure_decoding({name: turns[name] for name in makers}, GENAI, N_ROUNDS)
    return {name: found[name]["tokens_per_s"]["samples"] for name in makers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--built", type=Path, help="of the same checkpoint by genai's builder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from edgekd.runtime.loading import default_threads

    threads = arguments.threads or default_threads()
    if arguments.worker is not None:
        text = arguments.text.read_text("utf-8")
        number = arguments.worker
        print(json.dumps(measure(arguments.model, arguments.built, text, threads, number)))
        return
    speeds: dict[str, list[float]] = {}
    for number in range(arguments.processes):
        command = [sys.executable, *sys.argv, "--worker", str(number)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for name, found in json.loads(done.stdout.splitlines()[-1]).items():
            speeds.setdefault(name, []).extend(found)
    result = {
        "model": arguments.model.name,
        "threads": threads,
        "processes": arguments.processes,
        "decoding": compared(speeds, GENAI),
    }
    if arguments.built:
        own = {name: speeds[name] for name in (BUILT, ENGINE)}
        result["decoding_each_its_own_file"] = compared(own, BUILT)
    record(result, arguments.out, peers=["onnxruntime-genai"])


if __name__ == "__main__":
    main()
