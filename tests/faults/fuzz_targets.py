"""What is fuzzed: everything that reads bytes of a stranger. A target returns, or raises a finding.

Each takes bytes and may refuse them with an EdgekdError, which a user sees as one line, or as a
4xx answer; any other exception is a defect. The fuzzer (fuzz_child.py) and the replay of its
corpus (test_corpus.py) call the same functions.
"""

import asyncio
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError

Target = Callable[[bytes], None]
NAMES = ("gguf", "onnx", "manifest", "recipe", "cache", "http")
"""Every target, in the order in which they are run."""
INSTRUMENTED = {
    "gguf": ["edgekd.runtime", "edgekd.export.from_gguf", "edgekd.export.pretokenizer"],
    "onnx": ["edgekd.runtime"],
    "manifest": ["edgekd.manifest", "edgekd.lineage"],
    "recipe": ["edgekd.distill.recipe", "tomllib"],
    "cache": ["edgekd.distill"],
    "http": ["edgekd.runtime"],
}
"""Modules whose branches guide the fuzzer."""


@contextmanager
def open_target(name: str) -> Iterator[Target]:
    """Yield the target ``name``, with what it needs set up."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if name == "http":
            with _http(Path(folder)) as target:
                yield target
            return
        run = {
            "gguf": _gguf,
            "onnx": _onnx,
            "manifest": _manifest,
            "recipe": _recipe,
            "cache": _cache,
        }[name]()
        place = Path(folder)

        def target_of(data: bytes) -> None:
            with suppress(EdgekdError):
                run(data, place)

        yield target_of


Runner = Callable[[bytes, Path], None]


def _gguf() -> Runner:
    """Return the header, and all that is read out of it before an engine opens the file."""
    from edgekd.export.from_gguf import gguf_to_checkpoint
    from edgekd.runtime.gguf_header import read_gguf_header
    from edgekd.runtime.loading import gguf_chat_template
    from edgekd.runtime.model_facts import read_facts
    from edgekd.runtime.model_kind import ModelKind
    from edgekd.runtime.model_workload import read_workload

    def run(data: bytes, folder: Path) -> None:
        path = folder / "model.gguf"
        path.write_bytes(data)
        header = read_gguf_header(path)
        for tensor in header.tensors:
            assert 0 < tensor.offset_bytes <= len(data) - tensor.size_bytes
        for read in (
            lambda: read_workload(str(path)),
            lambda: read_facts(ModelKind.GGUF, path),
            lambda: gguf_chat_template(header),
            lambda: gguf_to_checkpoint(path, folder / "checkpoint"),
        ):
            with suppress(EdgekdError):
                read()

    return run


def _onnx() -> Runner:
    """Return what is looked at before ONNX Runtime opens a file, and what sizes are read from."""
    from edgekd.runtime.model_workload import read_workload
    from edgekd.runtime.onnx_check import check_onnx
    from edgekd.runtime.onnx_header import read_onnx_header

    config = {
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "vocab_size": 300,
    }

    def run(data: bytes, folder: Path) -> None:
        path = folder / "model.onnx"
        path.write_bytes(data)
        (folder / "weights.bin").write_bytes(bytes(64))  # a seed names it
        (folder / "config.json").write_text(json.dumps(config))
        with suppress(EdgekdError):
            check_onnx(path)
        header = read_onnx_header(path)
        assert all(tensor.size_bytes >= 0 for tensor in header.tensors)
        read_workload(str(folder))

    return run


def _manifest() -> Runner:
    from edgekd.lineage import render, walk
    from edgekd.manifest import check_files, read_manifest

    def run(data: bytes, folder: Path) -> None:
        result = folder / "result"
        result.mkdir(exist_ok=True)
        (result / "edgekd.json").write_bytes(data)
        (result / "model.safetensors").write_bytes(b"weights")
        manifest = read_manifest(result / "edgekd.json")
        with suppress(EdgekdError):
            check_files(result, manifest)
        render(walk(result))

    return run


def _recipe() -> Runner:
    from edgekd.distill.recipe import resolve_job, write_recipe

    def run(data: bytes, folder: Path) -> None:
        path = folder / "recipe.toml"
        path.write_bytes(data)
        job = resolve_job(path, {"student": "s", "data": ["d"]})
        write_recipe(path, job)
        assert resolve_job(path, {}) == job  # what was resolved reads back as the same

    return run


def _cache() -> Runner:
    """Return a reader of a cache whose hashes fit: its author is the stranger."""
    from safetensors.numpy import load

    from edgekd.distill.cache import inspect
    from edgekd.distill.cache_codec import decode
    from edgekd.distill.cache_format import LogitCache

    def run(data: bytes, folder: Path) -> None:
        if not data:
            return
        index = json.loads((_CORPUS / "cache" / "index.json").read_text())
        shard = folder / "shard-00000.safetensors"
        if data[0] == _IS_INDEX[0]:
            (folder / "cache.json").write_bytes(data[1:])
            shard.write_bytes((_CORPUS / "cache" / "shard").read_bytes()[1:])
        else:
            shard.write_bytes(data[1:])
            index["shards"][0]["sha256"] = hashlib.sha256(data[1:]).hexdigest()
            (folder / "cache.json").write_text(json.dumps(index))
        inspect(folder)
        cache = LogitCache(folder)
        temperatures = cache.identity.temperatures
        decode(cache.shard_records(0), temperatures, temperatures[-1])
        for key in load(shard.read_bytes())["keys"][:4]:
            decode(cache.read(key.tobytes()), temperatures, 1.0)

    return run


_CORPUS = Path(__file__).with_name("corpus")
_IS_INDEX = b"{"


@contextmanager
def _http(folder: Path) -> Iterator[Target]:
    """Yield a target that asks a server in this process, whose engine runs a tiny model."""
    import httpx

    from edgekd.runtime.batch_engine import EngineOptions
    from edgekd.runtime.engine_process import EngineProcess
    from edgekd.runtime.engine_worker import WorkerSettings
    from edgekd.runtime.server import ServeOptions, create_app
    from tests.faults.http_requests import request_of
    from tests.faults.seeds import save_small_model

    model = save_small_model(folder)
    options = EngineOptions(context_tokens=64, n_slots=2, n_threads=1)
    with EngineProcess(WorkerSettings(model=str(model), options=options, max_waiting=8)) as engine:
        app = create_app(engine, ServeOptions(alias="tiny", timeout_s=20))
        loop = asyncio.new_event_loop()
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080"
        )

        def target(data: bytes) -> None:
            route, body = request_of(data)
            headers = {"Content-Type": "application/json"}
            answer = loop.run_until_complete(client.post(route, content=body, headers=headers))
            check_answer(answer.status_code, answer.content)
            assert engine.restarts == 0, "the engine died"

        try:
            yield target
        finally:
            loop.run_until_complete(client.aclose())
            loop.close()


def check_answer(status: int, content: bytes) -> None:
    """Fail unless the answer is a reply, or says what is wrong with the request."""
    assert status < 500, f"status {status}: {content[:200]!r}"
    if status >= 400:
        error: Any = json.loads(content)["error"]
        assert error["message"]
