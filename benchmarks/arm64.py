"""Does an int4 ONNX folder made on this machine say the same on arm64?

    python scripts/arm64_python.py FOLDER
    python benchmarks/arm64.py FOLDER/python --out benchmarks/results/arm64.json

A tiny model is made here, learns four sentences by heart, and is exported. This Python and an arm64
one in an emulator run ``edgekd bench`` and ``edgekd eval`` on its int4 ONNX folder and continue
the same prompts greedily. Exits with 1 unless the tokens are equal, the distributions are near, and
the bench on arm64 calls its own times void: those of an emulator are no device's, and none is kept.
The kernels of the two processors round differently (accuracy level 4), so logits are near and not
equal: a model that has learnt nothing and draws among ties would continue differently.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import record

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("The quick brown fox", "def add(a, b):", "Grüße aus", "A distribution is")
N_GREEDY = 12  # within what it has learnt
N_STEPS, LEARNING_RATE = 200, 3e-3
# Nats per token, as of a verified export: between the processors, and between their KLs to the
# teacher.
MAX_KL = 0.02
GREEDY = """
import json, sys
from edgekd.runtime.loading import opened_model
model, n_tokens, *prompts = sys.argv[1:]
found = []
with opened_model(model, context_tokens=256, n_threads=1) as loaded:
    for prompt in prompts:
        ids, new = loaded.tokenizer.encode(prompt), []
        loaded.engine.rewind()
        while len(new) < int(n_tokens):
            new.append(int(loaded.engine.forward(new[-1:] or ids).argmax()))
        found.append(new)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Side:
    """What one Python said of the model."""

    machine: dict[str, Any]
    tools: dict[str, str]
    prompt_ids_sha256: str
    bench_valid: bool
    bench_invalid_reasons: list[str]
    kl_to_teacher_nats: float
    kl_from_this_machine_nats: float
    top1_with_this_machine: float
    greedy_ids: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="An arm64 Python with edgekd and ONNX Runtime.")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        model, packs = prepare(Path(folder), arguments.tokens)
        here = look(sys.executable, model, packs)
        there = look(arguments.python, model, packs)
    faults = differences(here, there)
    result = {
        "emulator": version_of_emulator(arguments.python),
        "max_kl_nats": MAX_KL,
        "scored_tokens": arguments.tokens,
        "greedy_tokens": N_GREEDY * len(PROMPTS),
        "here": asdict(here),
        "arm64": asdict(there),
        "faults": faults,
    }
    record(result, arguments.out)
    if faults:
        sys.exit("; ".join(faults))


def prepare(folder: Path, n_tokens: int) -> tuple[Path, dict[str, Path]]:
    """Return a tiny int4 ONNX folder, and packs of its teacher and of itself as it runs here."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import TEXTS, save_tiny_model

    teacher, model = save_tiny_model(folder / "tiny"), folder / "tiny-onnx"
    learn(teacher, TEXTS)
    text = folder / "text.txt"
    text.write_text("\n".join(TEXTS * 8), "utf-8")
    edgekd(sys.executable, "export", teacher, "--format", "onnx", "--quant", "q4_0", "--out", model)
    packs = {"teacher": folder / "teacher.pack", "here": folder / "here.pack"}
    # All tokens: the rest of a pack is known as a sum only.
    every = ["--text", text, "--tokens", n_tokens, "--window", 128, "--top-k", 400]
    for source, pack in zip((teacher, model), packs.values(), strict=True):
        edgekd(sys.executable, "eval", "--teacher", source, *every, "--write-reference", pack)
    return model, packs


def learn(folder: Path, texts: Sequence[str]) -> None:
    """Train the checkpoint in ``folder`` on ``texts`` until it knows them."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for step in range(N_STEPS):
        row = rows[step % len(rows)]
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def look(python: str, model: Path, packs: dict[str, Path]) -> Side:
    """Return what edgekd in ``python`` says of ``model``; of its times only whether they count."""
    # Without the probes of the machine: in an emulator they take minutes and say nothing.
    short = ["-p", 32, "-n", 16, "-r", 2, "-t", 1, "--no-roofline", "--no-cold"]
    bench = edgekd(python, "bench", model, *short)
    quality = {
        name: edgekd(python, "eval", model, "--reference", pack, "--threads", 1)["models"][0]
        for name, pack in packs.items()
    }
    (measured,) = bench["results"]
    to_here = quality["here"]["text"]["to_teacher"]
    greedy = [python, "-c", GREEDY, str(model), str(N_GREEDY), *PROMPTS]
    return Side(
        machine=bench["machine"],
        tools=bench["tools"],
        prompt_ids_sha256=measured["prompt_ids_sha256"],
        bench_valid=measured["valid"],
        bench_invalid_reasons=measured["invalid_reasons"],
        kl_to_teacher_nats=quality["teacher"]["text"]["to_teacher"]["kl_nats"]["value"],
        kl_from_this_machine_nats=to_here["kl_nats"]["value"],
        top1_with_this_machine=to_here["top1_agreement"]["value"],
        greedy_ids=json.loads(last_line(greedy)),
    )


def differences(here: Side, there: Side) -> list[str]:
    """Return what is not as it must be."""
    kl_nats = there.kl_from_this_machine_nats
    change = abs(there.kl_to_teacher_nats - here.kl_to_teacher_nats)
    checks = {
        f"not arm64: {there.machine['architecture']}": there.machine["architecture"] == "aarch64",
        "other prompt ids": here.prompt_ids_sha256 == there.prompt_ids_sha256,
        "other greedy tokens": here.greedy_ids == there.greedy_ids,
        f"KL from this machine is {kl_nats:.4f} nat": kl_nats <= MAX_KL,
        f"KL to the teacher differs by {change:.4f} nat": change <= MAX_KL,
    }
    if there.machine["emulated_on"]:
        is_void = any("emulated" in reason for reason in there.bench_invalid_reasons)
        checks["times of an emulator pass for valid"] = is_void and not there.bench_valid
    return [fault for fault, is_fine in checks.items() if not is_fine]


def edgekd(python: str, *words: object) -> dict[str, Any]:
    """Return what a command of edgekd answers as JSON."""
    command = [python, "-m", "edgekd", *map(str, words), "--quiet", "--json"]
    return dict(json.loads(last_line(command)))


def last_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1]


def version_of_emulator(python: str) -> str | None:
    """Return the version of the qemu that the launcher ``python`` starts; None of a real one."""
    script = Path(python).read_bytes()
    start = script.partition(b"\nexec ")[2].partition(b" -cpu")[0].decode(errors="replace")
    if not script.startswith(b"#!") or not start:
        return None
    return subprocess.check_output([*start.split(), "--version"], text=True).splitlines()[0]


if __name__ == "__main__":
    main()
