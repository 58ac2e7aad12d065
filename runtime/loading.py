"""Open any model for running: engine, tokenizer and chat template together."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate, read_chat_template
from edgekd.runtime.engine import Engine
from edgekd.runtime.gguf_header import GgufHeader, read_gguf_header
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.providers import ProviderUse
from edgekd.runtime.tokenizer import FileTokenizer, Tokenizer

DEFAULT_CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run."""

    path: Path
    kind: ModelKind
    engine: Engine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    provider_use: ProviderUse | None = None
    """Of an ONNX folder alone."""


def open_model(
    model: str | Path,
    *,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    n_threads: int | None = None,
    revision: str | None = None,
    provider: str = "cpu",
    require_npu: bool = False,
) -> LoadedModel:
    """Return ``model`` on the engine that runs its kind; ``provider`` is for ONNX folders alone.

    Raises:
        ModelError: it cannot be found, read or run.
        MissingExtraError: its engine is not installed.
        RecipeError: the execution provider is not known or not installed.
        EngineError: it cannot be used, or leaves to the CPU what ``require_npu`` forbids.
    """
    kind, path = locate_model(str(model), revision)
    threads = n_threads or default_threads()
    if kind is ModelKind.ONNX:
        return _open_onnx(path, context_tokens, threads, provider, require_npu)
    opener = {ModelKind.GGUF: _open_gguf, ModelKind.CHECKPOINT: _open_checkpoint}[kind]
    return LoadedModel(path, kind, *opener(path, context_tokens, threads))


@contextmanager
def opened_model(
    model: str | Path,
    *,
    context_tokens: int,
    n_threads: int | None = None,
    provider: str = "cpu",
    require_npu: bool = False,
) -> Iterator[LoadedModel]:
    """Yield ``model``, ready to run, and free it after.

    Raises:
        EdgekdError: as ``open_model`` does.
    """
    loaded = open_model(
        model,
        context_tokens=context_tokens,
        n_threads=n_threads,
        provider=provider,
        require_npu=require_npu,
    )
    with closing(loaded.engine):
        yield loaded


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gguf_chat_template(header: GgufHeader) -> ChatTemplate | None:
    """Return the chat template in a GGUF header; none where it has none."""
    source = header.metadata.get("tokenizer.chat_template")
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    if not isinstance(source, str):
        return None
    names = {}
    for key, role in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ):
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            names[role] = tokens[token_id]
    return ChatTemplate(source, names)


_Opened = tuple[Engine, Tokenizer, ChatTemplate | None]


def _open_gguf(path: Path, context_tokens: int, n_threads: int) -> _Opened:
    from edgekd.runtime.llamacpp_engine import LlamaCppEngine, LlamaCppTokenizer

    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    trained = header.metadata.get(f"{architecture}.context_length")
    if not isinstance(trained, int):
        raise ModelError(f"{path} names no context length for its architecture {architecture!r}")
    engine = LlamaCppEngine(path, min(context_tokens, trained), n_threads)
    return engine, LlamaCppTokenizer(engine.model), gguf_chat_template(header)


def _open_onnx(
    path: Path, context_tokens: int, n_threads: int, provider: str, require_npu: bool
) -> LoadedModel:
    from edgekd.runtime.npu_engine import NpuEngine
    from edgekd.runtime.onnx_engine import OnnxEngine
    from edgekd.runtime.static_model import is_static

    kind = NpuEngine if is_static(path) else OnnxEngine
    engine = kind(path, context_tokens, n_threads, provider, require_npu=require_npu)
    tokenizer, template = FileTokenizer(path), read_chat_template(path)
    return LoadedModel(path, ModelKind.ONNX, engine, tokenizer, template, engine.provider_use)


def _open_checkpoint(path: Path, context_tokens: int, n_threads: int) -> _Opened:
    from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

    model = load_causal_lm(path)
    import torch

    torch.set_num_threads(n_threads)
    return TorchEngine(model, context_tokens), FileTokenizer(path), read_chat_template(path)
