"""The GGUF writer without torch: its numpy codec, its reads by rows, its memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.torch import save_file

from edgekd.export import gguf_tensors
from edgekd.export.blocks import pack_gguf, quantize
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.grid_rows import BITS, GridName, round_to_rows
from edgekd.export.plan import Quant, make_plan
from edgekd.export.to_gguf import write_gguf
from tests.conftest import save_tiny_model

_ANY = hnp.arrays(np.float32, (2, 64), elements=st.floats(-1e4, 1e4, width=32))
_CHOICES = (
    [-8.0, -7.5, -0.5, -0.0, 0.0, 0.5, 7.5, 8.0],  # ties of the largest, halves of q4_0
    [127.0, -127.0, 0.5, 1.5, -63.5, 0.0],  # halves of q8_0
    [0.0, -0.0, 0.5, 7.5],  # a minimum of either sign
    [0.0, -0.0],
    [1e6, -3e5, 65504.0, 1.0],  # scales beyond fp16
)
_CHOSEN = st.sampled_from(_CHOICES).flatmap(
    lambda values: hnp.arrays(
        np.float32, (2, 64), elements=st.sampled_from(values), fill=st.nothing()
    )
)
_TINIEST = np.full((2, 64), 1e-44, np.float32)  # 1 / scale overflows
_TINIEST[:, 7] = 0


@pytest.mark.parametrize("grid", BITS)
@given(weight=st.one_of(_ANY, _CHOSEN))
@example(weight=_TINIEST)
def test_rows_equal_the_blocks_that_training_uses(
    weight: NDArray[np.float32], grid: GridName
) -> None:
    np.testing.assert_array_equal(
        round_to_rows(weight, grid), pack_gguf(quantize(torch.from_numpy(weight), grid))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_read_as_torch_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"first": torch.ones(3, 5), "w": weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for start, stop in ((0, 40), (0, 1), (7, 33)):
        found = checkpoint.rows("w", start, stop)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, checkpoint.tensor("w")[start:stop].numpy())
    assert checkpoint.shape("w") == (40, 32)


def test_a_type_that_numpy_lacks_is_read_by_torch(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    weight = torch.tensor([[1.5, -2.0], [0.25, 448.0]]).to(torch.float8_e4m3fn)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    rows = open_checkpoint(tmp_path).rows("w", 1, 2)
    np.testing.assert_array_equal(rows, np.array([[0.25, 448.0]], np.float32))


@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m", "bf16", "f32"])
def test_bytes_do_not_depend_on_how_many_rows_are_taken_at_a_time(
    quant: Quant, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tiny, quant)
    write_gguf(tiny, plan, tmp_path / "whole.gguf")
    monkeypatch.setattr(gguf_tensors, "_CHUNK_VALUES", 3 * 64)  # not even: 5 rows are left, or 1
    write_gguf(tiny, plan, tmp_path / "rows.gguf")
    assert (tmp_path / "rows.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


_WRITE = """
import json, sys
from pathlib import Path
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.plan import make_plan
from edgekd.export.to_gguf import write_gguf
def peak_mib():  # not ru_maxrss, which starts at the peak of the parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
folder = Path(sys.argv[1])
checkpoint = open_checkpoint(folder)
write_gguf(checkpoint, make_plan(checkpoint, sys.argv[2]), folder / "small.gguf")
before = peak_mib()
checkpoint = open_checkpoint(folder / "large")
write_gguf(checkpoint, make_plan(checkpoint, sys.argv[2]), folder / "large.gguf")
loaded = [name for name in ("torch", "transformers", "llama_cpp") if name in sys.modules]
print(json.dumps({"grown_mib": peak_mib() - before, "loaded": loaded}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m"])
def test_memory_stays_near_the_largest_tensor_as_stored(quant: Quant, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    large = tmp_path / "large"
    save_tiny_model(large)
    tensors = {
        f"model.layers.{layer}.mlp.{name}.weight": torch.zeros(16384, 1024)
        for layer in range(2)
        for name in ("gate_proj", "up_proj")
    }
    save_file(tensors, large / "model.safetensors")  # 256 MiB, each 64 MiB and stored 9 MiB
    found = subprocess.run(
        [sys.executable, "-c", _WRITE, str(tmp_path), quant], check=True, capture_output=True
    )
    report = json.loads(found.stdout)
    assert report["loaded"] == []
    assert report["grown_mib"] < 40
