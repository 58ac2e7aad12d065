"""The five rows' benchmark on a tiny model: every stage, a kill between them, and what it says."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import TEXTS, save_tiny_model

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("forked_five_rows.py")
WRITER = ROOT / "scripts" / "write_readme_rows.py"
LIMIT_S = 120
KILLED_IN = "distilled-second"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and pins itself to a core")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a text and questions."""
    folder = tmp_path_factory.mktemp("five-rows")
    save_tiny_model(folder / "teacher")
    (folder / "text.txt").write_text(
        "\n\n\n".join(f"{n} {text}" for n, text in enumerate(TEXTS * 40))
    )
    asked = [
        {"question": f"{n}?", "choices": ["a dog", "a fox"], "answer": n % 2} for n in range(6)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


def start(folder: Path, work: str, *more: str) -> "subprocess.Popen[str]":
    text, questions = str(folder / "text.txt"), f"dogs={folder / 'questions.jsonl'}"
    command = [sys.executable, str(DRIVER), "--teacher", str(folder / "teacher"), "--text", text]
    command += ["--held-out", text, "--questions", questions, "--params", "110k"]
    command += ["--work", str(folder / work), "--row-tokens", "32", "--eval-tokens", "512"]
    command += ["--window", "64", "-p", "16", "-n", "4", "-r", "1", "-t", "1"]
    command += ["--extra", "--compile none --precision fp32", *more]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    environment = {key: value for key, value in os.environ.items() if "COVERAGE" not in key}
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | settings,
    )


def markers(work: Path) -> dict[str, int]:
    """Return when each stage ended."""
    return {path.stem: path.stat().st_mtime_ns for path in (work / "stages").glob("*.json")}


