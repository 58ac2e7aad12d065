r"""Multiple-choice questions from a JSONL file, with or without worked examples in front.

Each line is an object with ``choices`` (a list of texts), ``answer`` (the index of the right one,
from 0) and either

* ``question``: asked as lm-evaluation-harness asks ARC, "Question: ...\nAnswer:", a blank in
  front of each choice; or
* ``context``: taken as it is, and so are the choices; any other template can be written so.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.errors import DataError, RecipeError
from edgekd.runtime.choices import Question

_BETWEEN_EXAMPLES = "\n\n"


def read_questions(path: Path) -> list[Question]:
    """Return the questions in the file at ``path``.

    Raises:
        DataError: it is missing, empty or malformed; the line is named.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read questions from {path}: {error}") from error
    found = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path} has no questions; one JSON object a line is needed")
    return found


def with_shots(
    questions: Sequence[Question],
    n_shots: int,
    pool: Sequence[Question] | None = None,
    seed: int = 0,
) -> list[Question]:
    """Return ``questions`` with ``n_shots`` answered ones in front of each, the same for all.

    They are drawn from ``pool`` by ``seed``; without one they are the first of ``questions``,
    which are then not asked.

    Raises:
        RecipeError: there are not enough.
    """
    source = list(pool if pool is not None else questions[:-1])
    if n_shots > len(source):
        raise RecipeError(f"--shots {n_shots} needs as many examples, there are {len(source)}")
    if pool is None:
        shots, asked = source[:n_shots], questions[n_shots:]
    else:
        shots, asked = random.Random(seed).sample(source, n_shots), questions
    examples = [shot.context + shot.choices[shot.answer] + _BETWEEN_EXAMPLES for shot in shots]
    return [replace(one, context="".join(examples) + one.context) for one in asked]


def _parse(line: str, where: str) -> Question:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds a {type(found).__name__}, a JSON object is needed")
    choices, right = _choices(found, where)
    text = found.get("question")
    if isinstance(text, str):
        return Question(f"Question: {text}\nAnswer:", tuple(f" {one}" for one in choices), right)
    if isinstance(found.get("context"), str):
        return Question(found["context"], tuple(choices), right)
    raise DataError(f'{where} needs a "question" or a "context", a text')


def _choices(found: dict[str, Any], where: str) -> tuple[list[str], int]:
    choices, right = found.get("choices"), found.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(one, str) and one.strip() for one in choices)
    ):
        raise DataError(f'{where} needs "choices", a list of two texts or more')
    if type(right) is not int or not 0 <= right < len(choices):
        raise DataError(
            f'{where} gives {right!r} as its "answer", an index from 0 to {len(choices) - 1} is '
            "needed"
        )
    return choices, right
