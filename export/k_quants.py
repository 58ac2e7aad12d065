"""K-quants and the other types that are not ours: ggml's own C quantizer, tensor by tensor.

For students that were not trained on the grid. Bytes are those that llama-quantize writes on the
same machine; compilers differ in the last bit. Only GGUF has these types.

The mixtures are llama.cpp's (``llama_tensor_get_type_impl`` in src/llama-quant.cpp): more bits for
the values and the down projections of the first, the last and every third layer between, and for
the head.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from numpy.typing import NDArray

from edgekd.errors import ExportError, MissingExtraError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.grid_rows import GridName

if TYPE_CHECKING:
    import torch

# N rows, K columns

KType = Literal["q4_k", "q5_k", "q6_k", "q5_0", "q5_1"]
K_TYPES: tuple[KType, ...] = get_args(KType)
Mixture = Literal["q4_k_m", "q5_k_m", "q6_k"]
MIXTURES: tuple[Mixture, ...] = get_args(Mixture)

_BASE: dict[Mixture, KType] = {"q4_k_m": "q4_k", "q5_k_m": "q5_k", "q6_k": "q6_k"}
# Rows that are no multiple of 256 hold no K-quant: the next larger type with blocks of 32.
_FALLBACK: dict[KType, str] = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def quantize_rows(
    weight_NK: "torch.Tensor | NDArray[np.float32]",
    name: KType | GridName,
    importance_K: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Return the bytes [N, row] of ``weight_NK`` as the type ``name``.

    With ``importance_K``, the mean square of each input column, ggml searches the scales that lose
    least in the output. Q8_0 takes no notice of it.

    Raises:
        MissingExtraError: llama-cpp-python, which brings ggml, is not installed.
    """
    kind = _ggml_type(name)
    n_rows, n_columns = weight_NK.shape
    weight = np.ascontiguousarray(weight_NK, np.float32)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = np.empty((n_rows, n_columns // block * block_bytes), np.uint8)
    weights = None
    if importance_K is not None:
        # Bound to a name: ctypes keeps no array alive.
        weights = np.ascontiguousarray(importance_K, np.float32)
        assert weights.shape == (n_columns,), (weights.shape, n_columns)
    written = _quantizer()(
        kind,
        weight.ctypes.data,
        rows.ctypes.data,
        0,
        n_rows,
        n_columns,
        None if weights is None else weights.ctypes.data,
    )
    assert written == rows.nbytes, (written, rows.nbytes)
    return rows


def dequantize_rows(rows: NDArray[np.uint8], name: KType) -> "torch.Tensor":
    """Return the float32 matrix [N, K] that ``rows`` stand for, by the gguf package."""
    import torch

    values: NDArray[Any] = gguf_dequantize(rows, _ggml_type(name))
    return torch.from_numpy(values.astype(np.float32))


def mixture_types(checkpoint: Checkpoint, mixture: Mixture) -> tuple[dict[str, str], list[str]]:
    """Return the type of every matrix, and the matrices that a K-quant cannot hold.

    Raises:
        ExportError: a row is no multiple of 32 either.
    """
    types: dict[str, str] = {}
    fallen: list[str] = []
    for name in checkpoint.shard_of:
        shape = checkpoint.shape(name)
        if len(shape) == 1:
            continue
        wanted = _wanted(name, mixture, checkpoint)
        if shape[1] % 256 == 0:
            types[name] = wanted
        elif shape[1] % 32 == 0:
            # llama.cpp gives the head 8 bits, everything else the next larger type.
            types[name] = "q8_0" if _is_head(name, checkpoint) else _FALLBACK[wanted]
            fallen.append(name)
        else:
            raise ExportError(f"{name} has rows of {shape[1]}, no multiple of 32; export as f16")
    return types, fallen


def _wanted(name: str, mixture: Mixture, checkpoint: Checkpoint) -> KType:
    if _is_head(name, checkpoint):
        return "q6_k"
    part = name.split(".")[-2]
    if mixture != "q6_k" and part in ("v_proj", "qkv_proj", "down_proj"):
        layer = int(name.split(".")[2])
        if _deserves_more(layer, checkpoint.n_layers):
            return "q6_k"
    return _BASE[mixture]


def _is_head(name: str, checkpoint: Checkpoint) -> bool:
    return name == ("model.embed_tokens.weight" if checkpoint.is_tied else "lm_head.weight")


def _deserves_more(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _ggml_type(name: KType | GridName) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


@cache
def _quantizer() -> Any:
    package = find_spec("llama_cpp")  # its import loads llama.cpp as well
    if package is None or package.origin is None:
        raise MissingExtraError("llama_cpp", "gguf")
    library = next((Path(package.origin).parent / "lib").glob("*ggml-base.*"))
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    # All seven at once: ctypes reads the list when it is assigned, and cuts an address that is
    # passed beyond its end to 32 bits.
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return function
