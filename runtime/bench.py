"""Speed, latency, memory and energy of models, each measured in a fresh process of its own.

A process that has held one model keeps its peak memory and its warm libraries, so a second model
measured in it would look different from the first. Several models take turns, block by block and
in mirrored order (A B, B A, ...), so that what drifts on the machine drifts for all of them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

from edgekd.devices.detect import detect, memory_bytes
from edgekd.devices.energy import EnergyMeter
from edgekd.files import size_of
from edgekd.progress import Progress, Silence
from edgekd.runtime.bench_process import BenchProcess
from edgekd.runtime.bench_quality import QualitySettings, check_quality, with_quality
from edgekd.runtime.bench_result import BenchResult, BenchRun, Collected, scenario_result
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.bench_start import user_seconds
from edgekd.runtime.conditions import (
    Finding,
    judge,
    judge_machine,
    other_load_share,
    take_snapshot,
)
from edgekd.runtime.loading import default_threads
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.roofline import Roofline, probe_roofline

__all__ = [
    "BenchResult",
    "BenchRun",
    "BenchSettings",
    "QualitySettings",
    "bench_models",
    "run_bench",
]

_MEMORY_FACTOR = 1.5  # weights repacked or unpacked, cache and engine, over the size of the file
_MEMORY_SHARE = 0.7


class _Candidate:
    """One model while it is measured: its process and what it gave so far."""

    def __init__(self, process: BenchProcess, cold: dict[str, Any] | None, settings: BenchSettings):
        self.process = process
        self.cold_start = cold
        self.collected = [Collected(scenario) for scenario in settings.scenarios()]
        self.soak: dict[str, Any] | None = None
        self.memory: dict[str, Any] = {}
        self.vocabulary: str | None = None


def bench_models(
    models: Sequence[str], settings: BenchSettings, progress: Progress | None = None
) -> list[BenchResult]:
    """Return the measurements of ``models``, in their order.

    Raises:
        EngineError: a model cannot be run; the reason is the one of its process.
    """
    return run_bench(models, settings, progress).results


def run_bench(
    models: Sequence[str],
    settings: BenchSettings,
    progress: Progress | None = None,
    *,
    extra_work: Mapping[int, float] | None = None,
    quality: QualitySettings | None = None,
) -> BenchRun:
    """Return all that is measured of ``models`` on this machine, their ``quality`` last.

    ``extra_work`` has the models at these places compute a share of their tokens a second time: it
    is there to try whether a comparison would notice.

    Raises:
        EngineError: a model cannot be run; the reason is the one of its process.
        RecipeError: what ``quality`` asks for contradicts itself.
    """
    progress = progress or Silence()
    parent_user_s = user_seconds()
    if quality is not None:
        check_quality(models, quality, settings)
    limits = _probe(settings, progress)
    handicaps = [(extra_work or {}).get(place, 0.0) for place in range(len(models))]
    together = _fit_together(models)
    groups = [list(range(len(models)))] if together else [[place] for place in range(len(models))]
    before, own_before_s = take_snapshot(), _own_seconds()
    candidates: list[_Candidate] = []
    with progress.track("speed", len(models) * settings.repetitions) as advance:
        for group in groups:
            with ExitStack() as stack:
                started = [
                    _start(stack, models[place], settings, handicaps[place]) for place in group
                ]
                candidates += started
                for done, name in _measure(started, settings, compares=len(models) > 1):
                    advance(group[0] * settings.repetitions + done, name)
    after, own_s = take_snapshot(), _own_seconds() - own_before_s
    findings = [*judge_machine(detect()), *judge(before, after, own_s)]
    results = [_result(candidate, limits, findings) for candidate in candidates]
    run = BenchRun(
        settings=settings,
        order="interleaved" if together else "sequential",
        roofline=limits,
        before=before,
        after=after,
        own_cpu_s=own_s,
        other_load_share=other_load_share(before, after, own_s),
        findings=findings + _doubts(results, limits),
        results=_with_equal_ids(results),
        parent_user_s=parent_user_s,
    )
    return run if quality is None else with_quality(run, quality, progress)


def _own_seconds() -> float:
    """Return the processor time of this process and of all its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _probe(settings: BenchSettings, progress: Progress) -> Roofline | None:
    if not settings.roofline:
        return None
    limits = probe_roofline(settings.n_threads or default_threads())
    read, gemm = limits.read_bytes_per_s, limits.gemm_flop_per_s
    if read.value is None or gemm.value is None:
        progress.say(f"limits of this machine unknown: {read.reason}")
    else:
        progress.say(
            f"limits on {limits.n_threads} threads: reads {read.value / 1e9:.1f} GB/s, "
            f"multiplies {gemm.value / 1e9:.0f} GFLOP/s (fp32)"
        )
    return limits


