"""Differences of quality between two measurements: paired by window, named where they are worse."""

import copy
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.runtime.bench_compare import Comparison, compare
from edgekd.runtime.bench_compare_text import short_verdict, to_text
from edgekd.runtime.compare_quality import (
    MeasuredQuality,
    QualityCompared,
    compare_quality,
    judge_difference,
)
from edgekd.runtime.estimate import Blocks
from edgekd.runtime.stats import t_quantile

SIZES = [255] * 15 + [40]
TEACHER = {"teacher": "t.gguf", "weights_sha256": "a" * 64, "tokenizer_sha256": "b" * 64}
PACK = {"pack": "p", "teacher": "t", "teacher_sha256": "a" * 64, "top_k": 64}
RANDOM = random.Random(3)
HARD = [RANDOM.uniform(0.5, 1.5) for _ in SIZES]  # some windows are hard for every model


def windows(kl: float, seed: int, noise: float = 0.002) -> dict[str, Any]:
    """Return the means of a model that errs by about ``kl``, more where the text is hard."""
    drawn = random.Random(seed)
    kl_nats = [max(0.0, kl * hard + drawn.gauss(0, noise)) for hard in HARD]
    return {
        "n_positions": SIZES,
        "log_p_nats": [-2 * hard - one for hard, one in zip(HARD, kl_nats, strict=True)],
        "kl_nats": kl_nats,
        "top1_agreement": [1 - one for one in kl_nats],
        "delta_p": [-one / 2 for one in kl_nats],
    }


def document(*models: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    results = []
    for number, by_window in enumerate(models):
        result: dict[str, Any] = {
            "model": f"model{number}.gguf",
            "n_threads": 2,
            "invalid_reasons": [],
            "memory": {"peak_rss_bytes": {"value": 1e8}},
            "scenarios": [{"name": "tg128", "samples_s": [1.0, 1.001, 0.999, 1.0]}],
        }
        if by_window:
            result["quality"] = {"windows_sha256": "c" * 64, "by_window": by_window}
        results.append(result)
    whole: dict[str, Any] = {"schema": "edgekd.bench/1", "order": "interleaved"}
    whole |= {"results": results, "machine": {"processor": "A"}, "tools": {"edgekd": "1"}}
    return whole | {"quality_settings": {}, "quality_reference": TEACHER} | changes


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), "utf-8")
    return str(path)


def compared(folder: Path, base: dict[str, Any], new: dict[str, Any]) -> Comparison:
    return compare(write(folder / "base.json", base), write(folder / "new.json", new), 0.05)


def figure(comparison: Comparison, name: str) -> QualityCompared:
    (found,) = (one for one in comparison.quality if one.figure == name)
    return found


def test_a_worse_kl_is_named_and_the_exit_code_stays_that_of_speed(tmp_path: Path) -> None:
    file = write(tmp_path / "run.json", document(windows(0.10, 1), windows(0.12, 2)))
    comparison = compare(f"{file}#0", f"{file}#1", 0.05)
    assert (comparison.verdict, comparison.exit_code) == ("within limits", 0)
    kl = figure(comparison, "kl_nats")
    assert kl.verdict == "worse" and kl.low and kl.high and kl.low < 0.02 < kl.high
    names = ["perplexity", "KL to teacher", "top-1 agreement", "mean \u0394p"]
    assert comparison.worse_quality == names == comparison.as_dict()["worse_quality"]
    for said in (to_text(comparison), short_verdict(comparison)):
        assert "within limits" in said and f"; WORSE quality: {', '.join(names)}" in said
    lines = to_text(comparison).splitlines()
    assert lines[2].startswith("  KL to teacher  model0.gguf -> model1.gguf: +0.0")
    assert re.search(r"top-1 agreement  .*: -\d\.\d\d points ± 0\.\d\d \[-", lines[3])
    back = compare(f"{file}#1", f"{file}#0", 0.05)
    assert {one.verdict for one in back.quality} == {"better"} and back.worse_quality == []
    assert "WORSE" not in to_text(back)
    for one, other in zip(comparison.quality[1:], back.quality[1:], strict=True):
        assert one.difference == pytest.approx(-other.difference)


def test_models_that_are_alike_are_not_called_worse(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, document(windows(0.1, 1, noise=0.01)), document(windows(0.1, 2, noise=0.01))
    )
    assert {one.verdict for one in comparison.quality} == {"no difference found"}
    assert short_verdict(comparison) == "within limits"


def test_the_error_is_that_of_the_pairs_and_smaller_than_that_of_either(tmp_path: Path) -> None:
    base, new = windows(0.10, 1), windows(0.12, 2)
    found = figure(compared(tmp_path, document(base), document(new)), "kl_nats")
    window_of = np.repeat(np.arange(len(SIZES)), SIZES)
    blocks = Blocks(window_of)  # as eval does it, from every position
    one, other = (np.array(side["kl_nats"])[window_of] for side in (base, new))
    expected = blocks.mean(other - one)
    assert expected.standard_error
    assert found.difference == pytest.approx(expected.value)
    assert found.standard_error == pytest.approx(expected.standard_error)
    half = t_quantile(len(SIZES) - 1) * expected.standard_error
    assert (found.low, found.high) == pytest.approx((expected.value - half, expected.value + half))
    apart = [blocks.mean(side).standard_error or 0.0 for side in (one, other)]
    assert found.standard_error and found.standard_error * 3 < math.hypot(*apart)


