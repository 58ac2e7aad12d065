"""Every way to run a model that edgekd knows, and how far each was seen to work: the one table.

``edgekd doctor``, ``docs/phones.md``, the execution providers and reports all read it. A label is
what edgekd's own exports did in a run whose figures or test can be named, never what a library's
documentation promises.
"""

from dataclasses import dataclass
from typing import Literal

Label = Literal["verified-on-device", "verified-in-emulator", "compile-only", "untested"]
LABELS: dict[Label, str] = {
    "verified-on-device": "ran on the hardware that it is for, and gave the right answers",
    "verified-in-emulator": "ran in an emulator of that hardware, and gave the right answers",
    "compile-only": "the compiler took it, nothing ran it",
    "untested": "written after the documentation",
}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One engine on one kind of processor."""

    title: str
    label: Label
    evidence: str
    """What was run and with what result; where nothing was, why not."""
    package: str
    """The one to install, as the package index calls it."""
    extra: str | None = None
    """Of edgekd, which brings the package."""
    install_note: str | None = None
    """What else an installation needs."""


_OWN = "in an environment of its own"
_NOT_TRIED_ON_GPU = (
    "not tried: on the NVIDIA GPU that was at hand torch trained students "
    "(benchmarks/results/five_rows_gpu.json), and their files ran on its machine's CPU"
)

BACKENDS: dict[str, Backend] = {
    "llamacpp": Backend(
        title="llama.cpp on CPU",
        label="verified-on-device",
        evidence="the tests, and benchmarks/results/export_fidelity.json, on x86-64",
        package="llama-cpp-python",
        extra="gguf",
    ),
    "llamacpp-gpu": Backend(
        title="llama.cpp on GPUs",
        label="untested",
        evidence="not tried: llama-cpp-python was built for the CPU everywhere, on the machine "
        "with an NVIDIA GPU too",
        package="llama-cpp-python",
        extra="gguf",
        install_note="built for the GPU",
    ),
    "torch": Backend(
        title="PyTorch on CPU",
        label="verified-on-device",
        evidence="the reference that the tests compare every engine with, on x86-64",
        package="torch",
        extra="torch",
    ),
    "cpu": Backend(
        title="ONNX Runtime on CPU",
        label="verified-on-device",
        evidence="the tests, and benchmarks/results/export_fidelity.json, on x86-64",
        package="onnxruntime",
        extra="onnx",
    ),
    "qnn": Backend(
        title="ONNX Runtime on Hexagon NPUs (QNN)",
        label="verified-in-emulator",
        evidence="benchmarks/results/npu_sm8650.json and npu_sm8750.json, by Qualcomm's emulator "
        "on x86-64; no Snapdragon was at hand",
        package="onnxruntime-qnn",
        extra="qnn",
    ),
    "openvino": Backend(
        title="ONNX Runtime on OpenVINO",
        label="verified-on-device",
        evidence="benchmarks/results/providers.json, a tiny model on OpenVINO's CPU device; "
        "no GPU or NPU of Intel was at hand",
        package="onnxruntime-openvino",
        install_note=_OWN,
    ),
    "webgpu": Backend(
        title="ONNX Runtime on WebGPU",
        label="untested",
        evidence="not tried on a GPU; on SwiftShader, a Vulkan in software, a tiny model's single "
        "tokens were near the CPU's and its prompts were not: benchmarks/results/providers.json",
        package="onnxruntime-webgpu",
        install_note=_OWN,
    ),
    "cuda": Backend(
        title="ONNX Runtime on CUDA",
        label="untested",
        evidence=_NOT_TRIED_ON_GPU,
        package="onnxruntime-gpu",
    ),
    "tensorrt": Backend(
        title="ONNX Runtime on TensorRT",
        label="untested",
        evidence=_NOT_TRIED_ON_GPU,
        package="onnxruntime-gpu",
    ),
    "coreml": Backend(
        title="ONNX Runtime on Core ML",
        label="untested",
        evidence="no Mac was at hand",
        package="onnxruntime",
        extra="onnx",
        install_note="on a Mac",
    ),
}
"""Short name to backend; those of ONNX Runtime's providers are what ``--ep`` takes."""


def install_command(backend: Backend) -> str:
    """Return what to type for ``backend``, and what else it needs."""
    wanted = f"'edgekd[{backend.extra}]'" if backend.extra else backend.package
    note = f", {backend.install_note}" if backend.install_note else ""
    return f"pip install {wanted}{note}"
