"""The grid against its two references: gguf's numpy and ggml's C, byte for byte."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)

from edgekd.errors import ExportError
from edgekd.export.blocks import (
    Blocks,
    GridName,
    dequantize,
    fake_quantize,
    pack_gguf,
    pack_matmul_nbits,
    pack_zero_points,
    quantize,
    unpack_gguf,
    unpack_matmul_nbits,
    zero_points,
)
from edgekd.export.gguf_tensors import bf16_bits
from edgekd.export.verify import blocks_equal

_TYPES: dict[GridName, GGMLQuantizationType] = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q8_0": GGMLQuantizationType.Q8_0,
}
GRIDS: list[GridName] = ["q4_0", "q4_1", "q8_0"]
_FLOATS = st.floats(-1e4, 1e4, width=32)
# Scales of these are far from where 1 / scale overflows, which C leaves undefined.
_PLAIN = _FLOATS.filter(lambda value: value == 0 or abs(value) > 1e-30)
_KINDS = {
    "any": _PLAIN,
    "heavy tail": _PLAIN.map(lambda value: float(np.float32(value**5 / 1e16))).filter(
        lambda value: value == 0 or abs(value) > 1e-30
    ),
    "ties": st.sampled_from([-8.0, -7.5, -4.0, -0.5, 0.0, 0.5, 1.0, 4.0, 7.5, 8.0]),
    "zeros": st.sampled_from([0.0, -0.0]),
    "constant": st.just(float(np.float32(0.3))),
    "bf16": _PLAIN.map(lambda value: torch.tensor(value).bfloat16().item()),
}
_SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96]))
matrices = hnp.arrays(np.float32, _SHAPES, elements=_FLOATS)
plain_matrices = st.one_of(
    [hnp.arrays(np.float32, _SHAPES, elements=kind, fill=st.nothing()) for kind in _KINDS.values()]
)


def ggml_quantize(weight: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return the rows that ggml's own C function writes."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = np.empty((weight.shape[0], weight.shape[1] // block * block_bytes), np.uint8)
    function(kind, weight.ctypes.data, rows.ctypes.data, 0, *weight.shape, None)
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
        "bf16": torch.from_numpy(normal).bfloat16().float().numpy(),
        "shifted": normal * np.float32(0.05) + np.float32(0.2),
    }


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", _samples())
def test_packed_rows_equal_ggml_c(kind: str, grid: GridName) -> None:
    weight = _samples()[kind]
    packed = pack_gguf(quantize(torch.from_numpy(weight), grid))
    np.testing.assert_array_equal(packed, ggml_quantize(weight, _TYPES[grid]))


@pytest.mark.parametrize("grid", GRIDS)
@given(weight=plain_matrices)
def test_any_rows_equal_ggml_c_and_gguf_numpy(weight: NDArray[np.float32], grid: GridName) -> None:
    blocks = quantize(torch.from_numpy(weight), grid)
    packed = pack_gguf(blocks)
    np.testing.assert_array_equal(packed, ggml_quantize(weight, _TYPES[grid]))
    # By value: numpy writes other codes for a block of zeros.
    numpy_values = quants.dequantize(quants.quantize(weight, _TYPES[grid]), _TYPES[grid])
    np.testing.assert_array_equal(dequantize(blocks).numpy(), numpy_values)


@given(weight=hnp.arrays(np.float32, (2, 32), elements=st.floats(allow_nan=False, width=32)))
def test_bf16_equals_ggml_c_and_gguf_numpy(weight: NDArray[np.float32]) -> None:
    bits = bf16_bits(weight).view(np.uint8)
    kind = GGMLQuantizationType.BF16
    np.testing.assert_array_equal(bits, ggml_quantize(weight, kind))
    np.testing.assert_array_equal(bits, quants.quantize(weight, kind))


def _ort_quantize(
    weight: NDArray[np.float32], is_symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Return codes, scales and zero points of ONNX Runtime's own 4-bit quantizer."""
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=is_symmetric)
    packed, scales, points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight.T.copy())
    return packed, scales, points


