"""A killed export leaves the old artifact or the new one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from edgekd.export.export_model import Format, export_model
from edgekd.files import sha256_of

N_KILLS = 10  # of either format


def content(artifact: Path) -> dict[str, str]:
    """Return what lies at ``artifact``, by hash; the manifest has a date and is left out."""
    if artifact.is_file():
        return {"": sha256_of(artifact)}
    return {path.name: sha256_of(path) for path in artifact.iterdir() if path.name != "edgekd.json"}


@pytest.mark.parametrize("output_format", ["gguf", "onnx"])
def test_an_export_killed_at_any_point_leaves_a_whole_artifact(
    output_format: Format, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    whole = []
    for index, folder in enumerate((tiny_folder, other)):
        export_model(str(folder), output_format, tmp_path / f"whole-{index}", quant="q4_0")
        whole.append(content(tmp_path / f"whole-{index}"))
    assert whole[0] != whole[1]

    out, seen, generator = tmp_path / "out" / "artifact", [], random.Random(0)
    script = str(Path(__file__).with_name("zygote.py"))
    command = [sys.executable, script, str(tiny_folder), str(other), output_format, str(out)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as zygote:
        assert zygote.stdin and zygote.stdout
        for _ in range(N_KILLS):
            print("go", file=zygote.stdin, flush=True)
            while (line := zygote.stdout.readline()) == "ended\n":
                pass  # of exports before the last kill
            pid = int(line)
            start_s = time.perf_counter()
            assert zygote.stdout.readline() == "ended\n"
            time.sleep(generator.uniform(0, time.perf_counter() - start_s))  # into the next one
            os.kill(pid, signal.SIGKILL)
            seen.append(content(out))
        zygote.stdin.close()
    assert all(found in whole for found in seen), seen
