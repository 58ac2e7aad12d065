"""Is NEW as good as BASE? Differences of quality on the same text, paired window by window.

Both predicted the same tokens, so what makes a window hard is in both, and their difference is
known better than either figure. Its standard error is that of edgekd eval, a bootstrap over
windows, and its 95 % interval Student's t with as many degrees of freedom as there are windows
less one: a handful of them is what a device has time for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import DataError
from edgekd.runtime.stats import t_quantile

if TYPE_CHECKING:
    from edgekd.runtime.estimate import Blocks, Estimate

QualityVerdict = Literal["worse", "better", "no difference found", "unknown"]
QUALITY_NAMES = {
    "kl_nats": "KL to teacher",
    "top1_agreement": "top-1 agreement",
    "delta_p": "mean \u0394p",
    "perplexity": "perplexity",
}
_MORE_IS_BETTER = {"top1_agreement", "delta_p"}
_MAX_POSITIONS = 10_000_000  # of a file that nobody vouches for
_MAX_WINDOWS = 100_000


@dataclass(frozen=True, kw_only=True)
class QualityCompared:
    """One figure of two models."""

    base: str
    new: str
    figure: str
    """Of ``QUALITY_NAMES``."""
    difference: float
    """NEW less BASE; of perplexity the relative change."""
    standard_error: float | None
    """None where there is a single window."""
    low: float | None
    high: float | None
    """The 95 % interval."""
    n_windows: int
    verdict: QualityVerdict
    """Worse or better where the whole interval is."""


@dataclass(frozen=True)
class MeasuredQuality:
    """``quality`` of docs/schemas/bench-1.json, and what it belongs to."""

    model: str
    windows_sha256: str
    by_window: Mapping[str, Any]
    reference: tuple[Any, ...] | None
    """What must be equal for KLs to be comparable; None without teacher and pack."""


def read_quality(document: Mapping[str, Any], result: Mapping[str, Any]) -> MeasuredQuality | None:
    """Return the quality in one ``result`` of ``document``, if it was measured.

    Raises:
        KeyError: a part of it is missing.
    """
    if not (quality := result.get("quality")):
        return None
    described, reference = document["quality_reference"], None
    if described:
        # Two packs of one text and one teacher bound the KL alike if they keep as many tokens.
        reference = (
            ("pack", described["teacher_sha256"], described["top_k"])
            if "pack" in described
            else ("teacher", described["weights_sha256"])
        )
    sha256, by_window = quality["windows_sha256"], quality["by_window"]
    return MeasuredQuality(result["model"], sha256, by_window, reference)


def compare_quality(
    base: MeasuredQuality | None, new: MeasuredQuality | None
) -> list[QualityCompared]:
    """Return how the figures that both have differ; of other texts none can be compared.

    Raises:
        DataError: the windows of one are cut short or changed.
    """
    if base is None or new is None or base.windows_sha256 != new.windows_sha256:
        return []
    try:
        return _compare(base, new)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"the quality of {base.model} or {new.model} is cut short or changed: {error!r}; "
            "measure it again"
        ) from error


def quality_notes(base: MeasuredQuality | None, new: MeasuredQuality | None) -> list[str]:
    """Return why quality was not compared, where one side has it at least."""
    if base is None or new is None:
        known = base or new
        return [f"quality not compared: only that of {known.model} was measured"] if known else []
    if base.windows_sha256 != new.windows_sha256:
        return ["quality not compared: measured on other tokens; use the same text or pack"]
    if base.reference != new.reference:
        return ["KL, top-1 and \u0394p not compared: measured with other teachers or packs"]
    return []


def _compare(base: MeasuredQuality, new: MeasuredQuality) -> list[QualityCompared]:
    names, before, after = (base.model, new.model), base.by_window, new.by_window
    from edgekd.runtime.estimate import blocks_of_sizes

    blocks = blocks_of_sizes(_sizes(before, after))
    found = [_perplexity(blocks, before["log_p_nats"], after["log_p_nats"], names)]
    if base.reference is None or base.reference != new.reference:
        return found
    for figure in ("kl_nats", "top1_agreement", "delta_p"):
        difference = _mean_difference(blocks, before[figure], after[figure])
        found.append(_judged(figure, difference, len(blocks.sizes()), names))
    return found


def _sizes(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[int]:
    sizes: list[int] = base["n_positions"]
    if sizes != new["n_positions"]:
        raise ValueError("its windows have other lengths")
    if not 1 <= len(sizes) <= _MAX_WINDOWS or not min(sizes) >= 1 or sum(sizes) > _MAX_POSITIONS:
        raise ValueError(f"{len(sizes)} windows with {sum(sizes)} tokens")
    return sizes


def _mean_difference(blocks: "Blocks", base: Sequence[float], new: Sequence[float]) -> "Estimate":
    """Return the mean over all tokens of NEW less BASE."""
    pairs = zip(blocks.sizes(), base, new, strict=True)
    return blocks.of_block_means([after - before for _, before, after in pairs])


def _perplexity(
    blocks: "Blocks", base: Sequence[float], new: Sequence[float], names: tuple[str, str]
) -> QualityCompared:
    """Return the relative change; its interval is taken on the logarithm."""
    log_ratio = _mean_difference(blocks, new, base)  # less likely is more perplexed
    judged = _judged("perplexity", log_ratio, len(blocks.sizes()), names)
    error = log_ratio.standard_error
    return replace(
        judged,
        difference=math.expm1(log_ratio.value),
        standard_error=None if error is None else error * math.exp(log_ratio.value),
        low=None if judged.low is None else math.expm1(judged.low),
        high=None if judged.high is None else math.expm1(judged.high),
    )


def _judged(
    figure: str, difference: "Estimate", n_windows: int, names: tuple[str, str]
) -> QualityCompared:
    value, error = difference.value, difference.standard_error
    half = None if error is None else t_quantile(n_windows - 1) * error
    low, high = (None, None) if half is None else (value - half, value + half)
    return QualityCompared(
        base=names[0],
        new=names[1],
        figure=figure,
        difference=value,
        standard_error=error,
        low=low,
        high=high,
        n_windows=n_windows,
        verdict=judge_difference(low, high, more_is_better=figure in _MORE_IS_BETTER),
    )


def judge_difference(
    low: float | None, high: float | None, *, more_is_better: bool
) -> QualityVerdict:
    """Return what an interval of NEW less BASE says."""
    if low is None or high is None:
        return "unknown"
    if low > 0:
        return "better" if more_is_better else "worse"
    if high < 0:
        return "worse" if more_is_better else "better"
    return "no difference found"
