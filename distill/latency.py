"""From a latency on this device to the size of a student.

Decoding reads every weight once a token, so its time is proportional to the bytes of the file that
ships. The teacher's own int4 file is measured here, now, and tells the factor.
"""

import tempfile
from pathlib import Path

from edgekd.distill.student_shape import Sizes, Way, count_parameters, sizes_of, sizes_within
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.to_gguf import write_gguf
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench import BenchSettings, bench_models

_BODY_BYTES, _HEAD_BYTES = 18 / 32, 34 / 32  # of a weight in Q4_0 and in Q8_0


def sizes_for_latency(
    checkpoint: Checkpoint, max_ms: float, way: Way, progress: Progress | None = None
) -> Sizes:
    """Return the largest sizes that decode a token in ``max_ms`` here, by llama.cpp on Q4_0.

    Raises:
        RecipeError: nothing is left at that speed.
        EngineError: the teacher's file cannot be run.
    """
    measured_ms = measure_ms(checkpoint, progress or Silence())
    full = bytes_read(checkpoint, sizes_of(checkpoint))
    budget = int(full * max_ms / measured_ms)
    return sizes_within(checkpoint, budget, way, bytes_read)


def measure_ms(checkpoint: Checkpoint, progress: Progress) -> float:
    """Return the median milliseconds of a decoded token of ``checkpoint`` on Q4_0, here."""
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        path = Path(folder) / "teacher.gguf"
        write_gguf(checkpoint, make_plan(checkpoint, "q4_0"), path, progress)
        settings = BenchSettings(prompt_tokens=64, decode_tokens=64, repetitions=3)
        (result,) = bench_models([str(path)], settings, progress)
    return result.ms_per_token["p50"]


def bytes_read(checkpoint: Checkpoint, sizes: Sizes) -> int:
    """Return the bytes that one token reads of a Q4_0 file with the head in Q8_0."""
    head = int(checkpoint.config["vocab_size"]) * sizes.hidden
    embeddings = head * (1 if checkpoint.is_tied else 2)
    body = count_parameters(checkpoint, sizes) - embeddings
    return int(body * _BODY_BYTES + head * _HEAD_BYTES)
