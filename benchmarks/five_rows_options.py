"""What benchmarks/five_rows.py is asked for, and what must not change when it goes on."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.export.checkpoint import open_checkpoint
from edgekd.files import sha256_of


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Return everything that a figure depends on, files by their hashes."""
    plain = {
        name: value
        for name, value in vars(asked).items()
        if name not in ("work", "out", "teacher", "student", "text", "held_out", "questions")
    }
    questions = {
        name: [word if word.startswith("--") or word.isdigit() else _hashed(word) for word in words]
        for name, words in asked.questions
    }
    files = {
        "teacher_sha256": open_checkpoint(asked.teacher).weights_sha256(),
        "student_sha256": open_checkpoint(asked.student).weights_sha256()
        if asked.student
        else None,
        "text_sha256": [_hashed(text) for text in asked.text],
        "held_out_sha256": _hashed(asked.held_out),
    }
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    return plain | files | {"questions": questions, "n_processes": n_processes}


def _hashed(path: Path | str) -> str:
    return f"{Path(path).name} {sha256_of(Path(path))}"


def question_options(text: str) -> tuple[str, list[str]]:
    """Return the name in NAME=FILE[:SHOTS[:FILE OF SHOTS]] and eval's options for the rest."""
    name, found, rest = text.partition("=")
    file, *shots = rest.split(":")
    if not (name.isidentifier() and found and file) or len(shots) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE[:SHOTS[:FILE OF SHOTS]]")
    options = ["--questions", file]
    for option, value in zip(("--shots", "--shots-from"), shots, strict=False):
        options += [option, value]
    return name, options


def parse_arguments(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint")
    parser.add_argument(
        "--student", type=Path, help="pruned checkpoint; default: prune the teacher"
    )
    parser.add_argument("--params", default="100M", help="most parameters of the student")
    parser.add_argument("--text", type=Path, action="append", required=True, help="to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure on")
    parser.add_argument(
        "--questions",
        type=question_options,
        action="append",
        default=[],
        metavar="NAME=FILE[:SHOTS[:FILE OF SHOTS]]",
    )
    parser.add_argument("--limit", type=int, help="questions of each file")
    parser.add_argument("--work", type=Path, required=True, help="folder to work in, or go on in")
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--tokens", help="train each row on so many, such as 50M, not by --minutes")
    parser.add_argument("--grid-share", type=float, default=0.25, help="of tokens: the second part")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--rows-per-step", type=int, default=2)
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--extra", default="", help="options for every edgekd distill, in quotes")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512)
    parser.add_argument("-n", "--decode-tokens", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)
