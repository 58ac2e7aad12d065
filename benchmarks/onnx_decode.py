"""Our loop over ONNX Runtime beside onnxruntime-genai's, on the same folder and threads.

    python benchmarks/onnx_decode.py --model FOLDER --text F --out results/onnx_decode.json

FOLDER comes from ``edgekd export --format onnx``, which writes genai_config.json too, so both run
the very same graph. A prompt of 64 tokens, then 64 greedy tokens timed, in turns; the ratio is that
of neighbouring turns. "edgekd batch" is the engine of the server, with one text.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from decoding import CONTEXT_TOKENS, N_DECODE, edgekd_turn, genai_turn, measure_decoding
from record import record

GENAI, ENGINE, BATCH = "onnxruntime-genai", "edgekd", "edgekd batch"
N_PROMPT = 64


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from edgekd.runtime.loading import default_threads
    from edgekd.runtime.tokenizer import FileTokenizer

    folder = arguments.model
    threads = arguments.threads or default_threads()
    text = arguments.text.read_text("utf-8")[: 20 * N_PROMPT]
    ids = FileTokenizer(folder).encode(text)[:N_PROMPT]
    turns = {
        GENAI: genai_turn(folder, ids, threads),
        ENGINE: edgekd_turn(folder, ids, threads),
        BATCH: batch_turn(folder, ids, threads),
    }
    decoding = measure_decoding(turns, GENAI, arguments.rounds)
    record({"model": folder.name, "threads": threads, "decoding": decoding}, arguments.out)


if __name__ == "__main__":
    main()