def wait_for(found: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def killed(folder: Path) -> Iterator[dict[str, int]]:
    """The stages that had ended when a run was killed in the next."""
    with start(folder, "work", "--tokens", "4k", "--out", str(folder / "rows.json")) as process:
        before = KILLED_IN.replace("second", "first")
        wait_for(lambda: process.poll() is not None or before in markers(folder / "work"))
        wait_for(lambda: process.poll() is not None or psutil.Process(process.pid).children())
        left = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert left, "the stage was not running"
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive, "a stage goes on after its run was killed"
    yield markers(folder / "work")


@pytest.fixture(scope="module")
def result(folder: Path, killed: dict[str, int]) -> dict[str, Any]:
    """What the run that went on recorded."""
    with start(folder, "work", "--tokens", "4k", "--out", str(folder / "rows.json")) as process:
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    found: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return found


def test_a_killed_run_goes_on_with_the_stage_that_it_was_in(
    folder: Path, killed: dict[str, int], result: dict[str, Any]
) -> None:
    assert KILLED_IN not in killed and "baseline-second" in killed
    after = markers(folder / "work")
    assert {name: after[name] for name in killed} == killed
    assert after.keys() == result["stages_s"].keys()


def test_every_row_is_of_its_engine_and_saw_as_many_tokens(
    folder: Path, result: dict[str, Any]
) -> None:
    found = [(row["row"], row["engine"], row["file"]) for row in result["rows"]]
    assert found == [
        ("teacher", "llama.cpp", "teacher-f16.gguf"),
        ("student baseline", "llama.cpp", "baseline-second-f16.gguf"),
        ("student quantized", "llama.cpp", "baseline-second-q4_0.gguf"),
        ("student distilled", "llama.cpp", "distilled-second-f16.gguf"),
        ("distilled + int4", "llama.cpp", "grid-second-q4_0.gguf"),
        ("distilled + int4 (ONNX)", "onnxruntime", "grid-second-q4_0-onnx"),
    ]
    assert result["trained_tokens_per_row"] == 4032  # 63 steps of 2 rows of 32 tokens
    seen = {}
    for row in ("baseline", "distilled", "grid"):
        parts = ["first", "second"] if row != "grid" else ["second"]
        logs = [(folder / "work" / f"{row}-{part}" / "training_log.jsonl") for part in parts]
        seen[row] = [
            [json.loads(x)["tokens"] for x in log.read_text().splitlines()] for log in logs
        ]
    assert seen["baseline"] == seen["distilled"] and seen["grid"][0] == seen["distilled"][1]
    assert sum(map(len, seen["baseline"])) == 63


def test_rows_differ_by_what_they_were_trained_for(result: dict[str, Any]) -> None:
    teacher, baseline, quantized, distilled, grid, onnx = result["rows"]
    assert teacher["kl_nats"]["value"] < 1e-3
    assert distilled["kl_nats"]["value"] < baseline["kl_nats"]["value"]
    assert onnx["kl_nats"]["value"] == pytest.approx(grid["kl_nats"]["value"], rel=0.02)
    assert quantized["file_bytes"] == grid["file_bytes"] < baseline["file_bytes"]
    for row in result["rows"]:
        assert row["perplexity"]["standard_error"] > 0 and row["tasks"]["dogs"]["n_questions"] == 6
        assert row["ms_per_token"] == pytest.approx(1000 / row["tokens_per_s"]["mean"])
    assert result["student_parameters"] <= 110_000 < teacher["n_parameters"]
    assert [each["step"] for each in result["curves"]["grid-second"]] == list(range(1, 17))


def test_a_budget_that_leaves_no_time_says_so_and_other_settings_need_another_folder(
    folder: Path,
) -> None:
    with start(folder, "short", "--minutes", "0.02") as process:
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert re.search(r"--minutes 0.02 leaves -\d+ s for training beside \d+ s for measuring", said)
    assert "plan" not in markers(folder / "short") and "probe-grid" in markers(folder / "short")
    with start(folder, "short", "--minutes", "5") as process:
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1 and "was begun with another minutes" in said


def test_what_a_run_that_was_cut_off_had_measured(
    folder: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    work = shutil.copytree(folder / "work", tmp_path / "work")
    (work / "where.json").write_text('{"machine": "lent"}')
    (work / "stages" / "quality-student-quantized-text.json").unlink()
    command = [sys.executable, str(ROOT / "benchmarks" / "so_far.py"), str(work)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["machine"] == "lent" and found["not_measured"] == ["student quantized"]
    figures = ("row", "file_bytes", "kl_nats", "perplexity", "top1_agreement", "tasks")
    whole = [[row[name] for name in figures] for row in result["rows"]]
    assert [[row[name] for name in figures] for row in found["rows"]] == [*whole[:2], *whole[3:]]
    assert found["curves"] == result["curves"]


def write(result: Path, page: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(WRITER), "--result", str(result), "--page", str(page), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readme_says_what_the_figures_say(
    folder: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# A\n\nnothing\n")
    assert "needs the marks" in write(folder / "rows.json", page).stderr
    page.write_text(
        "# A\n\n<!-- five rows: scripts/write_readme_rows.py -->\n\n"
        "\n<!-- end of five rows -->\n\n## B\n"
    )
    assert "stale" in write(folder / "rows.json", page, "--check").stderr
    assert write(folder / "rows.json", page).returncode == 0
    assert write(folder / "rows.json", page, "--check").returncode == 0
    text = page.read_text()
    assert text.startswith("# A\n") and text.endswith("\n\n## B\n")
    assert text.count("\n| ") == 8 and result["machine"]["processor"] in text
    rows = {row["row"]: row for row in result["rows"]}
    assert {each["new"]: each["base"] for each in result["differences"]} == {
        "student distilled": "student baseline",
        "distilled + int4": "student quantized",
    }
    for each in result["differences"]:
        new, base, field = each["new"], each["base"], each["figure"]
        if field not in ("kl_nats", "perplexity"):
            continue
        gain = rows[base][field]["value"] - rows[new][field]["value"]
        size = -gain / (rows[base][field]["value"] if field == "perplexity" else 1)
        assert each["difference"] == pytest.approx(size, abs=1e-9)
        said = "better" if gain > 0 else "worse"
        beyond = abs(each["difference"]) > 2 * each["standard_error"]
        said += f", {'beyond' if beyond else 'within'} two standard errors"
        name = {"kl_nats": "KL to teacher, nats", "perplexity": "perplexity"}[field]
        (line,) = [line for line in text.splitlines() if line.startswith(f"- **{new}**")]
        assert f"{name} {said}" in line


def test_without_a_result_the_readme_stays(tmp_path: Path) -> None:
    for more in ((), ("--check",)):
        done = write(tmp_path / "none.json", tmp_path / "no-page.md", *more)
        assert done.returncode == 0 and not list(tmp_path.iterdir())
