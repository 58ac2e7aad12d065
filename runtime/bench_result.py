"""What was measured of one model, and the document that holds a whole run.

The document is described by docs/schemas/bench-1.json. Every figure has its raw samples beside
it, or says why there is none.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from edgekd.devices.detect import detect
from edgekd.devices.reading import Reading
from edgekd.manifest import tool_versions
from edgekd.runtime.bench_settings import DEFINITIONS, BenchSettings, Scenario
from edgekd.runtime.conditions import Finding, Snapshot
from edgekd.runtime.model_facts import ModelFacts
from edgekd.runtime.roofline import Roofline, decode_share, prefill_share
from edgekd.runtime.stats import Summary, percentile, summarise

SCHEMA = "edgekd.bench/1"
_ENERGY_UNIT = "J/token"


@dataclass(frozen=True, kw_only=True)
class ScenarioResult:
    """One scenario of one model."""

    name: str
    kind: str
    n_tokens: int
    n_depth: int
    samples_s: list[float]
    """One for each block, in their order: a comparison pairs them."""
    tokens_per_s: Summary
    ttft_s: Summary | None
    """Of a prefill only."""
    gaps_s: list[list[float]]
    """Of a decode only: every step of every repetition."""
    gap_ms: dict[str, float] | None
    """p50, p95 and p99 over all of them."""
    energy_per_token: Reading
    roofline_share: float | None
    kv_bytes: float | None
    """Of the cache at the end of the scenario."""
    warm_up_s: list[float]
    steady: bool
    """Whether the warm-up ended with even times."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured of one model."""

    model: str
    kind: str
    engine: str
    provider: dict[str, Any] | None
    """Execution provider of an ONNX folder, its label, and the nodes that it took."""
    n_threads: int
    file_bytes: int
    facts: ModelFacts
    cold_start: dict[str, Any] | None
    """None where none was asked for."""
    warm_start: dict[str, Any]
    memory: dict[str, Any]
    scenarios: list[ScenarioResult]
    soak: dict[str, Any] | None
    prompt_ids: list[int]
    prompt_ids_sha256: str
    """Of the ids as a JSON list: equal where the models got the same tokens."""
    vocabulary_sha256: str | None
    """None where there was no other model to compare with."""
    valid: bool
    invalid_reasons: list[str]
    quality: dict[str, Any] | None = None
    """None where it was not asked."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values; ``quality`` is in it where it was asked."""
        values = asdict(self)
        if self.quality is None:
            del values["quality"]
        return values

    @property
    def decode_tokens_per_s(self) -> Summary:
        """Return the first decode rate."""
        return self._first("decode").tokens_per_s

    @property
    def ms_per_token(self) -> dict[str, float]:
        """Return p50, p95 and p99 of the gaps of the first decode."""
        gap_ms = self._first("decode").gap_ms
        assert gap_ms is not None
        return gap_ms

    @property
    def energy_per_token(self) -> Reading:
        """Return the energy of the first decode."""
        return self._first("decode").energy_per_token

    @property
    def peak_rss_bytes(self) -> int:
        """Return the peak of the whole process, interpreter and engine included."""
        return int(self.memory["peak_rss_bytes"]["value"])

    def _first(self, kind: str) -> ScenarioResult:
        return next(entry for entry in self.scenarios if entry.kind == kind)


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """All that one call measured."""

    settings: BenchSettings
    order: str
    """``interleaved``: A B, B A, ...; ``sequential`` where memory does not hold all of them."""
    roofline: Roofline | None
    before: Snapshot
    after: Snapshot
    own_cpu_s: float
    other_load_share: float | None
    findings: list[Finding]
    results: list[BenchResult]
    parent_user_s: float
    """User time of edgekd itself until the first model's process was started."""
    quality_settings: dict[str, Any] | None = None
    """None where quality was not asked."""
    quality_reference: dict[str, Any] | None = None
    """The teacher or the pack, if there is one."""

    def as_dict(self) -> dict[str, Any]:
        """Return the document."""
        return self._speed() | self._quality()

    def _quality(self) -> dict[str, Any]:
        if self.quality_settings is None:
            return {}
        return {
            "quality_settings": self.quality_settings,
            "quality_reference": self.quality_reference,
        }

    def _speed(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self.settings.as_dict(),
            "definitions": DEFINITIONS,
            "order": self.order,
            "machine": detect().as_dict(),
            "tools": tool_versions(),
            "roofline": self.roofline.as_dict() if self.roofline else None,
            "conditions": {
                "before": self.before.as_dict(),
                "after": self.after.as_dict(),
                "own_cpu_s": self.own_cpu_s,
                "other_load_share": self.other_load_share,
                "warnings": [asdict(finding) for finding in self.findings],
            },
            "parent_user_s": self.parent_user_s,
            "valid": all(result.valid for result in self.results),
            "results": [result.as_dict() for result in self.results],
        }


@dataclass
class Collected:
    """What a scenario of one model gave while the blocks ran."""

    scenario: Scenario
    warm_up: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def scenario_result(
    collected: Collected, facts: ModelFacts, limits: Roofline | None, energy: Reading
) -> ScenarioResult:
    """Return what the samples of a scenario say; ``energy`` tells why joules may be missing."""
    scenario, samples = collected.scenario, collected.samples
    rates = summarise([scenario.n_tokens / sample["seconds"] for sample in samples])
    is_decode = scenario.kind == "decode"
    gaps_s = [sample["gaps_s"] for sample in samples] if is_decode else []
    kv = facts.kv_bytes_per_token
    mean_depth = scenario.n_depth + scenario.n_tokens / 2
    return ScenarioResult(
        name=scenario.name,
        kind=scenario.kind,
        n_tokens=scenario.n_tokens,
        n_depth=scenario.n_depth,
        samples_s=[sample["seconds"] for sample in samples],
        tokens_per_s=rates,
        ttft_s=None if is_decode else summarise([sample["ttft_s"] for sample in samples]),
        gaps_s=gaps_s,
        gap_ms=_gap_ms(gaps_s) if is_decode else None,
        energy_per_token=_per_token(samples, scenario.n_tokens, energy),
        roofline_share=decode_share(
            rates.mean, facts.weight_bytes_per_token, kv, mean_depth, limits
        )
        if is_decode
        else prefill_share(rates.mean, facts.prefill_parameters, limits),
        kv_bytes=None if kv.value is None else kv.value * (scenario.n_depth + scenario.n_tokens),
        warm_up_s=collected.warm_up["seconds"],
        steady=collected.warm_up["is_steady"],
    )


def _gap_ms(gaps_s: Sequence[Sequence[float]]) -> dict[str, float]:
    gaps_ms = [gap_s * 1e3 for run in gaps_s for gap_s in run]
    return {f"p{p}": percentile(gaps_ms, p) for p in (50, 95, 99)}


def _per_token(samples: Sequence[dict[str, Any]], n_tokens: int, energy: Reading) -> Reading:
    joules = [sample["joules"] for sample in samples]
    if energy.value is None or any(value is None for value in joules):
        reason = energy.reason or "the counter could not be read throughout"
        return Reading.unavailable(_ENERGY_UNIT, energy.source, reason)
    return Reading.measured(fmean(joules) / n_tokens, _ENERGY_UNIT, energy.source)
