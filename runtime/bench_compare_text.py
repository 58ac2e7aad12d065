"""A comparison of two measurements as text for people."""

from pathlib import PurePath

from edgekd.runtime.bench_compare import Compared, Comparison
from edgekd.runtime.compare_quality import QUALITY_NAMES, QualityCompared


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
        return f"{entry.scenario:>14}  {names}: too few repetitions; {entry.verdict}"
    kind = f"{ratio.n} pairs" if ratio.paired else f"{ratio.n} samples, two runs"
    return (
        f"{entry.scenario:>14}  {names}: speed {ratio.value - 1:+.2%} "
        f"[{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}] ({kind}); {entry.verdict}"
    )


def _quality_line(entry: QualityCompared) -> str:
    name, shape = QUALITY_NAMES[entry.figure], "+.2%"
    unit = ""
    if entry.figure == "kl_nats":
        shape, unit = "+.5f", " nats"
    spread = "unknown error: a single window"
    if entry.standard_error is not None and entry.low is not None and entry.high is not None:
        spread = (
            f"\u00b1 {format(entry.standard_error, shape[1:])} "
            f"[{format(entry.low, shape)}, {format(entry.high, shape)}]"
        )
    verdict = entry.verdict.upper() if entry.verdict == "worse" else entry.verdict
    return (
        f"{name:>15}  {_names(entry.base, entry.new)}: {format(entry.difference, shape)}{unit} "
        f"{spread} ({entry.n_windows} windows); {verdict}"
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
