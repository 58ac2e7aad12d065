"""Execution providers: found, registered and asked what they really took.

ONNX Runtime lets a provider fail in silence: it logs a line, runs everything on the CPU, and
``get_providers()`` still names the provider. So nothing is believed here but the session's own
list of which node went where (``get_provider_graph_assignment_info``).

    session = create_session(path, "qnn", n_threads=2, require_npu=True)
    placement(session)    # {"QNNExecutionProvider": 110}
"""

import importlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgekd.devices.backends import BACKENDS, Label
from edgekd.errors import EngineError, MissingExtraError, ModelError, RecipeError
from edgekd.runtime.onnx_check import check_onnx

CPU = "CPUExecutionProvider"
_SUFFIX = "ExecutionProvider"
_ARM = ("aarch64", "arm64")
_ERRORS = 3


@dataclass(frozen=True)
class Provider:
    """One execution provider that edgekd knows by a short name."""

    full_name: str
    """As ONNX Runtime calls it; plugins are registered under this name too.

    QNN's plugin takes the name it is registered by for its own.
    """
    plugin: str | None = None
    """Python package that brings it as a plugin; None where it is built in or not at all."""
    pip_name: str | None = None
    """The package to install."""
    options: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    """Of the session."""


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider(CPU, pip_name=BACKENDS["cpu"].package),
    "qnn": Provider(
        "QNNExecutionProvider",
        "onnxruntime_qnn",
        BACKENDS["qnn"].package,
        {"backend_type": "htp"},  # left out, the plugin looks for a library that is not there
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider", "onnxruntime_ep_openvino", BACKENDS["openvino"].package
    ),
    "webgpu": Provider(
        "WebGpuExecutionProvider",
        "onnxruntime_ep_webgpu",
        BACKENDS["webgpu"].package,
        # In its own layout, onnxruntime-webgpu 1.27 leaves its nodes out of the list of who took
        # what, as if it had taken none; layouts are of images, so nothing else changes.
        entries={"ep.webgpuexecutionprovider.preferredLayout": "NCHW"},
    ),
    "cuda": Provider("CUDAExecutionProvider", pip_name=BACKENDS["cuda"].package),
    "tensorrt": Provider("TensorrtExecutionProvider", pip_name=BACKENDS["tensorrt"].package),
    "coreml": Provider("CoreMLExecutionProvider", pip_name=BACKENDS["coreml"].package),
}
_AUTO = ("cuda", "coreml")
"""What ``auto`` takes before the CPU, where this ONNX Runtime has it built in."""
_SPIN_US = 1000  # longer than what lies between two tokens


def choose(name: str) -> str:
    """Return the short name that ``name`` stands for: ``auto`` becomes what is installed.

    Raises:
        RecipeError: no such provider is known, here or to this ONNX Runtime.
    """
    built_in = _built_in()
    if name == "auto":
        return next((each for each in _AUTO if each in built_in), "cpu")
    short = name.removesuffix(_SUFFIX).lower()
    if short not in PROVIDERS and short not in built_in:
        known = ", ".join(sorted({*PROVIDERS, *built_in}))
        raise RecipeError(f"execution provider {name!r} is unknown; known are auto, {known}")
    return short


def create_session(
    path: Path,
    provider: str,
    *,
    n_threads: int,
    require_npu: bool = False,
    options: Mapping[str, str] | None = None,
    entries: Mapping[str, str] | None = None,
    log_severity: int = _ERRORS,
) -> Any:
    """Return a session of the model at ``path`` on ``provider``; the CPU runs what that does not.

    ``options`` are the provider's, ``entries`` the session's; ``log_severity`` is ONNX Runtime's,
    from 0 for everything to 4. With ``require_npu`` nothing may be
    left to the CPU.

    Raises:
        RecipeError: the provider is not known or not installed.
        MissingExtraError: ONNX Runtime itself is not.
        EngineError: it cannot be loaded, has no device, took nothing, or left nodes to the CPU
            where ``require_npu`` forbids it.
        ModelError: the file is not sound, or ONNX Runtime refuses the model.
    """
    check_onnx(path)
    ort = _import_ort()
    short = choose(provider)
    settings = _session_options(ort, n_threads, log_severity)
    known = PROVIDERS.get(short) or Provider(_built_in()[short])
    for key, value in (dict(known.entries) | dict(entries or {})).items():
        settings.add_session_config_entry(key, value)
    devices = _attach(settings, short, known, dict(known.options) | dict(options or {}))
    try:
        session = ort.InferenceSession(str(path), settings, providers=devices)
    except Exception as error:  # the library raises a family without a common base
        where = "" if short == "cpu" else f" with --ep {short}"
        raise ModelError(f"ONNX Runtime cannot load {path}{where}: {_first_line(error)}") from error
    if short != "cpu":
        _check_placement(session, path, short, known.full_name, require_npu)
    elif require_npu:
        raise EngineError("the CPU is no NPU; choose --ep qnn or another, or leave --require-npu")
    return session


_ENGINES = {"llama.cpp": "llamacpp", "onnxruntime": "cpu"}
"""Name in reports to that in BACKENDS, where no provider is named."""


