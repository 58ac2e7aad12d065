"""Questions with given answers: a model chooses the one it finds likeliest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from edgekd.runtime.fidelity import log_softmax
from edgekd.runtime.loading import LoadedModel


@dataclass(frozen=True)
class Question:
    """A beginning and several continuations, one of which is right."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right one."""


def accuracy(loaded: LoadedModel, questions: Sequence[Question]) -> float:
    """Return the share of ``questions`` whose right choice ``loaded`` finds likeliest."""
    right = sum(choose(loaded, question) == question.answer for question in questions)
    return right / len(questions)


def choose(loaded: LoadedModel, question: Question) -> int:
    """Return the index of the choice with the highest mean log-probability per token."""
    encode, engine = loaded.tokenizer.encode, loaded.engine
    # Encoded together: a token may reach across the end of the context.
    texts = [encode(question.context + choice) for choice in question.choices]
    shared = os.path.commonprefix([encode(question.context), *texts])
    engine.rewind()
    before_1V = log_softmax(engine.forward(shared)[None])
    scores = []
    for ids in texts:
        choice = ids[len(shared) :]
        engine.rewind(len(shared))
        after_TV = log_softmax(engine.forward(choice, every_logit=True))
        rest = sum(float(after_TV[i, token]) for i, token in enumerate(choice[1:]))
        scores.append((float(before_1V[0, choice[0]]) + rest) / len(choice))
    return max(range(len(scores)), key=scores.__getitem__)
