"""Verdicts, exit codes and what can be read, on documents made of chosen samples."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import DataError
from edgekd.runtime.bench_compare import compare, judge_ratio, overall
from edgekd.runtime.bench_compare_text import to_text
from edgekd.runtime.stats import Ratio

# Ten blocks of a machine that drifts by a third: far more than what is to be found.
DRIFT_S = [1.0, 1.02, 1.31, 1.05, 0.98, 1.2, 1.1, 1.33, 1.0, 1.15]


def document(*models: list[float], order: str = "interleaved", **changes: Any) -> dict[str, Any]:
    results = [
        {
            "model": f"model{number}.gguf",
            "n_threads": 2,
            "invalid_reasons": [],
            "memory": {"peak_rss_bytes": {"value": 1e8 * (1 + number)}},
            "scenarios": [{"name": "tg128", "samples_s": samples}],
        }
        for number, samples in enumerate(models)
    ]
    whole = {"schema": "edgekd.bench/1", "order": order, "results": results}
    return whole | {"machine": {"processor": "A"}, "tools": {"edgekd": "1"}} | changes


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), "utf-8")
    return str(path)


def noisy(seconds: list[float], seed: int) -> list[float]:
    generator = random.Random(seed)
    return [s * generator.gauss(1, 0.005) for s in seconds]


@pytest.mark.parametrize(
    ("slowdown", "verdict", "code"),
    [(1.0, "within limits", 0), (1.08, "regression", 1), (1.05, "inconclusive", 3)],
)
def test_models_that_took_turns_are_compared_in_pairs(
    slowdown: float, verdict: str, code: int, tmp_path: Path
) -> None:
    slower = [s * slowdown for s in DRIFT_S]
    file = write(tmp_path / "run.json", document(noisy(DRIFT_S, 1), noisy(slower, 2)))
    comparison = compare(f"{file}#0", f"{file}#model1.gguf", 0.05)
    assert (comparison.verdict, comparison.exit_code) == (verdict, code)
    ratio = comparison.compared[0].speed_ratio
    assert ratio and ratio.paired
    assert ratio.low < 1 / slowdown < ratio.high
    assert "peak memory: +100.0%" in comparison.differences


def test_the_same_drift_without_pairs_hides_the_slowdown(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", document(DRIFT_S))
    new = write(tmp_path / "new.json", document([s * 1.08 for s in DRIFT_S[::-1]]))
    comparison = compare(base, new, 0.05)
    assert comparison.verdict == "inconclusive"
    assert comparison.compared[0].speed_ratio and not comparison.compared[0].speed_ratio.paired
    assert "larger -r" in to_text(comparison)


def test_an_invalid_run_proves_nothing(tmp_path: Path) -> None:
    spoilt = document(DRIFT_S)
    spoilt["results"][0]["invalid_reasons"] = ["the processor throttled 3 times"]
    base = write(tmp_path / "base.json", document([1.0, 1.0, 1.0]))
    comparison = compare(base, write(tmp_path / "new.json", spoilt), 0.05)
    assert comparison.exit_code == 3
    assert "INVALID" in to_text(comparison) and "throttled 3 times" in to_text(comparison)


def test_other_machines_and_versions_are_named(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", document([1.0, 1.01]))
    other = document([1.0, 1.01], machine={"processor": "B"}, tools={"edgekd": "2"})
    comparison = compare(base, write(tmp_path / "new.json", other), 0.05)
    assert comparison.differences[:2] == ["processor: A -> B", "edgekd: 1 -> 2"]


def test_results_of_llama_bench_are_read_as_json_and_as_lines(tmp_path: Path) -> None:
    row = {"model_filename": "m.gguf", "n_prompt": 512, "n_gen": 0, "n_depth": 0}
    rows = [row | {"samples_ns": [10**9, 10**9 + 10**6], "stddev_ns": 2**64 - 1}]
    base = write(tmp_path / "base.json", rows)
    slower = row | {"samples_ns": [2 * 10**9, 2 * 10**9 + 10**6]}
    lines = tmp_path / "new.jsonl"
    lines.write_text(json.dumps(slower) + "\n")
    (compared,) = compare(base, str(lines), 0.05).compared
    assert compared.scenario == "pp512" and compared.verdict == "regression"
    assert compared.speed_ratio and compared.speed_ratio.value == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("nothing", "is no result"),
        ({"schema": "edgekd.bench/2"}, "reads edgekd.bench/1"),
        ({"schema": "edgekd.bench/1"}, "cut short or changed"),
        ([{"n_prompt": 512, "n_gen": 128}], "mixes two rates"),
        ([{"n_prompt": 512, "n_gen": 0}], "without samples_ns"),
    ],
)
def test_what_cannot_be_read_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", document([1.0, 1.0]))
    with pytest.raises(DataError, match=complaint):
        compare(good, write(tmp_path / "bad.json", content), 0.05)


def test_models_must_be_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "two.json", document([1.0, 1.0], [2.0, 2.0]))
    with pytest.raises(DataError, match="has not one model 'other'; it holds 0: model0.gguf"):
        compare(f"{file}#0", f"{file}#other", 0.05)
    renamed = document([1.0, 1.0], [2.0, 2.0])
    for result in renamed["results"]:
        result["model"] = f"renamed-{result['model']}"
    with pytest.raises(DataError, match="choose one of each with FILE#MODEL"):
        compare(file, write(tmp_path / "renamed.json", renamed), 0.05)


@given(st.floats(0.5, 1.5), st.floats(0, 0.3), st.floats(0, 0.5))
def test_a_verdict_is_the_place_of_the_interval(value: float, half: float, limit: float) -> None:
    ratio = Ratio(value=value, low=value - half, high=value + half, n=5, paired=True)
    verdict = judge_ratio(ratio, limit)
    assert (verdict == "regression") == (ratio.high < 1 - limit)
    assert (verdict == "within limits") == (ratio.low >= 1 - limit)


def test_one_regression_outweighs_the_rest() -> None:
    assert overall(["within limits", "inconclusive", "regression"]) == "regression"
    assert overall(["within limits", "inconclusive"]) == "inconclusive"
    assert overall(["within limits"]) == "within limits"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekd", "bench", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_ends_with_the_code_of_its_verdict(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", document([1.0, 1.001, 0.999]))
    slow = write(tmp_path / "slow.json", document([1.2, 1.201, 1.199]))
    assert _run(base, base, "--quiet").returncode == 0
    slower = _run(base, slow, "--json")
    assert slower.returncode == 1
    assert json.loads(slower.stdout.splitlines()[-1])["verdict"] == "regression"
    assert _run(base, slow, "--max-regress", "30%").returncode == 0
    assert _run(base, str(tmp_path / "none.json")).returncode == 2
    assert _run(base, slow, "--max-regress", "0.05").returncode == 2
    once = write(tmp_path / "once.json", document([1.0]))
    assert _run(base, once).returncode == 3
