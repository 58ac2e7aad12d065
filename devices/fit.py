"""Does a model fit a device, how fast will it be, and what would meet a wish.

A prediction says what it rests on: measurements of the user, published ones of that device and
backend, or the bandwidth alone. What cannot be told is None with a reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgekd.devices.measured import Group, OwnRun
from edgekd.devices.predict import (
    Calibration,
    Point,
    calibrate_with_spread,
    from_bandwidth,
)
from edgekd.devices.spec import Kind, Spec
from edgekd.devices.workload import QUANT_BITS, Workload

Basis = Literal["own measurements", "published measurements", "bandwidth alone"]

# Memory that system and other programs keep, by kind of device: assumed, not measured.
_RESERVED_BYTES: dict[Kind, int] = {
    "board": 1_500_000_000,
    "phone": 4_000_000_000,
    "laptop": 3_000_000_000,
    "computer": 3_000_000_000,
}
# Neither was tested by leaving runs out, hence wide.
_PREFILL_FACTOR = 1.5
_LOAD_FACTOR = 2.0
_LEAST_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Range:
    """A predicted value and the interval it should lie in; or why there is none."""

    value: float | None
    low: float | None
    high: float | None
    unit: str
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Speed of one backend in one power mode."""

    backend: str
    power_mode: str
    basis: Basis
    n_points: int
    decode: Range
    prefill: Range
    load: Range
    source: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device a model is to fit."""

    name: str
    memory_bytes: float | None
    """What the model may take."""
    memory_note: str
    bandwidth_bytes_per_s: float | None
    bandwidth_share: float | None
    """Of it that an engine may reach; None for what is typical of a published peak."""
    bandwidth_source: str
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Option:
    """Another form of the model, and whether it meets what was wished."""

    quant: str
    n_weights: int
    memory_bytes: int
    decode_tokens_per_s: float | None
    meets: bool


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for."""

    context_tokens: int
    tokens_per_s: float | None = None
    memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """The answer for one model on one device."""

    model: str
    format: str
    device: str
    context_tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    needed_bytes: int
    available_bytes: float | None
    available_note: str
    fits: bool | None
    predictions: tuple[Prediction, ...]
    options: tuple[Option, ...]
    largest_student: Option | None
    """The most layers of this model that would meet the wish at Q4_0."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def target_of(spec: Spec, groups: Sequence[Group]) -> Target:
    """Return the device that ``spec`` describes, with its largest memory."""
    memory = spec.value("memory_bytes")
    reserved = _RESERVED_BYTES[spec.kind]
    note = f"{reserved / 1e9:g} GB of {spec.kind}s are assumed to be taken by the system"
    if memory is None:
        note = spec.absent["memory_bytes"]
    elif len(spec.facts["memory_bytes"].values) > 1:
        note += "; the largest size it is sold with"
    return Target(
        name=spec.name,
        memory_bytes=None if memory is None else memory - reserved,
        memory_note=note,
        bandwidth_bytes_per_s=spec.value("bandwidth_bytes_per_s"),
        bandwidth_share=None,
        bandwidth_source=spec.absent.get("bandwidth_bytes_per_s", "published peak"),
        groups=tuple(groups),
    )


def fit(
    workload: Workload,
    target: Target,
    wish: Wish,
    own: Sequence[tuple[OwnRun, Workload]] = (),
) -> FitReport:
    """Return whether and how fast ``workload`` runs on ``target``.

    ``own`` are measurements on that very device, each with the model it was taken on.
    """
    predictions = tuple(_predictions(workload, target, wish, own))
    limit = wish.memory_bytes if wish.memory_bytes is not None else target.memory_bytes
    needed = workload.memory_bytes(wish.context_tokens)
    return FitReport(
        model=workload.name,
        format=workload.format,
        device=target.name,
        context_tokens=wish.context_tokens,
        weights_bytes=workload.stored_bytes,
        kv_cache_bytes=wish.context_tokens * workload.kv_bytes_per_token,
        overhead_bytes=workload.overhead_bytes(wish.context_tokens),
        needed_bytes=needed,
        available_bytes=limit,
        available_note="as asked" if wish.memory_bytes is not None else target.memory_note,
        fits=None if limit is None else needed <= limit,
        predictions=predictions,
        options=tuple(_options(workload, target, wish, own, limit)),
        largest_student=_largest_student(workload, target, wish, own, limit),
    )


def best_decode(predictions: Sequence[Prediction]) -> float | None:
    """Return the tokens/s of the fastest backend among those with the best basis."""
    known = [p for p in predictions if p.decode.value is not None]
    best_basis = known[0].basis if known else None
    return max((p.decode.value or 0.0 for p in known if p.basis == best_basis), default=None)


def _predictions(
    workload: Workload, target: Target, wish: Wish, own: Sequence[tuple[OwnRun, Workload]]
) -> list[Prediction]:
    """Return predictions, those with the best basis first."""
    found = [
        _from_own(workload, wish, backend, [pair for pair in own if pair[0].backend == backend])
        for backend in dict.fromkeys(run.backend for run, _ in own)
    ]
    found += [_from_group(workload, wish, group) for group in target.groups]
    if not found:
        found.append(_from_bandwidth(workload, target, wish))
    return found


def _from_own(
    workload: Workload, wish: Wish, backend: str, runs: Sequence[tuple[OwnRun, Workload]]
) -> Prediction:
    points = [
        Point(
            load.read_bytes_at(run.mean_depth_tokens),
            1 / run.decode_tokens_per_s,
            load.format,
            load.n_layers,
        )
        for run, load in runs
    ]
    line = calibrate_with_spread(points, workload.format)
    return Prediction(
        backend=backend,
        power_mode="",
        basis="own measurements",
        n_points=line.n_points,
        decode=_decode(line, workload, wish),
        prefill=_prefill(workload, runs),
        load=_load(workload, runs),
        source="measured on this device",
    )


def _from_group(workload: Workload, wish: Wish, group: Group) -> Prediction:
    # Its formats are those of other runtimes, so no point is preferred.
    line = calibrate_with_spread(group.points)
    return Prediction(
        backend=group.backend,
        power_mode=group.power_mode,
        basis="published measurements",
        n_points=line.n_points,
        decode=_decode(line, workload, wish),
        prefill=_unknown("tokens/s", "arithmetic bounds it: needs own measurements (--measured)"),
        load=_unknown("s", "the disk bounds it: needs own measurements (--measured)"),
        source=group.source,
    )


def _from_bandwidth(workload: Workload, target: Target, wish: Wish) -> Prediction:
    bandwidth = target.bandwidth_bytes_per_s
    if bandwidth is None:
        decode = _unknown("tokens/s", f"no bandwidth is known: {target.bandwidth_source}")
    else:
        share = target.bandwidth_share
        line = from_bandwidth(bandwidth) if share is None else from_bandwidth(bandwidth, share)
        decode = _decode(line, workload, wish)
    return Prediction(
        backend="any",
        power_mode="",
        basis="bandwidth alone",
        n_points=0,
        decode=decode,
        prefill=_unknown("tokens/s", "arithmetic bounds it: needs own measurements (--measured)"),
        load=_unknown("s", "the disk bounds it: needs own measurements (--measured)"),
        source=target.bandwidth_source,
    )


def _decode(line: Calibration, workload: Workload, wish: Wish) -> Range:
    """Return tokens/s with half of the context filled, the mean over an answer that fills it."""
    read_bytes = workload.read_bytes_at(wish.context_tokens / 2)
    low, high = line.interval(read_bytes, workload.n_layers)
    value = 1 / line.seconds(read_bytes, workload.n_layers)
    return Range(value=value, low=low, high=high, unit="tokens/s")


def _prefill(workload: Workload, runs: Sequence[tuple[OwnRun, Workload]]) -> Range:
    """Return tokens/s of the prompt from weights multiplied per second, the format's own first."""
    alike = [pair for pair in runs if pair[1].format == workload.format] or list(runs)
    rates = sorted(run.prefill_tokens_per_s * _multiplied(load) for run, load in alike)
    value = rates[len(rates) // 2] / max(1, _multiplied(workload))
    return Range(
        value=value,
        low=value / _PREFILL_FACTOR,
        high=value * _PREFILL_FACTOR,
        unit="tokens/s",
    )


def _multiplied(workload: Workload) -> float:
    return workload.n_body * workload.active_share


def _load(workload: Workload, runs: Sequence[tuple[OwnRun, Workload]]) -> Range:
    """Return seconds until ready: the least time seen, and what more bytes add to it."""
    pairs = sorted((load.stored_bytes, run.load_s) for run, load in runs)
    least_s = min(seconds for _, seconds in pairs)
    slopes = [
        (s2 - s1) / (b2 - b1)
        for (b1, s1), (b2, s2) in zip(pairs, pairs[1:], strict=False)
        if b2 > b1 and s2 > s1
    ]
    slope = sorted(slopes)[len(slopes) // 2] if slopes else 0.0
    value = least_s + max(0, workload.stored_bytes - pairs[0][0]) * slope
    return Range(value=value, low=value / _LOAD_FACTOR, high=value * _LOAD_FACTOR, unit="s")


def _unknown(unit: str, reason: str) -> Range:
    return Range(value=None, low=None, high=None, unit=unit, reason=reason)


def _options(
    workload: Workload,
    target: Target,
    wish: Wish,
    own: Sequence[tuple[OwnRun, Workload]],
    limit_bytes: float | None,
) -> list[Option]:
    if wish.tokens_per_s is None and limit_bytes is None:
        return []
    forms = [workload.in_quant(quant) for quant in QUANT_BITS if quant not in ("f32", "bf16")]
    return [_option(form, target, wish, own, limit_bytes) for form in forms]


def _option(
    form: Workload,
    target: Target,
    wish: Wish,
    own: Sequence[tuple[OwnRun, Workload]],
    limit_bytes: float | None,
) -> Option:
    speed = best_decode(_predictions(form, target, wish, own))
    needed = form.memory_bytes(wish.context_tokens)
    is_fast = wish.tokens_per_s is None or (speed is not None and speed >= wish.tokens_per_s)
    return Option(
        quant=form.format.lower(),
        n_weights=form.n_weights,
        memory_bytes=needed,
        decode_tokens_per_s=speed,
        meets=is_fast and (limit_bytes is None or needed <= limit_bytes),
    )


def _largest_student(
    workload: Workload,
    target: Target,
    wish: Wish,
    own: Sequence[tuple[OwnRun, Workload]],
    limit_bytes: float | None,
) -> Option | None:
    """Return the deepest cut of the model that meets the wish at Q4_0, by bisection."""
    if wish.tokens_per_s is None and limit_bytes is None:
        return None
    whole = workload.in_quant("q4_0")

    def at(share: float) -> Option:
        return _option(whole.scaled(share), target, wish, own, limit_bytes)

    if at(1.0).meets:
        return at(1.0)
    low, high = _LEAST_SHARE, 1.0
    if not at(low).meets:
        return None
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).meets else (low, middle)
    return at(low)