@dataclass(frozen=True, kw_only=True)
class ProviderUse:
    """Which provider ran an ONNX folder, by the word of its sessions."""

    name: str
    """As ``--ep`` takes it."""
    label: Label
    """How far edgekd's exports were seen to run on it."""
    is_emulated: bool
    """Whether an emulator ran it, whose time says nothing about the chip."""
    nodes: dict[str, dict[str, int]]
    """Graph to provider to the number of its nodes."""


def is_emulated(provider: str) -> bool:
    """Whether ``provider`` is QNN as the emulator in its x86 package, and no chip."""
    return provider == "qnn" and platform.machine().lower() not in _ARM


def engine_name(provider: str) -> str:
    """Return the name in reports, from which nobody can take an emulator for a chip."""
    if provider == "cpu":
        return "onnxruntime"
    return f"onnxruntime {provider}{' emulator' if is_emulated(provider) else ''}"


def label_of_engine(name: str) -> Label:
    """Return how far edgekd's exports were seen to run on what reports call ``name``."""
    first, *rest = name.split()
    backend = rest[0] if rest else _ENGINES.get(first, first)
    return BACKENDS[backend].label if backend in BACKENDS else "untested"


def describe_use(sessions: Mapping[str, Any], provider: str) -> ProviderUse:
    """Return what ran the graphs of ``sessions``, which were made for ``provider``."""
    return ProviderUse(
        name=provider,
        label=label_of_engine(engine_name(provider)),
        is_emulated=is_emulated(provider),
        nodes={graph: placement(session) for graph, session in sessions.items()},
    )


def placement(session: Any) -> dict[str, int]:
    """Return how many nodes of the optimized graph each provider runs."""
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(list(part.get_nodes()))
    return counts


def nodes_of(session: Any) -> dict[str, tuple[str, str]]:
    """Return provider and operator of every node of the optimized graph, by its name."""
    return {
        node.name: (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }


def register(known: Provider) -> list[Any]:
    """Load the plugin of ``known`` unless it is loaded, and return its devices.

    Raises:
        RecipeError: the package is not installed.
        EngineError: its library cannot be loaded, or finds no device.
    """
    ort = _import_ort()
    if not (devices := _devices(ort, known)):
        if known.plugin is None or find_spec(known.plugin) is None:
            raise RecipeError(
                f"{known.full_name} is not installed; run: pip install {known.pip_name}"
            )
        try:
            library = importlib.import_module(known.plugin).get_library_path()
            ort.register_execution_provider_library(known.full_name, library)
        except Exception as error:  # the library raises a family without a common base
            raise EngineError(
                f"{known.full_name} cannot be loaded: {_first_line(error)}; install "
                f"{known.pip_name} again, or use --ep cpu"
            ) from error
        devices = _devices(ort, known)
    if not devices:
        raise EngineError(f"{known.full_name} finds no device on this machine; use --ep cpu")
    return devices


def _attach(settings: Any, short: str, known: Provider, options: dict[str, str]) -> list[Any]:
    """Tell ``settings`` the provider if it is a plugin; return the list for a built-in one."""
    if short == "cpu":
        return [CPU]
    if short in _built_in():
        return [(_built_in()[short], options), CPU]
    # A plugin that is named in this list instead is left out without a word.
    settings.add_provider_for_devices(register(known)[:1], options)
    return []


def _check_placement(
    session: Any, path: Path, short: str, full_name: str, require_npu: bool
) -> None:
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise EngineError(
            f"this ONNX Runtime does not tell what --ep {short} took, so it cannot be trusted with "
            f"{path.name}; install onnxruntime 1.24 or later, or use --ep cpu"
        )
    nodes = nodes_of(session)
    if not any(provider == full_name for provider, _ in nodes.values()):
        raise EngineError(
            f"--ep {short} took no node of {path.name}: it could not start, or knows none of its "
            "operators; use --ep cpu"
        )
    left = {name: op for name, (provider, op) in nodes.items() if provider == CPU}
    if require_npu and left:
        some = ", ".join(sorted(set(left.values())))
        raise EngineError(
            f"--require-npu: {len(left)} of {len(nodes)} nodes of {path.name} would run on the CPU "
            f"({some}); export for the NPU with: edgekd export MODEL --format onnx --target qnn"
        )


def _session_options(ort: Any, n_threads: int, log_severity: int) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = n_threads
    settings.inter_op_num_threads = 1
    # Waking threads for every operator slows a small model down, so they spin; from one token to
    # the next, but no longer, which would starve what else the machine does.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings.log_severity_level = log_severity
    return settings


def _devices(ort: Any, known: Provider) -> list[Any]:
    return [each for each in ort.get_ep_devices() if each.ep_name == known.full_name]


@cache
def _built_in() -> dict[str, str]:
    """Return the providers inside this ONNX Runtime, short name to full.

    Asked once, before any plugin is loaded: afterwards plugins are in the list, but a session that
    asks for them by name runs on the CPU without a word.
    """
    found = _import_ort().get_available_providers()
    return {name.removesuffix(_SUFFIX).lower(): name for name in found}


def _import_ort() -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    return ort


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
