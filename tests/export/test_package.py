"""A package for a phone: complete without the weights; its script leaves a wrong phone alone."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgekd.errors import ExportError, ModelError
from edgekd.export.export_model import export_model
from edgekd.export.package_android import package_android
from edgekd.export.to_npu import WEIGHTS_FILE, NpuOptions
from edgekd.manifest import check_files, read_manifest
from edgekd.runtime.loading import open_model

# A stand-in for adb that answers for the phone and notes what it was asked.
ADB = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in *getprop*) echo $SOC;; esac
"""


@pytest.fixture(scope="module")
def artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("onnxruntime_qnn") is None:
        pytest.skip("needs pip install onnxruntime-qnn")
    folder = tmp_path_factory.mktemp("npu") / "tiny"
    options = NpuOptions(soc="sm8750", context_tokens=64, prefill_tokens=16, emulate=False)
    export_model(str(tiny_folder), "onnx", folder, target="qnn", npu=options)
    return folder


def _run(package: Path, folder: Path, soc: str) -> tuple[subprocess.CompletedProcess[str], str]:
    (folder / "libs").mkdir()
    (folder / "libs" / "libonnxruntime.so").touch()
    (folder / "adb").write_text(ADB)
    (folder / "adb").chmod(0o755)
    log = folder / "log"
    done = subprocess.run(
        [package / "run-adb.sh", folder / "libs"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log), "SOC": soc},
    )
    return done, log.read_text()


def test_a_package_holds_all_that_the_npu_needs_and_no_weights_twice(
    artifact: Path, tmp_path: Path
) -> None:
    report = package_android(artifact, tmp_path / "package")
    package = tmp_path / "package"
    assert report["scripts"] == "untested" and not (package / WEIGHTS_FILE).exists()
    check_files(package, read_manifest(package / "edgekd.json"))
    engine = open_model(package, context_tokens=64, provider="qnn", require_npu=True).engine
    whole = open_model(artifact, context_tokens=64, provider="qnn", require_npu=True).engine
    assert engine.forward([5, 6, 7]).tolist() == whole.forward([5, 6, 7]).tolist()
    with pytest.raises(ModelError, match="binaries for an NPU only"):
        open_model(package, context_tokens=64)


def test_the_script_pushes_everything_and_runs_the_decode_graph(
    artifact: Path, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    package_android(artifact, package)
    done, log = _run(package, tmp_path, "SM8750")
    assert done.returncode == 0, done.stderr
    for file in package.iterdir():
        assert f"push {file.name} /data/local/tmp/edgekd/" in log
    assert "libs/libonnxruntime.so /data/local/tmp/edgekd/lib/" in log
    assert log.strip().endswith("-i 'backend_path|libQnnHtp.so' decode_ctx.onnx")


def test_the_script_leaves_another_phone_alone(artifact: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package_android(artifact, package)
    done, log = _run(package, tmp_path, "SM8650")
    assert done.returncode == 1 and "for sm8750, the phone is 'sm8650'" in done.stderr
    assert "push" not in log


def test_what_is_not_compiled_cannot_be_packaged(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not compiled for an NPU; make it with"):
        package_android(tiny_onnx, tmp_path / "package")
