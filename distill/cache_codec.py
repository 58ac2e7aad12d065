"""Distributions into records and back: exact where it matters, sampled where it doesn't.

The likeliest tokens are kept until they hold ``top_mass``, at most ``top_k`` of them. Of all
others up to ``tail_samples`` are drawn, so that every token of the vocabulary appears with the
right expected weight: the gradient of the forward KL from a record is unbiased, which top-k alone
is not. (RS-KD, arXiv 2503.16870, draws them all; the likeliest ones need no luck.)

Codes are rounded up or down at random so that the decoded probability is right on average. At
temperatures other than 1 the 8-bit codes of the tail leave a bias below a thousandth of its mass.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.distill.cache_format import Identity, Records

# P positions, V vocabulary, K kept tokens at most, M tail samples at most, E entries, T temps

_N_HEAD = 4  # likeliest tokens whose probability deserves 16 bits
_HEAD_STEP, _LOW_STEP, _TAIL_STEP = 20 / 65_535, 15.3 / 255, 25.5 / 255  # nats
_LOG_Z_STEP, _ENTROPY_STEP = 12.5 / 65_535, 12.5 / 255  # at most log V
_TAIL_MASS_PER_SAMPLE = 0.005  # less tail, fewer samples


class Sparse(NamedTuple):
    """Targets at one temperature; where a position has fewer entries, weights are 0."""

    ids_PE: NDArray[np.int64]
    weights_PE: NDArray[np.float32]
    """Estimates of the teacher's probabilities; they add up to 1 on average."""
    entropy_P: NDArray[np.float32]
    """Of the teacher, in nats."""
    rest_P: NDArray[np.float32]
    """Probability of all other tokens together, where none of them was sampled."""


def encode(logits_PV: torch.Tensor, identity: Identity, generator: torch.Generator) -> Records:
    """Return the records of P positions from the teacher's logits, float32, T = 1."""
    log_p_PV = logits_PV.float().log_softmax(-1)
    top_PK, ids_PK = log_p_PV.topk(min(identity.top_k, log_p_PV.shape[1]), dim=-1)
    mass_PK = top_PK.exp().double().cumsum(-1)
    is_kept_PK = (mass_PK - top_PK.exp()) < identity.top_mass  # so the first always is
    tail_PV = log_p_PV.exp()
    kept_PK = torch.where(is_kept_PK, 0.0, top_PK.exp())
    tail_PV.scatter_(1, ids_PK, kept_PK)
    tail_P = tail_PV.sum(-1, dtype=torch.float64)
    n_tail_P = (tail_P / _TAIL_MASS_PER_SAMPLE).ceil().clamp(0, identity.tail_samples).long()
    tail_ids_PM = _draw(tail_PV, identity.tail_samples, generator)
    is_drawn_PM = torch.arange(identity.tail_samples) < n_tail_P[:, None]
    tail_log_p_PM = log_p_PV.gather(1, tail_ids_PM)
    log_z_PT, entropy_PT = _temperatures(logits_PV.float(), identity.temperatures)
    return Records(
        n_top_P=is_kept_PK.sum(-1).numpy().astype(np.uint8),
        n_tail_P=n_tail_P.numpy().astype(np.uint8),
        top_ids_E=ids_PK[is_kept_PK].numpy().astype(np.uint32),
        **_top_codes(top_PK, is_kept_PK, generator),
        tail_ids_E=tail_ids_PM[is_drawn_PM].numpy().astype(np.uint32),
        tail_codes_E=_codes(tail_log_p_PM[is_drawn_PM], _TAIL_STEP, 255, generator).astype(
            np.uint8
        ),
        log_z_PT=(log_z_PT / _LOG_Z_STEP).round().clamp(0, 65_535).numpy().astype(np.uint16),
        entropy_PT=_entropy_codes(entropy_PT, generator),
    )


