"""The demo's text and questions, from the documentation of the Python that runs it."""

import ast
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from edgekd.files import write_text_atomic
from edgekd.runtime.choices import Question

_HELD_OUT_SHARE = 12  # one document in so many
_MIN_CHARS = 400
_CONTEXT_WORDS, _CHOICE_WORDS, _N_CHOICES = 40, 16, 4
_SEPARATOR = "\n\n\n"


def write_corpus(out: Path) -> tuple[Path, Path]:
    """Write the demo's training and held-out text into ``out`` and return both paths.

    A document is held out by a hash of its text, so the split is the same in every run.
    """
    by_digest = {hashlib.sha256(text.encode()).digest(): text for text in _documents()}
    paths = out / "text-train.txt", out / "text-held-out.txt"
    for path, is_held_out in zip(paths, (False, True), strict=True):
        chosen = [  # in the order of their hashes, which is as good as shuffled
            by_digest[digest]
            for digest in sorted(by_digest)
            if (digest[-1] % _HELD_OUT_SHARE == 0) is is_held_out
        ]
        write_text_atomic(path, _SEPARATOR.join(chosen) + "\n")
    return paths


def make_questions(text: str, n_questions: int) -> list[Question]:
    """Return questions about ``text``: which of four passages of a document comes next?

    All four come from the same document, so that its subject gives nothing away.
    """
    questions: list[Question] = []
    for document in text.split(_SEPARATOR):
        words = document.split()
        passages = _passages(words)
        if len(passages) == _N_CHOICES:
            answer = len(questions) % _N_CHOICES
            choices = passages[1:]
            choices.insert(answer, passages[0])
            context = " ".join(words[:_CONTEXT_WORDS])
            questions.append(Question(context, tuple(choices), answer))
    return questions[:n_questions]


def _passages(words: Sequence[str]) -> list[str]:
    """Return the passage after the context, and others from further on."""
    starts = range(_CONTEXT_WORDS, len(words) - _CHOICE_WORDS + 1, _CHOICE_WORDS)
    step = max(1, (len(starts) - 1) // (_N_CHOICES - 1))
    return [
        " " + " ".join(words[start : start + _CHOICE_WORDS])
        for start in starts[::step][:_N_CHOICES]
    ]


def _documents() -> list[str]:
    """Return the language reference's topics and the standard library's docstrings."""
    from pydoc_data.topics import topics

    found = [_tidy(text) for text in topics.values()]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8", "replace"))
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, owners) and (text := ast.get_docstring(node)):
                found.append(_tidy(text))
    return [text for text in found if len(text) >= _MIN_CHARS]


def _tidy(text: str) -> str:
    """Return ``text`` without the blank lines that would part it into documents."""
    while _SEPARATOR in text:
        text = text.replace(_SEPARATOR, "\n\n")
    return text.strip()
