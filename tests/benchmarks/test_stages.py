"""Stages that are taken up again, run by a launcher, and bounded by a budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import TEXTS, save_tiny_model

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from five_rows_budget import (  # noqa: E402
    FIRST,
    MIN_STEPS,
    RUNS,
    SECOND,
    Cost,
    cut,
    measuring_s,
    steps_within,
)
from five_rows_options import question_options  # noqa: E402
from stages import Stages, launched_environment, single_environment  # noqa: E402

costs = st.builds(Cost, step_s=st.floats(0.001, 10), fixed_s=st.floats(0, 60))


@given(
    left_s=st.floats(-100, 10_000),
    by_kind=st.fixed_dictionaries({"baseline": costs, "distilled": costs, "grid": costs}),
    share=st.floats(0.1, 0.5),
)
def test_the_steps_fit_and_more_would_not(
    left_s: float, by_kind: dict[str, Cost], share: float
) -> None:
    def seconds(steps: float) -> float:
        parts = {FIRST: steps * (1 - share), SECOND: steps * share}
        return sum(
            by_kind[kind].fixed_s + parts[part] * by_kind[kind].step_s for kind, part in RUNS
        )

    steps = steps_within(left_s, by_kind, share)
    if steps:
        assert seconds(steps) <= left_s and steps >= MIN_STEPS
    assert seconds(1.16 * (max(steps, MIN_STEPS) + 1)) > left_s


@given(st.integers(2, 100_000), st.floats(0.01, 0.99))
def test_both_parts_are_all_of_the_steps(steps: int, share: float) -> None:
    parts = cut(steps, share)
    assert sum(parts.values()) == steps and min(parts.values()) >= 1


def test_measuring_is_five_more_rows_and_a_benchmark_of_six() -> None:
    assert measuring_s(2, 3, 10, 5) == 5 * 5 + 6 * 10 * 3


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("arc=a.jsonl", ["--questions", "a.jsonl"]),
        ("mmlu=m.jsonl:5", ["--questions", "m.jsonl", "--shots", "5"]),
        (
            "m=m.jsonl:5:d.jsonl",
            ["--questions", "m.jsonl", "--shots", "5", "--shots-from", "d.jsonl"],
        ),
    ],
)
def test_questions_have_a_name_a_file_and_perhaps_shots(text: str, options: list[str]) -> None:
    assert question_options(text) == (text.partition("=")[0], options)


@pytest.mark.parametrize("text", ["a.jsonl", "a=", "=a.jsonl", "a b=c", "a=b:1:c:d"])
def test_other_questions_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="is not NAME=FILE"):
        question_options(text)


def test_a_stage_is_done_once_and_one_that_failed_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(len(made))
        if len(made) == 1:
            raise RuntimeError
        return {"made": len(made)}

    stages = Stages(tmp_path, {"a": 1})
    with pytest.raises(RuntimeError):
        stages.alone("stage", make)
    assert stages.results() == {"settings": {"a": 1}}
    assert Stages(tmp_path, {"a": 1}).alone("stage", make) == {"made": 2}
    assert Stages(tmp_path, {"a": 1}).alone("stage", make) == {"made": 2}
    with pytest.raises(SystemExit, match="was begun with another a; give those of"):
        Stages(tmp_path, {"a": 2})


def test_a_command_that_fails_is_named_with_the_place_of_its_messages(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {})
    with pytest.raises(SystemExit, match=r"edgekd verify none.gguf\nended with 1; its messages"):
        stages.alone("verify", lambda: stages.edgekd(["verify", "none.gguf"]))
    assert "none.gguf" in (tmp_path / "log-0.txt").read_text()
    assert list(stages.results()) == ["settings"]


def test_each_command_of_a_launch_meets_at_a_port_of_its_own() -> None:
    launch = {"MASTER_PORT": "29500", "RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "A": "b"}
    assert launched_environment(launch, 3) == {"MASTER_PORT": "29503", "RANK": "1", "A": "b"}
    assert single_environment(launch | {"LOCAL_RANK": "0"}) == {"A": "b"}


def test_two_processes_train_together_and_one_does_the_rest(
    tmp_path: Path, tiny_folder: Path
) -> None:
    student, text, work = (
        save_tiny_model(tmp_path / "s", n_layers=2),
        tmp_path / "t.txt",
        tmp_path / "w",
    )
    text.write_text("\n\n\n".join(TEXTS * 12))
    # accelerate launch --multi_gpu is torchrun; on CPUs it would want mpirun.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2"]
    worker = str(Path(__file__).with_name("launched_stages.py"))
    command += [worker, str(tiny_folder), str(student), str(text), str(work)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in work.glob("seen-by-*")} == {"seen-by-0", "seen-by-1"}
    assert [
        json.loads((work / "stages" / f"after-{name}.json").read_text())["result"]
        for name in ("first", "second")
    ] == [{"rank": 0}] * 2
    # Of two processes: each step's tokens are those of eight rows.
    for name in ("first", "second"):
        log = (work / name / "training_log.jsonl").read_text().splitlines()
        assert len(log) == 2 and json.loads(log[0])["tokens"] > 4 * 31