def encode_top(ids: list[list[int]], log_p: list[list[float]]) -> Records:
    """Return records that hold the likeliest tokens only, as an endpoint gives them, at T = 1.

    The mass of all others stays one number, so the gradient has a small bias.
    """
    generator = torch.Generator().manual_seed(0)
    counts_P = np.array([len(row) for row in ids])
    flat_E = np.array([value for row in log_p for value in row])
    top_PK = torch.from_numpy(_spread(flat_E, counts_P, 0.0))
    is_kept_PK = torch.arange(top_PK.shape[1]) < torch.from_numpy(counts_P)[:, None]
    entropy_PT = torch.tensor([[_entropy_with_rest(row)] for row in log_p])
    return Records(
        n_top_P=counts_P.astype(np.uint8),
        n_tail_P=np.zeros(len(ids), np.uint8),
        top_ids_E=np.array([token for row in ids for token in row], np.uint32),
        **_top_codes(top_PK, is_kept_PK, generator),
        tail_ids_E=np.zeros(0, np.uint32),
        tail_codes_E=np.zeros(0, np.uint8),
        log_z_PT=np.zeros((len(ids), 0), np.uint16),
        entropy_PT=_entropy_codes(entropy_PT, generator),
    )


def decode(records: Records, temperatures: tuple[float, ...], temperature: float) -> Sparse:
    """Return the targets of ``records`` at one of the cache's ``temperatures``."""
    index = temperatures.index(temperature)
    n_top_P, n_tail_P = records.n_top_P.astype(np.int64), records.n_tail_P.astype(np.int64)
    log_z_P = np.zeros(len(n_top_P))
    if temperature != 1:
        others = [t for t in temperatures if t != 1]
        log_z_P = _LOG_Z_STEP * records.log_z_PT[:, others.index(temperature)].astype(np.float64)
    top_PK = top_log_p(records)
    tail_PM = _spread(-_TAIL_STEP * records.tail_codes_E.astype(np.float64), n_tail_P, 0.0)
    is_drawn_PM = np.arange(tail_PM.shape[1]) < n_tail_P[:, None]
    tail_mass_P = np.clip(1 - np.exp(top_PK).sum(-1), 0, None)
    top_weights_PK = np.exp(top_PK / temperature - log_z_P[:, None])
    # Drawn with probability p_1 / tail mass each, so weighted by p_T over that.
    exponent_PM = (1 / temperature - 1) * tail_PM
    share_P1 = (tail_mass_P / np.maximum(n_tail_P, 1))[:, None]
    tail_weights_PM = np.where(is_drawn_PM, share_P1 * np.exp(exponent_PM - log_z_P[:, None]), 0.0)
    rest_P = np.where(n_tail_P > 0, 0.0, np.clip(1 - top_weights_PK.sum(-1), 0, None))
    top_ids_PK = np.zeros(top_PK.shape, np.int64)
    spread_PK = _spread(records.top_ids_E.astype(np.int64), n_top_P, 0)
    top_ids_PK[:, : spread_PK.shape[1]] = spread_PK
    tail_ids_PM = _spread(records.tail_ids_E.astype(np.int64), n_tail_P, 0)
    tail_weights_PM = _merge(tail_ids_PM, tail_weights_PM)
    return Sparse(
        np.concatenate([top_ids_PK, tail_ids_PM], 1),
        np.concatenate([top_weights_PK, tail_weights_PM], 1).astype(np.float32),
        (_ENTROPY_STEP * records.entropy_PT[:, index]).astype(np.float32),
        rest_P.astype(np.float32),
    )


