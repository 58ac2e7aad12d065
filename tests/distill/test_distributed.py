"""The same run on one process, on several, and cut into micro-batches and chunks in any way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.distill.cache import capture
from edgekd.distill.distill import distill
from edgekd.distill.recipe import Job, Recipe
from tests.conftest import TEXTS, save_tiny_model
from tests.distill.capture_worker import SETTINGS

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a text."""
    folder = tmp_path_factory.mktemp("distributed")
    save_tiny_model(folder / "student", seed=1, n_layers=2)
    text = "\n\n\n".join(f"{number} {text}" for number, text in enumerate(TEXTS * 12))
    (folder / "text.txt").write_text(text)
    return folder


def _recipe(**changes: object) -> Recipe:
    settings = {"steps": STEPS, "row_tokens": 32, "learning_rate": 1e-3, "precision": "fp32"}
    return Recipe(**(settings | changes))  # type: ignore[arg-type]


def _losses(out: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (out / "training_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(folder: Path, tiny_folder: Path) -> list[float]:
    """The losses of one process with eight rows a step."""
    return _run(folder, tiny_folder, _recipe(rows_per_step=8), "plain")


def _run(folder: Path, teacher: Path, recipe: Recipe, name: str) -> list[float]:
    job = Job(
        teacher=str(teacher),
        student=str(folder / "student"),
        data=[str(folder / "text.txt")],
        recipe=recipe,
    )
    distill(job, folder / name)
    return _losses(folder / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_per_step": 1, "accumulation_steps": 8},
        {"rows_per_step": 8, "chunk_tokens": 16},
        {"rows_per_step": 8, "chunk_tokens": 128},
        {"rows_per_step": 8, "chunk_tokens": 1024},
        {"rows_per_step": 8, "gradient_checkpointing": True},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_how_a_step_is_cut_changes_nothing(
    changes: dict[str, object], plain: list[float], folder: Path, tiny_folder: Path
) -> None:
    name = "-".join(map(str, changes.values()))
    assert _run(folder, tiny_folder, _recipe(**changes), name) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("n_processes", [2, 4])
def test_several_processes_train_as_one(
    n_processes: int, plain: list[float], folder: Path, tiny_folder: Path
) -> None:
    out = folder / f"of-{n_processes}"
    arguments = ["--teacher", str(tiny_folder), "--student", str(folder / "student")]
    arguments += ["--data", str(folder / "text.txt"), "--out", str(out), "--steps", str(STEPS)]
    arguments += ["--row-tokens", "32", "--learning-rate", "1e-3", "--precision", "fp32"]
    arguments += ["--rows-per-step", str(8 // n_processes), "--json"]
    found = _torchrun("-m", "edgekd", "distill", *arguments, n_processes=n_processes)
    assert json.loads(found.stdout.splitlines()[-1])["steps"] == STEPS
    assert found.stdout.count("fastest_step_s") == 1  # one of them speaks
    assert _losses(out) == pytest.approx(plain, rel=1e-3)


def test_sharded_weights_train_as_copied_and_as_whole_ones(folder: Path, tiny_folder: Path) -> None:
    worker = Path(__file__).with_name("sharded_worker.py")
    arguments = [str(tiny_folder), str(folder / "student"), str(folder / "text.txt")]

    def losses(way: str, n: int) -> list[float]:
        lines = _torchrun(str(worker), *arguments, way, n_processes=n).stdout.splitlines()
        found: list[float] = json.loads(lines[-1])
        return found

    whole = losses("whole", 1)
    assert len(whole) == STEPS and whole[-1] < whole[0]
    for way, n_processes in (("copied", 2), ("sharded", 2), ("sharded", 4)):
        assert losses(way, n_processes) == pytest.approx(whole, rel=1e-3)


def test_ranks_share_a_capture_and_end_with_the_bytes_of_one(
    folder: Path, tiny_folder: Path
) -> None:
    text, one, shared = (folder / name for name in ("text.txt", "one-cache", "shared-cache"))
    capture(str(tiny_folder), [str(text)], one, SETTINGS)
    worker = Path(__file__).with_name("capture_worker.py")
    _torchrun(str(worker), str(tiny_folder), str(text), str(shared), n_processes=2)
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert len(files) > 4  # several shards, or there is nothing to share
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == files


def _torchrun(*arguments: str, n_processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n_processes), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return found