def _fit_together(models: Sequence[str]) -> bool:
    """Return whether all models fit into memory beside each other, judged by their files."""
    sizes = [size_of(path) for model in models if (path := Path(model).expanduser()).exists()]
    _, available = memory_bytes()
    return available is None or sum(sizes) * _MEMORY_FACTOR < available * _MEMORY_SHARE


def _start(stack: ExitStack, model: str, settings: BenchSettings, extra_work: float) -> _Candidate:
    cold = None
    if settings.cold_start:
        with BenchProcess(model, settings, cold=True) as process:
            cold = process.facts["start"]
    process = BenchProcess(model, settings, extra_work=extra_work)
    return _Candidate(stack.enter_context(process), cold, settings)


def _measure(
    candidates: Sequence[_Candidate], settings: BenchSettings, *, compares: bool
) -> Iterator[tuple[int, str]]:
    """Fill the candidates; yield after each model's block how many are done, and its name."""
    for candidate in candidates:
        for entry in candidate.collected:
            scenario = asdict(entry.scenario)
            entry.warm_up = candidate.process.ask(
                "warm_up", scenario=scenario, limit_s=settings.warm_up_s
            )
    n_done = 0
    for block in range(settings.repetitions):
        turns = candidates if block % 2 == 0 else candidates[::-1]
        for place in range(len(settings.scenarios())):
            for candidate in turns:
                entry = candidate.collected[place]
                entry.samples.append(candidate.process.ask("run", scenario=asdict(entry.scenario)))
        n_done += len(candidates)
        yield n_done, PurePath(turns[-1].process.model).name
    for candidate in candidates:
        _finish(candidate, settings, compares=compares)


def _finish(candidate: _Candidate, settings: BenchSettings, *, compares: bool) -> None:
    candidate.memory = candidate.process.ask("memory")
    if settings.soak_minutes:
        scenario = next(s for s in settings.scenarios() if s.kind == "decode")
        candidate.soak = candidate.process.ask(
            "soak", scenario=asdict(scenario), limit_s=settings.soak_minutes * 60
        )
    if compares:
        candidate.vocabulary = candidate.process.ask("vocabulary")["sha256"]


def _result(
    candidate: _Candidate, limits: Roofline | None, findings: Sequence[Finding]
) -> BenchResult:
    loaded = candidate.process.facts
    kind, path = ModelKind(loaded["kind"]), Path(loaded["path"])
    facts, energy = read_facts(kind, path), EnergyMeter().probe()
    reasons = [finding.message for finding in findings if finding.invalid]
    provider, ids = loaded["provider"], loaded["prompt_ids"]
    if provider and provider["is_emulated"]:
        reasons.append("ran in an emulator, whose time says nothing about the chip")
    return BenchResult(
        model=str(path),
        kind=str(kind),
        engine=loaded["engine"],
        provider=provider,
        n_threads=loaded["n_threads"],
        file_bytes=size_of(path),
        facts=facts,
        cold_start=candidate.cold_start,
        warm_start=loaded["start"],
        memory=candidate.memory,
        scenarios=[scenario_result(c, facts, limits, energy) for c in candidate.collected],
        soak=candidate.soak,
        prompt_ids=ids,
        prompt_ids_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        vocabulary_sha256=candidate.vocabulary,
        valid=not reasons,
        invalid_reasons=reasons,
    )


def _with_equal_ids(results: list[BenchResult]) -> list[BenchResult]:
    """Return ``results``, void where equal vocabularies gave other ids for the same text."""
    checked = []
    for result in results:
        others = [
            PurePath(other.model).name
            for other in results
            if other.vocabulary_sha256 == result.vocabulary_sha256
            and other.prompt_ids != result.prompt_ids
        ]
        reasons = [f"reads other token ids than {name}, of the same vocabulary" for name in others]
        checked.append(
            replace(
                result,
                valid=result.valid and not reasons,
                invalid_reasons=result.invalid_reasons + reasons,
            )
        )
    return checked


def _doubts(results: Sequence[BenchResult], limits: Roofline | None) -> list[Finding]:
    """Return what does not void a result, but changes how it is to be read."""
    found = []
    cache_bytes = limits.last_level_cache_bytes if limits else None
    for result in results:
        name = PurePath(result.model).name
        uneven = [entry.name for entry in result.scenarios if not entry.steady]
        if uneven:
            message = f"{name}: {', '.join(uneven)} did not become steady while warming up"
            found.append(Finding("unsteady", message, "more repetitions, or less load", False))
        read_bytes = result.facts.weight_bytes_per_token.value
        if cache_bytes and read_bytes and read_bytes < cache_bytes:
            message = f"{name}: its weights fit into the last-level cache"
            advice = "do not compare its decode with the bandwidth of the memory"
            found.append(Finding("in-cache", message, advice, False))
        if result.cold_start and result.cold_start["cold_reason"]:
            message = f"{name}: the cold start was not cold: {result.cold_start['cold_reason']}"
            found.append(Finding("not-cold", message, "close what uses the file", False))
    return found