def _grid_weights(grid: GridName, n_blocks: int) -> Blocks:
    """Return blocks with both ends of the code range, so that every quantizer finds the scale."""
    rng = np.random.default_rng(1)
    low = -8 if grid == "q4_0" else 0
    codes = rng.integers(low, low + 16, (5, n_blocks, 32)).astype(np.int8)
    codes[..., 0], codes[..., 1] = low, low + 15
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (5, n_blocks)).astype(np.float16))
    mins = None
    if grid == "q4_1":
        mins = scales * -torch.from_numpy(rng.integers(0, 16, (5, n_blocks)).astype(np.float16))
        # A product of two fp16 numbers is seldom one: keep the scales short.
        scales = (scales.float() * 1024).round().half() / 1024
        mins = (scales.float() * (mins / scales).round().clamp(-15, 0).float()).half()
    return Blocks(grid, torch.from_numpy(codes), scales, mins)


@pytest.mark.parametrize("n_blocks", [2, 3])
def test_q4_0_packing_equals_onnx_runtimes(n_blocks: int) -> None:
    """On the grid both rules find the same codes; off it they differ, by design."""
    blocks = _grid_weights("q4_0", n_blocks)
    packed, scales, _ = _ort_quantize(dequantize(blocks).numpy(), is_symmetric=True)
    np.testing.assert_array_equal(pack_matmul_nbits(blocks), packed)
    np.testing.assert_array_equal(blocks.scales_NB.float().numpy(), scales.reshape(5, -1))


@pytest.mark.parametrize("n_blocks", [2, 3])
def test_q4_1_packing_and_zero_points_equal_onnx_runtimes(n_blocks: int) -> None:
    blocks = _grid_weights("q4_1", n_blocks)
    packed, _, points = _ort_quantize(dequantize(blocks).numpy(), is_symmetric=False)
    np.testing.assert_array_equal(pack_matmul_nbits(blocks), packed)
    np.testing.assert_array_equal(pack_zero_points(zero_points(blocks)), points.reshape(5, -1))
    back = unpack_matmul_nbits(
        packed, blocks.scales_NB.numpy(), "q4_1", pack_zero_points(zero_points(blocks))
    )
    assert dequantize(back).equal(dequantize(blocks))


def test_minimums_between_two_codes_have_no_zero_point() -> None:
    with pytest.raises(ExportError, match="no exact ONNX form"):
        zero_points(quantize(torch.from_numpy(_samples()["normal"]), "q4_1"))


@pytest.mark.parametrize("grid", GRIDS)
def test_values_equal_gguf_numpy(grid: GridName) -> None:
    weight = _samples()["normal"]
    rows = pack_gguf(quantize(torch.from_numpy(weight), grid))
    values = quants.dequantize(rows, _TYPES[grid])
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(weight), grid).numpy(), values)


@pytest.mark.parametrize("grid", GRIDS)
@given(weight=matrices)
def test_packings_give_back_every_block(weight: NDArray[np.float32], grid: GridName) -> None:
    blocks = quantize(torch.from_numpy(weight), grid)
    read_back = [unpack_gguf(pack_gguf(blocks), grid)]
    if grid != "q4_1":
        scales_NB = blocks.scales_NB.numpy()
        read_back.append(unpack_matmul_nbits(pack_matmul_nbits(blocks), scales_NB, grid))
    assert all(blocks_equal(blocks, other) for other in read_back)


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_twice_changes_nothing(grid: GridName) -> None:
    once = fake_quantize(torch.from_numpy(_samples()["normal"]), grid)
    assert fake_quantize(once, grid).equal(once)
    assert dequantize(quantize(once, grid)).equal(once)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [1e-41, 1e-38, 1e-12])
def test_weights_below_any_fp16_scale_become_zero(factor: float, grid: GridName) -> None:
    """C converts an infinite quotient to an int here, which is undefined; the value is not."""
    weight = _samples()["normal"][:8] * np.float32(factor)
    assert not fake_quantize(torch.from_numpy(weight), grid).any()
    assert not quants.dequantize(ggml_quantize(weight, _TYPES[grid]), _TYPES[grid]).any()


def test_rows_that_hold_no_whole_block_are_refused() -> None:
    with pytest.raises(ExportError, match="multiple of 32"):
        quantize(torch.zeros(2, 33), "q4_0")
