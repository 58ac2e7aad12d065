"""INT4 exports on OpenVINO and WebGPU: placement of every node, and distance from the CPU.

    python benchmarks/providers.py --out benchmarks/results/providers.json
    python benchmarks/providers.py --ep webgpu --model student-int4-onnx --out providers.json

Each provider gets a virtual environment of its own, since its package brings an ONNX Runtime of its
own. WebGPU runs on SwiftShader, a Vulkan in software, which lies in Debian's Chromium: it is
unpacked into the working folder, nothing is installed. A tiny model is exported as the CPU's INT4
folder (any shape, fp32) and as the NPU's (fixed shapes, fp16); with --model, that folder runs too.
What cannot be run says "unavailable" and why. NOT measured: speed, which a GPU in software has none
of. Needs the extras [export,onnx]; 120 MB of packages are fetched.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record import record

ROOT = Path(__file__).parents[1]
_PACKAGES = {"openvino": "onnxruntime-openvino", "webgpu": "onnxruntime-webgpu"}
_DEBS = ("libvulkan1", "chromium-common")
_LIMIT_S = 900.0


class UnavailableError(Exception):
    """Something that cannot be had here, with the reason."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="ONNX folder")
    parser.add_argument("--ep", choices=_PACKAGES, action="append", help="default: all")
    parser.add_argument("--work", type=Path, help="Folder to keep environments in.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgekd-providers-") as folder:
        work = (arguments.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        models = [*export_tiny(work), *(model.absolute() for model in arguments.model)]
        rows = kept_rows(arguments.out) if arguments.ep else {}
        rows |= {name: try_provider(name, models, work) for name in arguments.ep or _PACKAGES}
    record({"providers": rows}, arguments.out)


def kept_rows(out: Path | None) -> dict[str, Any]:
    """Return what ``out`` says of providers already, which --ep leaves as it is."""
    if out is None or not out.exists():
        return {}
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))["providers"]
    return found


def export_tiny(work: Path) -> list[Path]:
    """Return the tiny model as ONNX folders, exported unless they are there."""
    cpu, static = work / "tiny-int4-onnx", work / "tiny-int4-onnx-static"
    if cpu.exists() and static.exists():
        return [cpu, static]
    from edgekd.export.export_model import export_model
    from edgekd.export.to_npu import NpuOptions

    sys.path.insert(0, str(ROOT))
    from tests.conftest import save_tiny_model

    checkpoint = str(save_tiny_model(work / "tiny"))
    export_model(checkpoint, "onnx", cpu)
    npu = NpuOptions(context_tokens=128, prefill_tokens=16, emulate=False)
    export_model(checkpoint, "onnx", static, target="qnn", npu=npu)
    return [cpu, static]


def try_provider(name: str, models: list[Path], work: Path) -> dict[str, Any]:
    """Return what every one of ``models`` does on the provider, or why it is unavailable."""
    try:
        python = make_environment(name, work)
        environment = os.environ | (software_vulkan(work) if name == "webgpu" else {})
    except UnavailableError as error:
        return {"unavailable": str(error)}
    rows = {model.name: run_one(python, model, name, environment) for model in models}
    device = "SwiftShader, Vulkan in software" if name == "webgpu" else "CPU, by OpenVINO"
    return {"device": device, "date": datetime.now(UTC).date().isoformat(), "models": rows}


def make_environment(name: str, work: Path) -> Path:
    """Return the interpreter of an environment with edgekd and the provider's ONNX Runtime."""
    folder = work / f"venv-{name}"
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", folder])
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, "--editable", ROOT, "numpy", "tokenizers", _PACKAGES[name]])
    return python


def software_vulkan(work: Path) -> dict[str, str]:
    """Return the variables with which Vulkan runs on SwiftShader; what the user has set stays.

    Raises:
        UnavailableError: the packages cannot be fetched.
    """
    if "VK_ICD_FILENAMES" in os.environ:
        return {}
    if shutil.which("apt-get") is None:
        raise UnavailableError("no apt-get to fetch a Vulkan in software with")
    folder = work / "vulkan"
    folder.mkdir(exist_ok=True)
    driver = folder / "usr/lib/chromium/vk_swiftshader_icd.json"
    if not driver.is_file():
        _run(["apt-get", "download", *_DEBS], cwd=folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg-deb", "-x", package, folder])
    if not driver.is_file():
        raise UnavailableError(f"no SwiftShader in {', '.join(_DEBS)}")
    libraries = ":".join(str(path.parent) for path in folder.rglob("libvulkan.so.1"))
    return {"VK_ICD_FILENAMES": str(driver), "LD_LIBRARY_PATH": libraries}


def run_one(python: Path, model: Path, name: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return the document that benchmarks/provider_run.py prints."""
    # By its name alone, so that no message tells where it lay.
    command = [python, Path(__file__).absolute().with_name("provider_run.py"), model.name, name]
    try:
        done = _run(command, model.parent, environment)
    except UnavailableError as error:
        return {"unavailable": str(error)}
    found: dict[str, Any] = json.loads(done.splitlines()[-1])
    return found


def _run(
    command: list[Any], cwd: Path | None = None, environment: dict[str, str] | None = None
) -> str:
    """Return what ``command`` prints.

    Raises:
        UnavailableError: it failed, with the last line that it said, or took too long.
    """
    said = Path(str(command[0])).name
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{said} took longer than {_LIMIT_S:.0f} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["and said nothing"])[-1]
        raise UnavailableError(f"{said} ended with {done.returncode}: {reason}")
    return done.stdout


if __name__ == "__main__":
    main()