def test_perplexities_are_compared_as_their_ratio(tmp_path: Path) -> None:
    base, new = windows(0.1, 1), windows(0.1, 1)
    new["log_p_nats"] = [one - math.log(1.1) for one in base["log_p_nats"]]
    found = figure(compared(tmp_path, document(base), document(new)), "perplexity")
    assert found.difference == pytest.approx(0.1) and found.verdict == "worse"
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    noisy = figure(compared(tmp_path, document(base), document(windows(0.13, 5))), "perplexity")
    assert noisy.low and noisy.high and noisy.standard_error
    assert noisy.low < noisy.difference < noisy.high


def test_a_single_window_has_no_error_and_no_verdict(tmp_path: Path) -> None:
    base, new = ({k: v[:1] for k, v in windows(kl, 1).items()} for kl in (0.1, 0.3))
    comparison = compared(tmp_path, document(base), document(new))
    assert {one.verdict for one in comparison.quality} == {"unknown"}
    assert {one.standard_error for one in comparison.quality} == {None}
    assert "unknown error: a single window" in to_text(comparison)
    assert comparison.worse_quality == []


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    whole = document(windows(0.1, 1))
    only = compared(tmp_path, whole, document(None))
    assert only.quality == [] and only.quality_notes == [
        "quality not compared: only that of model0.gguf was measured"
    ]
    assert compared(tmp_path, document(None), document(None)).quality_notes == []
    other_text = copy.deepcopy(whole)
    other_text["results"][0]["quality"]["windows_sha256"] = "d" * 64
    comparison = compared(tmp_path, whole, other_text)
    assert comparison.quality == [] and "measured on other tokens" in to_text(comparison)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (TEACHER, TEACHER | {"teacher": "elsewhere/t.gguf"}, True),
        (TEACHER, TEACHER | {"weights_sha256": "e" * 64}, False),
        (TEACHER, PACK, False),
        (PACK, PACK | {"pack": "copy of p"}, True),
        (PACK, PACK | {"top_k": 32}, False),
        (None, None, False),
    ],
)
def test_only_perplexities_are_compared_between_other_teachers(
    one: Any, other: Any, same: bool, tmp_path: Path
) -> None:
    comparison = compared(
        tmp_path,
        document(windows(0.1, 1), quality_reference=one),
        document(windows(0.2, 2), quality_reference=other),
    )
    figures = [found.figure for found in comparison.quality]
    assert figures == ["perplexity", *(["kl_nats", "top1_agreement", "delta_p"] if same else [])]
    said = "KL, top-1 and \u0394p not compared" in to_text(comparison)
    assert said == (not same and one is not None)


@pytest.mark.parametrize(
    "change",
    [
        {"kl_nats": [0.1]},
        {"kl_nats": None},
        {"log_p_nats": ["x"] * len(SIZES)},
        {"log_p_nats": [-1e9] * len(SIZES)},
        {"n_positions": SIZES[:-1]},
        {"n_positions": [10**15] * len(SIZES)},
        {"n_positions": "many"},
    ],
)
def test_a_quality_that_was_changed_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    good = document(windows(0.1, 1))
    bad = document(windows(0.1, 1) | change)
    with pytest.raises(DataError, match=r"model0\.gguf is cut short or changed"):
        compared(tmp_path, good, bad)
    both = {"n_positions": change.get("n_positions", SIZES)}
    with pytest.raises(DataError, match=r"cut short or changed"):
        compared(tmp_path, document(windows(0.1, 1) | both), document(windows(0.1, 1) | change))


@pytest.mark.parametrize(
    ("low", "high", "less_is_better", "more_is_better"),
    [
        (0.1, 0.2, "worse", "better"),
        (-0.2, -0.1, "better", "worse"),
        (-0.1, 0.2, "no difference found", "no difference found"),
        (0.0, 0.0, "no difference found", "no difference found"),
    ],
)
def test_only_a_whole_interval_is_a_verdict(
    low: float, high: float, less_is_better: str, more_is_better: str
) -> None:
    assert judge_difference(low, high, more_is_better=False) == less_is_better
    assert judge_difference(low, high, more_is_better=True) == more_is_better


def test_equal_models_are_seldom_called_worse() -> None:
    """The interval covers: pairs of equal models with noise of their own, 16 windows each."""
    worse = 0
    for seed in range(200):
        sides = [
            MeasuredQuality("m", "c", windows(0.1, 2 * seed + side, noise=0.02), ("teacher", "a"))
            for side in (0, 1)
        ]
        found = compare_quality(*sides)
        worse += [one.verdict for one in found if one.figure == "kl_nats"] == ["worse"]
    assert 0 < worse <= 200 * 2 * 0.025  # one of 40 is due


def test_the_command_names_what_is_worse(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", document(windows(0.1, 1)))
    new = write(tmp_path / "new.json", document(windows(0.2, 2)))
    command = [sys.executable, "-m", "edgekd", "bench", "compare", base, new]
    for options, expected in (([], "; WORSE quality: "), (["--quiet"], "; WORSE quality: ")):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and expected in done.stdout.splitlines()[-1]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["worse_quality"][1] == "KL to teacher"
