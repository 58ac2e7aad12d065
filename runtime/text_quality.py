"""How well a model predicts a text, and how close it stays to a teacher while doing so.

Formulas and their sources: docs/eval.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import EngineError, ModelError
from edgekd.runtime.engine import Engine
from edgekd.runtime.estimate import Blocks, Estimate
from edgekd.runtime.fidelity import log_softmax, pick
from edgekd.runtime.reference import Compared, KlKind, Reference
from edgekd.runtime.windows import Windows, each_prediction

# S scored positions, V vocabulary

Floats = NDArray[np.float64]

DELTA_P_PERCENTS = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
"""Those of llama-perplexity; 0 is the minimum, 100 the maximum."""


class Scores(NamedTuple):
    """A model at every scored position."""

    window_S: NDArray[np.int64]
    """Number of the window that a position lies in."""
    log_p_S: Floats
    """What the model gave the token that came next."""
    compared: Compared | None
    """None without a teacher."""


@dataclass(frozen=True, kw_only=True)
class Fidelities:
    """How close a model stays to its teacher."""

    kl_nats: Estimate
    """Mean KL(teacher || model)."""
    kl_kind: KlKind
    top1_agreement: Estimate
    """Share of positions at which both find the same token likeliest."""
    perplexity_ratio: Estimate
    """The model's perplexity over the teacher's."""
    teacher_perplexity: Estimate
    delta_p_mean: Estimate
    """Mean change of the probability of the token that came next, model less teacher."""
    delta_p_rms: Estimate
    delta_p_percentiles: dict[str, Estimate] = field(default_factory=dict)
    """By percent, as in ``99.9``."""


@dataclass(frozen=True, kw_only=True)
class WindowMeans:
    """The means of each window, in their order: what a later comparison pairs."""

    n_positions: list[int]
    log_p_nats: list[float]
    """Of the log-probability of the token that came next."""
    kl_nats: list[float] | None
    """None without a teacher, as those below."""
    top1_agreement: list[float] | None
    delta_p: list[float] | None


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """How well a model does on a text."""

    perplexity: Estimate
    n_positions: int
    """Tokens that were predicted."""
    n_windows: int
    to_teacher: Fidelities | None
    by_window: WindowMeans


def score_text(
    engine: Engine,
    windows: Windows,
    reference: Reference | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Return what ``engine`` makes of ``windows``; ``advance`` hears how many positions are done.

    Raises:
        EngineError: a logit is no number.
        ModelError: the model has fewer ids than ``windows`` use.
    """
    if (largest := max(map(max, windows))) >= engine.vocab_size:
        raise ModelError(f"the model has {engine.vocab_size} ids, the text uses id {largest}")
    numbers, log_ps, compared, done = [], [], [], 0
    for number, ids, logits_SV in each_prediction(engine, windows):
        next_ids = np.asarray(ids, np.int64)
        log_p_SV = log_softmax(logits_SV)
        log_p_S = pick(log_p_SV, next_ids)
        if not np.isfinite(log_p_S).all():
            raise EngineError(
                f"{engine.name} gives logits that are no numbers; the model is broken"
            )
        numbers.append(np.full(len(ids), number))
        log_ps.append(log_p_S)
        if reference:
            compared.append(reference.compare(done, next_ids, log_p_SV))
        done += len(ids)
        advance(done)
    joined = Compared(*map(np.concatenate, zip(*compared, strict=True))) if compared else None
    return Scores(np.concatenate(numbers), np.concatenate(log_ps), joined)


def summarise(scores: Scores, kl_kind: KlKind = "exact") -> TextQuality:
    """Return the figures of ``scores`` with their standard errors."""
    blocks = Blocks(scores.window_S)
    return TextQuality(
        perplexity=blocks.mean(-scores.log_p_S, np.exp),
        n_positions=len(scores.log_p_S),
        n_windows=int(scores.window_S[-1]) + 1,
        to_teacher=_fidelities(blocks, scores.log_p_S, scores.compared, kl_kind)
        if scores.compared
        else None,
        by_window=_window_means(blocks, scores),
    )


def _window_means(blocks: Blocks, scores: Scores) -> WindowMeans:
    compared = scores.compared
    return WindowMeans(
        n_positions=blocks.sizes(),
        log_p_nats=blocks.block_means(scores.log_p_S),
        kl_nats=blocks.block_means(compared.kl_S) if compared else None,
        top1_agreement=blocks.block_means(compared.is_same_S.astype(np.float64))
        if compared
        else None,
        delta_p=blocks.block_means(_delta_p(scores.log_p_S, compared)) if compared else None,
    )


def _delta_p(log_p_S: Floats, compared: Compared) -> Floats:
    delta_p_S: Floats = np.exp(log_p_S) - np.exp(compared.teacher_log_p_S)
    return delta_p_S


def _fidelities(blocks: Blocks, log_p_S: Floats, compared: Compared, kl_kind: KlKind) -> Fidelities:
    teacher_log_p_S = compared.teacher_log_p_S
    delta_p_S = _delta_p(log_p_S, compared)
    percentiles = blocks.percentiles(delta_p_S, DELTA_P_PERCENTS)
    return Fidelities(
        kl_nats=blocks.mean(compared.kl_S),
        kl_kind=kl_kind,
        top1_agreement=blocks.mean(compared.is_same_S.astype(np.float64)),
        perplexity_ratio=blocks.mean(teacher_log_p_S - log_p_S, np.exp),
        teacher_perplexity=blocks.mean(-teacher_log_p_S, np.exp),
        delta_p_mean=blocks.mean(delta_p_S),
        delta_p_rms=blocks.mean(delta_p_S**2, np.sqrt),
        delta_p_percentiles={
            f"{percent:g}": found
            for percent, found in zip(DELTA_P_PERCENTS, percentiles, strict=True)
        },
    )
