"""A comparison of two measurements as text for people."""

from pathlib import PurePath

from edgekd.runtime.bench_compare import Compared, Comparison


def to_text(comparison: Comparison) -> str:
    """Return one line for each scenario, what else differs, and the verdict."""
    lines = [_line(entry) for entry in comparison.compared]
    lines += [f"differs: {line}" for line in comparison.differences]
    lines += [f"INVALID: {reason}" for reason in comparison.invalid_reasons]
    lines.append(f"{comparison.verdict} (limit {comparison.max_regress:.1%}){_advice(comparison)}")
    return "\n".join(lines)


def _line(entry: Compared) -> str:
    base, new = PurePath(entry.base).name, PurePath(entry.new).name
    names = base if base == new else f"{base} -> {new}"
    ratio = entry.speed_ratio
    if ratio is None:
        return f"{entry.scenario:>14}  {names}: too few repetitions; {entry.verdict}"
    kind = f"{ratio.n} pairs" if ratio.paired else f"{ratio.n} samples, two runs"
    return (
        f"{entry.scenario:>14}  {names}: speed {ratio.value - 1:+.2%} "
        f"[{ratio.low - 1:+.2%}, {ratio.high - 1:+.2%}] ({kind}); {entry.verdict}"
    )


def _advice(comparison: Comparison) -> str:
    if comparison.verdict != "inconclusive":
        return ""
    if comparison.invalid_reasons:
        return "; measure again on a quiet machine"
    return "; measure both in one run, with a larger -r"
