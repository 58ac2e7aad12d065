"""The blocks marked ``<!-- run -->`` and its kin, run as they are typed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.server import ServeOptions
from tests.conftest import make_gguf, save_tiny_model
from tests.docs.pages import PAGES, ROOT, Block, name_of, split
from tests.docs.warm import write_program
from tests.runtime.serving import TOOL_TEMPLATE, serving

WRITTEN_URL = "http://127.0.0.1:8080"
# An answer that is no success fails its block; so does a pipe whose first part failed.
BEFORE = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 60 "$@"; }\n'
KL_ROW = re.compile(r"KL to teacher, nats +│ +(?P<untaught>[\d.]+) ±[^│]*│ +(?P<taught>[\d.]+) ±")
RUNNABLE = {"run"} | ({"run: qnn"} if find_spec("onnxruntime_qnn") else set())
TUTORIAL = ROOT / "docs" / "tutorial.md"
FROM_NOTHING = {"README.md", "docs/distill.md"}  # a newcomer may begin with any of these
TYPED = [page for page in PAGES if any(block.mark in RUNNABLE for block in split(page)[0])]
ASKED = [each for page in PAGES for each in split(page)[0] if each.mark == "run: server"]
LIMIT_S = 600


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One in which ``edgekd`` and ``python`` are those that run the tests, and no hub answers."""
    folder = tmp_path_factory.mktemp("bin")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # threads of OpenMP do not live through a fork
        "TOKENIZERS_PARALLELISM": "false",
    }
    address = folder / "socket"
    for name in ("edgekd", "python"):
        write_program(folder / name, address)
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests/docs/warm.py"), str(address)],
        stdout=subprocess.PIPE,
        env=found,
        start_new_session=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        yield found
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model whose chat template knows tools, served."""
    folder = save_tiny_model(tmp_path_factory.mktemp("docs") / "tiny")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"chat_template": TOOL_TEMPLATE}
    config.write_text(json.dumps(settings))
    model = make_gguf(open_checkpoint(folder), "f32", tmp_path_factory.mktemp("gguf"))
    with serving(model, ServeOptions(alias="tiny"), context_tokens=512) as server:
        yield server.url


def make_place(folder: Path) -> Path:
    """Make ``folder``, in which one types: of a clone it has what pages name."""
    folder.mkdir()
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def type_page(page: Path, folder: Path, environment: dict[str, str]) -> str:
    """Return what all blocks of ``page`` print, typed into one shell from top to bottom."""
    blocks = [block for block in split(page)[0] if block.mark in RUNNABLE]
    script = "\n".join(f"echo '== {block}' >&2\n{block.text}" for block in blocks)
    done = subprocess.run(
        ["bash", "-c", BEFORE + script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout[-2000:] + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def after_tutorial(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> tuple[Path, str]:
    """The folder in which the tutorial was typed, beside a link to the examples; what it said."""
    folder = make_place(tmp_path_factory.mktemp("here") / "tutorial")
    return folder, type_page(TUTORIAL, folder, environment)


def test_some_blocks_are_run() -> None:
    """Or the tests below would pass as there are none."""
    pages = {name_of(page) for page in TYPED}
    guides = {"tutorial", "distill", "export", "eval", "grid", "report", "serve", "commands"}
    assert {"README.md", *(f"docs/{name}.md" for name in guides)} <= pages
    assert {"docs/serve.md"} == {name_of(block.page) for block in ASKED} and len(ASKED) > 3


@pytest.mark.parametrize("block", ASKED, ids=str)
def test_what_is_asked_of_a_server_is_answered(
    block: Block, url: str, environment: dict[str, str]
) -> None:
    assert WRITTEN_URL in block.text
    script = block.text.replace(WRITTEN_URL, url)
    if block.language == "bash":
        command = ["bash", "-c", BEFORE + script]
    else:
        command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr


def test_the_student_of_the_tutorial_came_nearer(after_tutorial: tuple[Path, str]) -> None:
    """It says so, after commands that all worked."""
    row = KL_ROW.search(after_tutorial[1])
    assert row and float(row["taught"]) < float(row["untaught"]) / 2


@pytest.mark.parametrize("page", [page for page in TYPED if page != TUTORIAL], ids=name_of)
def test_what_is_typed_works(
    page: Path, environment: dict[str, str], after_tutorial: tuple[Path, str], tmp_path: Path
) -> None:
    """A page begins with the folder that the tutorial left, or with nothing."""
    folder = tmp_path / "here"
    if name_of(page) in FROM_NOTHING:
        folder = make_place(folder)
    else:
        shutil.copytree(after_tutorial[0], folder, symlinks=True)
    type_page(page, folder, environment)
