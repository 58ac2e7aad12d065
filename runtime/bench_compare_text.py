"""A comparison of two measurements as text for people."""

from pathlib import PurePath

from edgekd.runtime.bench_compare import Compared, Comparison
from edgekd.runtime.compare_quality import QUALITY_NAMES, QualityCompared

_SHAPES = {
    "kl_nats": (1, ".5f", " nats"),
    "top1_agreement": (100, ".2f", " points"),
    "delta_p": (100, ".3f", " points"),
    "perplexity": (1, ".2%", ""),
}
"""Factor, digits and unit; a point is one of a hundred."""


def to_text(comparison: Comparison) -> str:
    """Return a line for each scenario and figure of quality, what else differs, the verdict."""
    lines = [_line(entry) for entry in comparison.compared]
    lines += [_quality_line(entry) for entry in comparison.quality]
    lines += comparison.quality_notes
    lines += [f"differs: {line}" for line in comparison.differences]
    lines += [f"INVALID: {reason}" for reason in comparison.invalid_reasons]
    speed = f"{comparison.verdict} (limit {comparison.max_regress:.1%}){_advice(comparison)}"
    return "\n".join([*lines, speed + _worse(comparison)])


def short_verdict(comparison: Comparison) -> str:
    """Return the verdict on speed, and what of quality got worse."""
    return comparison.verdict + _worse(comparison)


def _worse(comparison: Comparison) -> str:
    worse = comparison.worse_quality
    return f"; WORSE quality: {', '.join(worse)}" if worse else ""


def _line(entry: Compared) -> str:
    names = _names(entry.base, entry.new)
    ratio = entry.speed_ratio
    if ratio is None:
        return f"{entry.scenario:>15}  {names}: too few repetitions; {entry.verdict}"
    kind = f"{ratio.n} pairs" if ratio.paired else f"{ratio.n} samples, two runs"
    return (
        f"{entry.scenario:>15}  {names}: speed {ratio.value - 1:+.2%} "
        f"[{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}] ({kind}); {entry.verdict}"
    )


def _quality_line(entry: QualityCompared) -> str:
    factor, shape, unit = _SHAPES[entry.figure]
    spread = "unknown error: a single window"
    if entry.standard_error is not None and entry.low is not None and entry.high is not None:
        error, low, high = (x * factor for x in (entry.standard_error, entry.low, entry.high))
        spread = f"\u00b1 {error:{shape}} [{low:+{shape}}, {high:+{shape}}]"
    verdict = entry.verdict.upper() if entry.verdict == "worse" else entry.verdict
    return (
        f"{QUALITY_NAMES[entry.figure]:>15}  {_names(entry.base, entry.new)}: "
        f"{entry.difference * factor:+{shape}}{unit} {spread} "
        f"({entry.n_windows} windows); {verdict}"
    )


def _names(base: str, new: str) -> str:
    one, other = PurePath(base).name, PurePath(new).name
    return one if one == other else f"{one} -> {other}"


def _advice(comparison: Comparison) -> str:
    if comparison.verdict != "inconclusive":
        return ""
    if comparison.invalid_reasons:
        return "; measure again on a quiet machine"
    return "; measure both in one run, with a larger -r"
