"""An endpoint that drops the connection in the middle of ``cache`` and of ``answer``."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TEXTS
from tests.faults.forks import Outcome, Zygote, zygote

QUESTIONS = [f"What is {number}?" for number in range(6)]


@pytest.fixture(scope="module")
def commands() -> Iterator[Zygote]:
    with zygote() as process:
        yield process


class FlakyServer(ThreadingHTTPServer):
    """A server that answers ``healthy`` requests whole, and hangs up on later ones."""

    healthy = 10_000
    drops = "before the answer"

    def __init__(self) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.n_asked = 0


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does."""

    server: FlakyServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.n_asked += 1
        body = json.dumps({"choices": [answer_to(request)]}).encode()
        is_whole = self.server.n_asked <= self.server.healthy
        self.close_connection = not is_whole
        if not is_whole and self.server.drops == "before the answer":
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if is_whole else body[: len(body) // 2])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with FlakyServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a model would say that always finds the same two tokens likeliest."""
    if "messages" in request:
        return {"message": {"content": f"You asked: {request['messages'][-1]['content']}"}}
    likeliest = {"3": {"logprob": -0.1}, "4": {"logprob": -2.5}}
    return {"text": "", "prompt_logprobs": [None] + [likeliest] * (len(request["prompt"]) - 1)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what both commands read."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "text.txt").write_text("\n\n\n".join(TEXTS * 3), "utf-8")
    lines = [json.dumps({"prompt": question}) for question in QUESTIONS]
    (folder / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


COMMANDS = {
    "cache": ["cache", "--data", "text.txt", "--row-tokens", "32", "--tokenizer", "TINY"],
    "answer": ["answer", "prompts.jsonl", "--max-tokens", "8"],
}


@pytest.mark.parametrize("drops", ["before the answer", "within the answer"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_lost_endpoint_is_one_line_and_the_same_command_goes_on(
    name: str,
    drops: str,
    place: Path,
    tiny_folder: Path,
    commands: Zygote,
    server: FlakyServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    argv = [str(tiny_folder) if word == "TINY" else word for word in COMMANDS[name]]
    argv += ["--teacher", server.url, "--model", "tiny", "--quiet", "--out"]

    def run(*argv: str) -> Outcome:
        return commands.run(list(argv), place, tmp_path_factory.mktemp("scratch"))

    assert run(*argv, "whole").code == 0
    n_requests, server.n_asked = server.n_asked, 0
    server.healthy, server.drops = 2, drops
    lost = run(*argv, "cut")
    assert (server.n_asked, lost.code, lost.orphans) == (3, 1, [])
    (line,) = lost.stderr.splitlines()
    assert line.startswith(f"edgekd: tiny at {server.url} failed: ")
    if name == "cache":
        assert "not finished" in run("cache", "inspect", "cut").stderr

    server.n_asked, server.healthy = 0, 10_000
    assert run(*argv, "cut").code == 0
    assert contents(place / "cut") == contents(place / "whole")
    if name == "answer":  # what was answered is not asked again
        assert server.n_asked == n_requests - 2


def contents(out: Path) -> list[bytes]:
    """Return the bytes of the answers, or of the shards."""
    return [path.read_bytes() for path in sorted(out.glob("*.safetensors"))] or [out.read_bytes()]
