"""Questions with given answers: a model chooses the one it finds likeliest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from edgekd.runtime.continuations import Scored, Scorer, encode_pair
from edgekd.runtime.estimate import Estimate, share
from edgekd.runtime.loading import LoadedModel

Norm = Literal["none", "chars", "bytes", "tokens"]
"""What a choice's log-probability is divided by before choices are compared."""


@dataclass(frozen=True)
class Question:
    """A beginning and several continuations, one of which is right."""

    context: str
    choices: tuple[str, ...]
    """With the blank in front, where there is one."""
    answer: int
    """Index of the right one."""


@dataclass(frozen=True)
class Answered:
    """What a model makes of one question."""

    question: Question
    scored: tuple[Scored, ...]

    def chosen(self, norm: Norm) -> int:
        """Return the index of the likeliest choice by ``norm``, the first of equals."""
        return int(np.argmax([self._score(i, norm) for i in range(len(self.scored))]))

    def _score(self, index: int, norm: Norm) -> float:
        # The blank between question and answer belongs to no answer.
        text, scored = self.question.choices[index].lstrip(), self.scored[index]
        lengths = {
            "none": 1,
            "chars": len(text),
            "bytes": len(text.encode()),
            "tokens": scored.n_tokens,
        }
        return scored.log_p / max(1, lengths[norm])


@dataclass(frozen=True, kw_only=True)
class ChoiceQuality:
    """Shares of questions answered right, by what the log-probabilities are divided by."""

    acc: Estimate
    """Not divided."""
    acc_norm: Estimate
    """By the characters of a choice, lm-evaluation-harness's acc_norm."""
    acc_bytes: Estimate
    """By its UTF-8 bytes."""
    acc_tokens: Estimate
    n_questions: int


def answer(
    loaded: LoadedModel,
    questions: Sequence[Question],
    advance: Callable[[int], None] = lambda done: None,
) -> list[Answered]:
    """Return what ``loaded`` makes of each question; ``advance`` hears how many are done.

    Raises:
        DataError: a choice has no token of its own.
        EngineError: the engine fails.
    """
    scorer = Scorer(loaded.engine)
    answered = []
    for question in questions:
        pairs = [encode_pair(loaded.tokenizer, question.context, text) for text in question.choices]
        context = pairs[0][0]
        scored = scorer.score(context, [ids for _, ids in pairs])
        answered.append(Answered(question, tuple(scored)))
        advance(len(answered))
    return answered


def grade(answered: Sequence[Answered]) -> ChoiceQuality:
    """Return the shares of right choices with their standard errors."""
    right = {
        norm: sum(one.chosen(norm) == one.question.answer for one in answered)
        for norm in get_args(Norm)
    }
    shares = {norm: share(count, len(answered)) for norm, count in right.items()}
    return ChoiceQuality(
        acc=shares["none"],
        acc_norm=shares["chars"],
        acc_bytes=shares["bytes"],
        acc_tokens=shares["tokens"],
        n_questions=len(answered),
    )
