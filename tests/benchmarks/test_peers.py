"""The page beside the peers says what the results say, whichever way they fall."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, RESULTS = ROOT / "scripts" / "write_peers.py", ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "benchmarks")]

from peers import Compared  # noqa: E402


def write(results: Path, page: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), "--results", str(results), "--page", str(page), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the committed results."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


@pytest.fixture
def page_of(results: Path, tmp_path: Path) -> Callable[..., str]:
    """Return the page after ``change`` was done to a result."""

    def make(benchmark: str = "", change: Callable[[Any], object] = lambda _: None) -> str:
        if benchmark:
            found = json.loads((results / f"{benchmark}.json").read_text())
            change(found)
            (results / f"{benchmark}.json").write_text(json.dumps(found))
        done = write(results, tmp_path / "peers.md")
        assert done.returncode == 0, done.stderr
        return (tmp_path / "peers.md").read_text()

    return make


def line_of(page: str, figure: str, peer: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {figure} | {peer} |")]
    return line


def test_where_the_figures_turn_round_the_page_says_worse(page_of: Callable[..., str]) -> None:
    figure = "tokens/s, bf16 heads"
    assert line_of(page_of(), figure, "TRL").endswith("| better |")
    before = page_of().count("**worse**")

    def slower(found: Any) -> None:
        row = found["rows"]["edgekd, bf16 heads"]
        row["speed_over_trl"] = {"median": 0.8, "quartiles": [0.7, 0.8, 0.9]}
        row["tokens_per_s"]["median"] = 215.0

    page = page_of("distill_vs_trl", slower)
    assert line_of(page, figure, "TRL").endswith("| 0.800 (0.700-0.900) | **worse** |")
    assert page.count("**worse**") == before + 2  # beside the compiled one, too
    assert "- Train, tokens/s, bf16 heads: 215 against 268 of TRL\n" in page


def test_the_number_of_losses_is_that_of_the_rows(page_of: Callable[..., str]) -> None:
    page = page_of()
    n_worse = page.count("**worse**")
    assert f"edgekd is worse in {n_worse} and" in page
    listed = page.partition("## Where edgekd loses")[2].partition("## ")[0]
    assert listed.count("\n- ") == n_worse


def test_a_benchmark_without_a_result_says_so_and_one_with_it_is_shown(
    results: Path, page_of: Callable[..., str]
) -> None:
    (results / "bench_vs_llama_bench.json").unlink(missing_ok=True)
    part = page_of().partition("## Measure: llama-bench")[2].partition("\n## ")[0]
    assert "No result is committed yet." in part and "--target llama-bench" in part
    known = json.loads((results / "serve.json").read_text())
    sides = {"ours_tokens_per_s": {"mean": 99.0}, "llama_bench_tokens_per_s": {"mean": 100.0}}
    ratio = {"value": 0.99, "low": 0.985, "high": 0.995}
    found = {
        "llama_bench_build": "abc (7)",
        "limit": 0.02,
        "results": {"tg128": {**sides, "speed_ratio": ratio, "within": True}},
    }
    found |= {key: known[key] for key in ("machine", "tools", "date")}
    (results / "bench_vs_llama_bench.json").write_text(json.dumps(found))
    page = page_of()
    assert line_of(page, "tg128, tokens/s", "llama-bench").endswith("| equal to 2% |")
    assert "beside llama_bench_build abc (7)" in page


def test_a_stale_page_is_refused(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "peers.md"
    assert "peers.md is stale" in write(results, page, "--check").stderr
    write(results, page)
    assert write(results, page, "--check").returncode == 0
    page.write_text(page.read_text().replace("**worse**", "better", 1))
    assert "peers.md is stale" in write(results, page, "--check").stderr


@pytest.mark.parametrize(
    ("ratio", "interval", "more_is_better", "verdict"),
    [
        (1.2, (1.1, 1.3), True, "better"),
        (1.2, (1.1, 1.3), False, "**worse**"),
        (0.8, (0.7, 0.9), True, "**worse**"),
        (0.8, None, False, "better"),
        (1.2, (0.9, 1.6), True, "unclear"),
        (1.004, (0.995, 1.009), False, "equal to 1%"),
        (0.98, None, True, "**worse**"),
        (None, None, True, ""),
    ],
)
def test_a_verdict_goes_by_the_interval(
    ratio: float | None, interval: tuple[float, float] | None, more_is_better: bool, verdict: str
) -> None:
    compared = Compared(
        what="", peer="", ours="", theirs="", ratio=ratio, interval=interval,
        more_is_better=more_is_better,
    )  # fmt: skip
    assert compared.verdict == verdict
