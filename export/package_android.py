"""``edgekd package --target android``: what a phone needs of an export for its NPU, and no more.

The folder holds binaries, embedding, tokenizer and manifest, and two scripts with the commands.
Qualcomm's libraries are not in it: their licence leaves them to the user (docs/phones.md). The
scripts were run against no phone: what they are is said in them and in the manifest.
"""

import shutil
from pathlib import Path
from typing import Any

from edgekd.devices.snapdragon import find_soc
from edgekd.errors import ExportError
from edgekd.export.checkpoint import TOKENIZER_FILES
from edgekd.export.to_npu import HOST_DATA_FILE, PLACEMENT_FILE
from edgekd.files import atomic_folder, disk_errors, size_of
from edgekd.manifest import (
    Manifest,
    check_files,
    describe_files,
    manifest_path,
    read_manifest,
    write_manifest,
)
from edgekd.runtime.static_model import (
    HOST_GRAPH,
    NPU_FILE,
    Compiled,
    StaticModel,
    is_static,
    read_static,
)

_LABEL = "untested"
_PHONE_FOLDER = "/data/local/tmp/edgekd"


def package_android(artifact: Path, out: Path) -> dict[str, Any]:
    """Write the package of ``artifact`` to the new or empty folder ``out``; return its report.

    Raises:
        ExportError: the artifact is not compiled for an NPU, or ``out`` holds something.
        VerificationError: a file of the artifact changed since it was exported.
    """
    model = read_static(artifact) if is_static(artifact) else None
    if model is None or model.compiled is None:
        raise ExportError(
            f"{artifact} is not compiled for an NPU; make it with: edgekd export MODEL --format "
            "onnx --target qnn --soc SOC --out OUT, with onnxruntime-qnn installed"
        )
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ExportError(f"{out} is not empty; choose another --out")
    manifest = read_manifest(manifest_path(artifact))
    check_files(artifact, manifest)
    with atomic_folder(out) as folder, disk_errors(out, folder):
        _copy(artifact, folder, model.compiled)
        scripts = {
            "run-adb.sh": _adb_script(model, model.compiled),
            "run-termux.sh": _termux_script(model),
        }
        for name, text in scripts.items():
            (folder / name).write_text(text, "utf-8")
            (folder / name).chmod(0o755)
        files = [path for path in folder.iterdir() if path.is_file()]
        write_manifest(manifest_path(folder), _manifest(manifest, files))
    return {
        "path": str(out),
        "bytes": size_of(out),
        "soc": model.compiled.soc,
        "model": manifest["verification"]["npu"]["label"],
        "scripts": _LABEL,
        "commands": [f"cd {out} && ./run-adb.sh LIBS", "bash run-termux.sh"],
    }


def _copy(artifact: Path, folder: Path, compiled: Compiled) -> None:
    names = (
        *compiled.graphs.values(),
        *compiled.binaries,
        *(HOST_GRAPH, HOST_DATA_FILE, NPU_FILE, PLACEMENT_FILE, "config.json"),
        *(name for name in TOKENIZER_FILES if (artifact / name).is_file()),
    )
    for name in names:
        shutil.copyfile(artifact / name, folder / name)


def _adb_script(model: StaticModel, compiled: Compiled) -> str:
    """Return what runs the decode graph, part by part, on a phone that is plugged in.

    The program makes up fitting inputs itself.

    Options after ``onnxruntime_perf_test --help``.
    """
    soc = find_soc(compiled.soc)
    parts = " ".join(compiled.graphs[part] for part in model.parts("decode"))
    return f"""#!/bin/sh
# Times single tokens on the NPU of a {soc.title} ({soc.name}) over adb;
# of a model in several parts, the times of all parts together are one token's.
# Status: {_LABEL}; no phone was at hand when this was written.
# Usage: ./run-adb.sh LIBS, a folder with onnxruntime_perf_test, libonnxruntime.so,
# libQnnHtp.so, libQnnSystem.so and libQnnHtpV{soc.htp_arch}{{Stub,Skel}}.so for Android arm64:
# from a build of ONNX Runtime and from Qualcomm's AI Engine Direct SDK {compiled.sdk}.
set -eu
[ $# -eq 1 ] && [ -d "$1" ] || {{ echo "usage: $0 LIBS" >&2; exit 2; }}
libs=$(cd "$1" && pwd)
cd "$(dirname "$0")"
found=$(adb shell getprop ro.soc.model | tr -d '\\r' | tr 'A-Z' 'a-z')
if [ "$found" != {soc.name} ]; then
  echo "the binaries are for {soc.name}, the phone is '$found'; export again with --soc" >&2
  exit 1
fi
adb shell mkdir -p {_PHONE_FOLDER}/lib
for file in *; do adb push "$file" {_PHONE_FOLDER}/; done
for file in "$libs"/*; do adb push "$file" {_PHONE_FOLDER}/lib/; done
for part in {parts}; do
  adb shell "cd {_PHONE_FOLDER} && chmod +x lib/onnxruntime_perf_test && \\
    LD_LIBRARY_PATH=lib ADSP_LIBRARY_PATH=lib lib/onnxruntime_perf_test \\
    -I -m times -r 50 -e qnn -i 'backend_path|libQnnHtp.so' $part"
done
"""


def _termux_script(model: StaticModel) -> str:
    """Return what talks to the model in Termux, where a QNN provider for Android is installed."""
    return f"""#!/data/data/com.termux/files/usr/bin/bash
# Chats with the model on the NPU, in Termux on the phone itself; run it in this folder.
# Status: {_LABEL}; no phone was at hand when this was written.
# Termux has its own ONNX Runtime; the QNN provider for Android is Qualcomm's, and not on PyPI.
set -eu
cd "$(dirname "$0")"
pkg install -y python python-numpy python-onnxruntime
pip install edgekd tokenizers
edgekd chat . --ctx {model.context_tokens} --ep qnn --require-npu
"""


def _manifest(manifest: dict[str, Any], files: list[Path]) -> Manifest:
    return Manifest(
        kind="artifact",
        files=describe_files(files),
        made_from=manifest["made_from"],
        recipe=manifest["recipe"],
        verification=manifest["verification"] | {"scripts": _LABEL},
        licence=manifest.get("licence"),
    )