def _merge(ids_PM: NDArray[np.int64], weights_PM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights with those of a token that was drawn several times at its first place."""
    is_same_PMM = ids_PM[:, :, None] == ids_PM[:, None, :]
    is_first_PM = ~np.tril(is_same_PMM, -1).any(-1)
    return np.where(is_first_PM, (is_same_PMM * weights_PM[:, None, :]).sum(-1), 0.0)


def top_log_p(records: Records) -> NDArray[np.float64]:
    """Return the log-probabilities of the kept tokens [P, K], -inf where there are fewer."""
    n_top_P = records.n_top_P.astype(np.int64)
    n_head_P = np.minimum(n_top_P, _N_HEAD)
    head_PK = np.full((len(n_top_P), _N_HEAD), -np.inf)
    spread = _spread(-_HEAD_STEP * records.head_codes_E.astype(np.float64), n_head_P, -np.inf)
    head_PK[:, : spread.shape[1]] = spread
    low = -_LOW_STEP * records.low_codes_E.astype(np.float64)
    return np.concatenate([head_PK, _spread(low, n_top_P - n_head_P, -np.inf)], 1)


def entropy_nats(records: Records) -> NDArray[np.float64]:
    """Return the teacher's entropy [P] at T = 1."""
    return _ENTROPY_STEP * records.entropy_PT[:, 0].astype(np.float64)


def _top_codes(
    top_PK: torch.Tensor, is_kept_PK: torch.Tensor, generator: torch.Generator
) -> dict[str, NDArray[Any]]:
    is_head_PK = is_kept_PK & (torch.arange(top_PK.shape[1]) < _N_HEAD)
    head_E, low_E = top_PK[is_head_PK], top_PK[is_kept_PK & ~is_head_PK]
    return {
        "head_codes_E": _codes(head_E, _HEAD_STEP, 65_535, generator).astype(np.uint16),
        "low_codes_E": _codes(low_E, _LOW_STEP, 255, generator).astype(np.uint8),
    }


def _entropy_codes(entropy_PT: torch.Tensor, generator: torch.Generator) -> NDArray[np.uint8]:
    """Return entropies in steps, rounded at random so that their mean is right."""
    steps_PT = entropy_PT.double() / _ENTROPY_STEP
    dither_PT = torch.rand(steps_PT.shape, dtype=torch.float64, generator=generator)
    return (steps_PT + dither_PT).floor().clamp(0, 255).numpy().astype(np.uint8)


def _entropy_with_rest(log_p: list[float]) -> float:
    """Return the entropy of a distribution whose unlisted tokens count as one."""
    p = np.exp(np.array(log_p, np.float64))
    rest = max(0.0, 1 - p.sum())
    return float(-(p * np.array(log_p)).sum() - (rest * np.log(rest) if rest > 0 else 0.0))


def _draw(tail_PV: torch.Tensor, n_samples: int, generator: torch.Generator) -> torch.Tensor:
    """Return ``n_samples`` ids [P, M], each drawn in proportion to ``tail_PV``."""
    if n_samples == 0:
        return torch.zeros(len(tail_PV), 0, dtype=torch.int64)
    is_empty_P1 = tail_PV.sum(-1, keepdim=True) == 0  # nothing will be drawn there
    return torch.multinomial(tail_PV + is_empty_P1, n_samples, True, generator=generator)


def _temperatures(
    logits_PV: torch.Tensor, temperatures: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log Z_T - log Z_1 / T [P, T but 1] and the entropy [P, T]."""
    # log Z = z - log p, at the likeliest token; torch.logsumexp is several times slower.
    largest_P1 = logits_PV.argmax(-1, keepdim=True)
    log_p_1_P1 = logits_PV.log_softmax(-1).gather(1, largest_P1)
    log_z, entropies = [], []
    for temperature in temperatures:
        log_p_PV = (logits_PV / temperature).log_softmax(-1)
        entropies.append(-(log_p_PV.exp() * log_p_PV).sum(-1))
        if temperature != 1:
            log_p_P1 = log_p_PV.gather(1, largest_P1)
            log_z.append((log_p_1_P1 / temperature - log_p_P1).squeeze(1))
    empty = torch.zeros(len(logits_PV), 0)
    return torch.stack(log_z, 1) if log_z else empty, torch.stack(entropies, 1)


def _codes(
    log_p_E: torch.Tensor, step_nats: float, largest: int, generator: torch.Generator
) -> NDArray[np.int64]:
    """Return -log p in steps, rounded at random so that p is right on average."""
    steps_E = (-log_p_E.double() / step_nats).clamp(0, largest)
    lower_E = steps_E.floor()  # the code of the larger probability
    # p lies between e^0 and e^-step of it: how far down decides how often the smaller one is taken.
    fraction_E = (1 - (-(steps_E - lower_E) * step_nats).exp()) / -np.expm1(-step_nats)
    up_E = torch.rand(fraction_E.shape, dtype=torch.float64, generator=generator) < fraction_E
    codes: NDArray[np.int64] = (lower_E + up_E).clamp(max=largest).long().numpy()
    return codes


def _spread(flat_E: NDArray[np.generic], counts_P: NDArray[np.int64], blank: float) -> NDArray:  # type: ignore[type-arg]
    """Return entries one row a position [P, most of any], filled up with ``blank``."""
    width = int(counts_P.max(initial=0))
    spread = np.full((len(counts_P), width), blank, flat_E.dtype)
    spread[np.arange(width) < counts_P[:, None]] = flat_E
    return spread
