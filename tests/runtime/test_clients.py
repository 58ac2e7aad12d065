"""OpenAI's own clients, unchanged, against a real server: the scripts in examples/clients."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.export.checkpoint import open_checkpoint
from edgekd.runtime.server import ServeOptions
from tests.conftest import make_gguf, make_onnx, save_tiny_model
from tests.runtime.serving import TOOL_TEMPLATE, Serving, serving

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
KEY = "a key"


@pytest.fixture(scope="module", params=[make_gguf, make_onnx])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    folder = save_tiny_model(tmp_path_factory.mktemp("clients") / "tiny")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TOOL_TEMPLATE}))
    model = request.param(open_checkpoint(folder), "f32", tmp_path_factory.mktemp("artifact"))
    with serving(model, ServeOptions(alias="tiny", api_key=KEY), context_tokens=512) as found:
        yield found


def run(command: list[str], server: Serving) -> None:
    done = subprocess.run(
        [*command, server.url + "/v1", KEY], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 8, done.stdout


def test_openais_python_client_works_unchanged(server: Serving) -> None:
    run([sys.executable, str(CLIENTS / "client.py")], server)


def test_openais_javascript_client_works_unchanged(server: Serving) -> None:
    node = shutil.which("node")
    if not (node and (CLIENTS / "node_modules").is_dir()):
        pytest.skip("needs node, and npm ci in examples/clients")
    run([node, str(CLIENTS / "client.mjs")], server)
