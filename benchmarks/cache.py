"""What a logit cache costs in bytes and noise, and what it gains in speed.

    python benchmarks/cache.py --teacher T --student S --small-student S3 --text F \
        --out benchmarks/results/cache.json

Noise: a batch's gradient with respect to the student's hidden states, from 200 caches that differ
only in their seed, against the dense one; unbiased means within three standard errors. Speed: a
step with the cache against one with the teacher, taking turns, for a student near the teacher's
size and for one of a third of it. Not measured: the capture itself, which is one teacher forward.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record
from turns import take_turns, turn_callback

N_CACHES, N_POSITIONS = 200, 256
N_STEPS, N_WARM_UP, ROW_TOKENS = 16, 3, 256


def noise(teacher: str, student: str, text: str) -> dict[str, Any]:
    """Return how far gradients from resampled caches are from the dense one."""
    import torch

    from edgekd.distill.cache import CaptureSettings
    from edgekd.distill.cache_codec import decode, encode
    from edgekd.distill.cache_format import Identity
    from edgekd.distill.cached_teacher import CachedTarget
    from edgekd.distill.loss_options import LossOptions
    from edgekd.distill.losses import OnlineTarget, distillation_loss
    from edgekd.runtime.tokenizer import FileTokenizer
    from edgekd.runtime.torch_engine import load_causal_lm

    settings = CaptureSettings()
    ids = FileTokenizer(Path(student)).encode(Path(text).read_text("utf-8")[:20_000])[:N_POSITIONS]
    models = [load_causal_lm(Path(folder), torch.float32).eval() for folder in (teacher, student)]
    with torch.no_grad():
        teacher_NH, student_NH = (
            model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
            for model in models
        )
    teacher_VH, student_VH = (model.get_output_embeddings().weight.detach() for model in models)
    labels, weights = torch.zeros(len(ids), dtype=torch.int64), torch.ones(len(ids))

    def gradient(target: Any) -> torch.Tensor:
        tested = student_NH.clone().requires_grad_()
        loss = distillation_loss(tested, student_VH, target, labels, weights, LossOptions()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        assert tested.grad is not None
        doubled: torch.Tensor = tested.grad.double()
        return doubled

    dense = gradient(OnlineTarget(teacher_NH, teacher_VH))
    identity = Identity(
        teacher="",
        teacher_sha256="",
        revision=None,
        source="checkpoint",
        dtype="float32",
        vocabulary_sha256="",
        template_sha256=None,
        vocab_size=len(teacher_VH),
        row_tokens=ROW_TOKENS,
        top_k=settings.top_k,
        top_mass=settings.top_mass,
        tail_samples=settings.tail_samples,
        temperatures=settings.temperatures,
        seed=0,
    )
    logits = teacher_NH @ teacher_VH.T
    total, squares = torch.zeros_like(dense), torch.zeros_like(dense)
    for seed in range(N_CACHES):
        records = encode(logits, identity, torch.Generator().manual_seed(seed))
        found = gradient(CachedTarget(decode(records, (1.0, 2.0, 4.0), 1.0), torch.device("cpu")))
        total += found
        squares += found.square()
    mean = total / N_CACHES
    variance = (squares / N_CACHES - mean.square()).clamp(min=0) * N_CACHES / (N_CACHES - 1)
    bias = (mean - dense).norm()
    expected = (variance.sum() / N_CACHES).sqrt()  # of the norm, if there is no bias
    return {
        "caches": N_CACHES,
        "positions": len(ids),
        "noise_of_one_cache_over_gradient": float(variance.sum().sqrt() / dense.norm()),
        "bias_over_gradient": float(bias / dense.norm()),
        "bias_over_its_standard_error": float(bias / expected),
    }


def train(teacher: str | None, cache: str | None, student: str, text: str) -> None:
    """Train a few steps, taking turns with another process."""
    from edgekd.distill.distill import distill
    from edgekd.distill.recipe import Job, Recipe

    recipe = Recipe(
        steps=N_STEPS,
        row_tokens=ROW_TOKENS,
        rows_per_step=4,
        compile="full",
        head_precision="auto",
        save_steps=10_000,
    )
    job = Job(teacher=teacher, cache=cache, student=student, data=[text], recipe=recipe)
    with tempfile.TemporaryDirectory() as folder:
        distill(job, Path(folder) / "out", callbacks=[turn_callback()])


def speed(teacher: str, cache: str, student: str, text: str) -> dict[str, Any]:
    """Return the ratio of online to cached step times, step by step."""
    common = [sys.executable, __file__, "--worker", "--student", student, "--text", text]
    commands = {
        "online": [*common, "--teacher", teacher],
        "cached": [*common, "--cache", cache],
    }
    steps = take_turns(commands, N_STEPS)
    # In the last step of one, the other is writing its student.
    pairs = list(zip(steps["online"], steps["cached"], strict=True))[N_WARM_UP:-1]
    ratios = [online["seconds"] / cached["seconds"] for online, cached in pairs]
    return {
        "cached_over_online_speed": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        "losses": {name: [step["loss"] for step in found] for name, found in steps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", action="store_true")
    for name in ("--teacher", "--cache", "--small-student"):
        parser.add_argument(name)
    parser.add_argument("--student", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    teacher, student, text = arguments.teacher, arguments.student, arguments.text
    if arguments.worker:
        train(teacher, arguments.cache, student, text)
        return
    from edgekd.distill.cache import inspect

    with tempfile.TemporaryDirectory() as folder:
        part, cache = Path(folder) / "part.txt", Path(folder) / "cache"
        part.write_text(Path(text).read_text("utf-8")[: N_STEPS * 4 * ROW_TOKENS * 6], "utf-8")
        command = [sys.executable, "-m", "edgekd", "cache", "--teacher", teacher]
        command += ["--data", str(part), "--out", str(cache), "--row-tokens", str(ROW_TOKENS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = inspect(cache)
        del report["path"]
        result = {
            "cache": report,
            "noise": noise(teacher, student, text),
            "student near the teacher": speed(teacher, str(cache), student, str(part)),
            "student of a third": speed(teacher, str(cache), arguments.small_student, str(part)),
        }
    record(result, arguments.out)


if __name__ == "__main__":
    main()
