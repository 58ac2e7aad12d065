"""Loading a model for a benchmark: what the engine needs for it, and what comes on top."""

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.devices.reading import Reading
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.page_cache import drop, is_cold, model_files, resident_share

_LIBRARIES = {
    ModelKind.GGUF: "llama_cpp",
    ModelKind.ONNX: "onnxruntime",
    ModelKind.CHECKPOINT: "transformers",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """How long a model took to its first token, in a fresh process."""

    wanted: str
    """``cold`` or ``warm``."""
    cold: bool | None
    """Whether the file was out of memory; None where the system does not tell."""
    cold_reason: str | None
    """Why a cold start could not be had; None where it was, or none was wanted."""
    resident_share: Reading
    """Of the model's pages, right before loading."""
    import_s: float
    """Of the engine's library."""
    load_s: float
    """Until the engine can run."""
    first_token_s: float
    """Of one prompt token, right after loading: reads whatever loading left on disk."""
    process_to_first_token_s: float
    """From the start of the process, import and load included."""
    user_s: float
    """Processor time in user mode until then."""
    own_user_s: float
    """The part of ``user_s`` that is neither the engine's import, nor its load, nor its run."""


class _EngineTime:
    """Adds up wall and user time of what the engine does."""

    def __init__(self) -> None:
        self.user_s = 0.0
        self.wall_s: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        wall_s, user_s = time.perf_counter(), user_seconds()
        yield
        self.wall_s[name] = time.perf_counter() - wall_s
        self.user_s += user_seconds() - user_s


def start_model(
    model: str,
    context_tokens: int,
    n_threads: int,
    *,
    cold: bool,
    spawned_s: float,
    provider: str = "cpu",
    require_npu: bool = False,
) -> tuple[LoadedModel, Start]:
    """Return ``model`` loaded in this fresh process, and how long it took to its first token.

    ``spawned_s`` is time.monotonic() of the parent when it started this process.

    Raises:
        EdgekdError: the model cannot be loaded or run.
    """
    kind, path = locate_model(model)
    files = model_files(path)
    reason = drop(files) if cold else None
    share = resident_share(files)
    if cold and reason is None and is_cold(share) is False:
        reason = f"{share.value:.0%} of its pages stayed in memory; another process may map it"
    engine_time = _EngineTime()
    with engine_time.span("import"):
        _import_library(kind)
    with engine_time.span("load"):
        loaded = open_model(
            path,
            context_tokens=context_tokens,
            n_threads=n_threads,
            provider=provider,
            require_npu=require_npu,
        )
    with engine_time.span("first"):
        loaded.engine.forward([0])
    to_first_s, user_s = time.monotonic() - spawned_s, user_seconds()
    loaded.engine.rewind()
    return loaded, Start(
        wanted="cold" if cold else "warm",
        cold=is_cold(share),
        cold_reason=reason,
        resident_share=share,
        import_s=engine_time.wall_s["import"],
        load_s=engine_time.wall_s["load"],
        first_token_s=engine_time.wall_s["first"],
        process_to_first_token_s=to_first_s,
        user_s=user_s,
        own_user_s=max(0.0, user_s - engine_time.user_s),
    )


def user_seconds() -> float:
    """Return the processor time of this process in user mode, all threads."""
    import os

    return os.times().user


def mapped_bytes(path: Path) -> Reading:
    """Return how many bytes of the model at ``path`` are mapped and in memory."""
    import psutil

    unit, source = "bytes", "psutil memory_maps"
    try:
        maps: list[Any] = psutil.Process().memory_maps(grouped=True)
    except (psutil.Error, AttributeError, NotImplementedError, OSError) as error:
        return Reading.unavailable(unit, source, f"this system does not tell: {error}")
    files = {str(file.resolve()) for file in model_files(path)}
    return Reading.measured(sum(m.rss for m in maps if m.path in files), unit, source)


def _import_library(kind: ModelKind) -> None:
    """Import what open_model will, whose own message says what is missing."""
    try:
        importlib.import_module(_LIBRARIES[kind])
    except ImportError:
        return
