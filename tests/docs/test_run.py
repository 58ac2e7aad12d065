"""The blocks marked ``<!-- run -->`` and ``<!-- run: server -->``, run as they are typed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.server import ServeOptions
from tests.conftest import make_gguf, save_tiny_model
from tests.docs.pages import PAGES, ROOT, Block, name_of, split
from tests.runtime.serving import TOOL_TEMPLATE, serving

WRITTEN_URL = "http://127.0.0.1:8080"
# An answer that is no success fails its block; so does a pipe whose first part failed.
BEFORE = 'set -euo pipefail\ncurl() { command curl --fail-with-body --max-time 60 "$@"; }\n'
KL_ROW = re.compile(r"KL to teacher, nats +│ +(?P<untaught>[\d.]+) ±[^│]*│ +(?P<taught>[\d.]+) ±")
TYPED = [page for page in PAGES if any(block.mark == "run" for block in split(page)[0])]
ASKED = [each for page in PAGES for each in split(page)[0] if each.mark == "run: server"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which ``edgekd`` and ``python`` are those that run the tests, and no hub answers."""
    folder = tmp_path_factory.mktemp("bin")
    for name, arguments in (("edgekd", "-m edgekd"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    found = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return os.environ | found


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


def test_some_blocks_are_run() -> None:
    """Or the tests below would pass as there are none."""
    assert {"docs/tutorial.md"} <= {name_of(page) for page in TYPED}
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


@pytest.mark.parametrize("page", TYPED, ids=name_of)
def test_what_is_typed_works(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """All blocks of a page in one shell, from top to bottom, beside a link to the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = [block for block in split(page)[0] if block.mark == "run"]
    script = "\n".join(f"echo '== {block}' >&2\n{block.text}" for block in blocks)
    done = subprocess.run(
        ["bash", "-c", BEFORE + script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    if name_of(page) == "docs/tutorial.md":  # it says that the student came nearer
        row = KL_ROW.search(done.stdout)
        assert row and float(row["taught"]) < float(row["untaught"]) / 2
