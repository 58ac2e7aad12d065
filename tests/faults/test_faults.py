"""A part of the fault matrix; ``scripts/faults`` runs the whole of it."""

from collections.abc import Iterator

import pytest

from tests.faults.commands import make_world
from tests.faults.forks import zygote
from tests.faults.matrix import Cell, Runner, cells

# What is quick and breaks most easily; every command is in it, and every fault.
SHORT = {
    "prune": {"SIGKILL", "full disk", "cut short", "no memory"},
    "distill": {"full disk", "read-only disk"},
    "distill --cache": {"wrong type"},
    "cache": {"SIGKILL", "full disk", "cut short", "read-only disk"},
    "answer": {"SIGKILL", "read-only disk", "cut short", "no network"},
    "cache inspect": {"flipped bit"},
    "export --format gguf": {"SIGKILL", "file-size limit", "read-only disk", "no network"},
    "export --format onnx": {"full disk", "wrong type", "flipped bit"},
    "verify": {"flipped bit", "cut short", "read-only disk"},
    "verify (onnx)": {"flipped bit"},
    "eval": {"full disk", "cut short"},
    "bench": {"read-only disk", "no sensors"},
    "bench (onnx)": {"cut short"},
    "bench compare": {"cut short", "wrong type"},
    "report": {"SIGKILL", "read-only disk", "wrong type"},
    "serve": {"SIGKILL", "wrong type"},
    "chat": {"cut short", "no network"},
    "devices fit": {"flipped bit", "no sensors"},
    "devices detect": {"no sensors", "no memory"},
    "devices list": {"read-only disk", "no sensors"},
    "devices show": {"no network"},
    "package": {"SIGKILL", "full disk", "flipped bit", "wrong type"},
    "doctor": {"no sensors", "no network"},
    "demo": {"read-only disk", "no network"},
}
CELLS = [cell for cell in cells() if cell.fault in SHORT[cell.command.name]]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with zygote() as process:
        yield Runner(process, make_world(tmp_path_factory.mktemp("world"), process))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_fault_costs_one_line_and_no_file(cell: Cell, runner: Runner) -> None:
    verdict = runner.run(cell)
    if verdict.state == "not possible here":
        pytest.skip(verdict.said)
    assert verdict.state == "good", verdict.said
