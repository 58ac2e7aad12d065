"""The grid against its two references: gguf's numpy and ggml's C, byte for byte."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgekd.errors import ExportError
from edgekd.export.blocks import (
    GridName,
    dequantize,
    fake_quantize,
    pack_gguf,
    pack_matmul_nbits,
    quantize,
    unpack_gguf,
    unpack_matmul_nbits,
)

_TYPES: dict[GridName, GGMLQuantizationType] = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q8_0": GGMLQuantizationType.Q8_0,
}
GRIDS: list[GridName] = ["q4_0", "q8_0"]
_FLOATS = st.floats(-1e4, 1e4, width=32)
matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(64)), elements=_FLOATS)


def ggml_quantize(weight: NDArray[np.float32], grid: GridName) -> NDArray[np.uint8]:
    """Return the rows that ggml's own C function writes."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    function.argtypes.append(ctypes.c_void_p)
    block_bytes = {"q4_0": 18, "q8_0": 34}[grid]
    rows = np.empty((weight.shape[0], weight.shape[1] // 32 * block_bytes), np.uint8)
    function(_TYPES[grid], weight.ctypes.data, rows.ctypes.data, 0, *weight.shape, None)
    return rows


def _samples() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((512, 512)).astype(np.float32)
    coarse = rng.integers(-8, 9, (64, 64)).astype(np.float32)  # many ties and halves
    return {
        "normal": normal * np.float32(0.05),
        "heavy tail": normal**5,
        "ties": coarse,
        "zeros": np.zeros((2, 64), np.float32),
        "constant": np.full((2, 64), 0.3, np.float32),
    }


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", _samples())
def test_packed_rows_equal_ggml_c(kind: str, grid: GridName) -> None:
    weight = _samples()[kind]
    packed = pack_gguf(quantize(torch.from_numpy(weight), grid))
    np.testing.assert_array_equal(packed, ggml_quantize(weight, grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_values_equal_gguf_numpy(grid: GridName) -> None:
    weight = _samples()["normal"]
    rows = pack_gguf(quantize(torch.from_numpy(weight), grid))
    values = quants.dequantize(rows, _TYPES[grid])
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(weight), grid).numpy(), values)


@pytest.mark.parametrize("grid", GRIDS)
@given(weight=matrices)
def test_both_packings_give_back_every_block(weight: NDArray[np.float32], grid: GridName) -> None:
    blocks = quantize(torch.from_numpy(weight), grid)
    in_gguf = unpack_gguf(pack_gguf(blocks), grid)
    in_onnx = unpack_matmul_nbits(pack_matmul_nbits(blocks), blocks.scales_NB.numpy(), grid)
    for read_back in (in_gguf, in_onnx):
        assert read_back.codes_NBK.equal(blocks.codes_NBK)
        assert read_back.scales_NB.view(torch.int16).equal(blocks.scales_NB.view(torch.int16))


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_twice_changes_nothing(grid: GridName) -> None:
    once = fake_quantize(torch.from_numpy(_samples()["normal"]), grid)
    assert fake_quantize(once, grid).equal(once)
    assert dequantize(quantize(once, grid)).equal(once)


def test_weights_below_any_fp16_scale_become_zero() -> None:
    """C converts an infinite quotient to an int here, which is undefined; the value is not."""
    weight = _samples()["normal"][:8] * np.float32(1e-41)
    assert not fake_quantize(torch.from_numpy(weight), "q4_0").any()
    assert not quants.dequantize(ggml_quantize(weight, "q4_0"), _TYPES["q4_0"]).any()


def test_rows_that_hold_no_whole_block_are_refused() -> None:
    with pytest.raises(ExportError, match="multiple of 32"):
        quantize(torch.zeros(2, 33), "q4_0")
