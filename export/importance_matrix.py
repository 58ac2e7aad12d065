"""The importance matrix: how large each column of a matrix's input is, on calibration text.

llama.cpp weighs rounding errors with the mean square of each input column. The sums are taken here
in torch, in one pass over the text, and kept in llama.cpp's GGUF file format, so that files of
``llama-imatrix`` can be read and ours be given to ``llama-quantize``. The rows of q and k change
places on the way to GGUF; columns do not, so a matrix keeps its sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, Keys
from numpy.typing import NDArray

from edgekd.errors import ExportError
from edgekd.export.architectures import Architecture
from edgekd.export.checkpoint import Checkpoint
from edgekd.progress import Progress, Silence
from edgekd.runtime.gguf_header import GgufTensor, read_gguf_header
from edgekd.runtime.torch_engine import load_causal_lm

# T tokens, K columns

CHUNK_TOKENS = 512
_SUMS, _COUNTS = ".in_sum2", ".counts"
# A column that the text never reached still counts for something: ggml would round a block of
# such columns to zeros.
_LEAST_SHARE = 1e-6


@dataclass
class ImportanceMatrix:
    """Sums over calibration text, by checkpoint tensor name."""

    sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Sum over tokens of each squared input column [K]."""
    counts: dict[str, float] = field(default_factory=dict)
    """Tokens summed over."""
    dataset: str = ""
    n_chunks: int = 0
    chunk_tokens: int = CHUNK_TOKENS

    def mean_squares(self, name: str) -> NDArray[np.float32] | None:
        """Return the mean square of each input column [K] of ``name``; none if not measured.

        The division is float32, as in ``llama-quantize``.
        """
        if name not in self.sums or not self.counts[name]:
            return None
        mean_K = self.sums[name] / np.float32(self.counts[name])
        least = np.float32(_LEAST_SHARE) * mean_K.mean(dtype=np.float32)
        guarded_K: NDArray[np.float32] = np.maximum(mean_K, least)
        return guarded_K


def measure_importance(
    checkpoint: Checkpoint, ids: Sequence[int], dataset: str, progress: Progress | None = None
) -> ImportanceMatrix:
    """Run ``checkpoint`` over ``ids`` and return the sums of every matrix of its layers.

    Raises:
        ExportError: an input is not finite.
    """
    model = load_causal_lm(checkpoint.folder, torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            total_K = torch.zeros(module.in_features, dtype=torch.float64)
            sums[f"{name}.weight"] = total_K
            module.register_forward_pre_hook(_adder(total_K))
    chunks = [ids[start : start + CHUNK_TOKENS] for start in range(0, len(ids), CHUNK_TOKENS)]
    with (
        torch.inference_mode(),
        (progress or Silence()).track("measuring importance", len(ids)) as advance,
    ):
        for number, chunk in enumerate(chunks):
            model(torch.tensor([list(chunk)]), logits_to_keep=1, use_cache=False)
            advance(number * CHUNK_TOKENS + len(chunk), "tokens")
    _check_finite(sums)
    return ImportanceMatrix(
        {name: total_K.float().numpy() for name, total_K in sums.items()},
        dict.fromkeys(sums, float(len(ids))),
        dataset,
        len(chunks),
    )


def write_importance(importance: ImportanceMatrix, architecture: Architecture, path: Path) -> None:
    """Write ``importance`` to ``path`` as ``llama-imatrix`` does."""
    writer = GGUFWriter(path, "")
    try:
        writer.kv_data[0].pop(Keys.General.ARCHITECTURE, None)  # such files have none
        writer.add_type("imatrix")
        writer.add_array(Keys.IMatrix.DATASETS, [importance.dataset])
        writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, importance.n_chunks)
        writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, importance.chunk_tokens)
        for name, sums_K in importance.sums.items():
            gguf_name = architecture.to_gguf_name(name)
            count = np.array([[importance.counts[name]]], np.float32)
            writer.add_tensor(gguf_name + _SUMS, sums_K[None])
            writer.add_tensor(gguf_name + _COUNTS, count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_importance(path: Path, checkpoint: Checkpoint) -> ImportanceMatrix:
    """Return the importance matrix in the file at ``path``, for the matrices of ``checkpoint``.

    Raises:
        ModelError: it is no GGUF file, such as one of llama.cpp's old ``.dat`` files.
        ExportError: it holds something else, or was measured on another model.
    """
    header = read_gguf_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise ExportError(
            f"{path} is a GGUF file but no importance matrix; give one, or measure it with "
            "--calibrate"
        )
    arrays = {entry.name: _read(path, entry) for entry in header.tensors}
    found = ImportanceMatrix(
        dataset=", ".join(header.metadata.get(Keys.IMatrix.DATASETS, [])),
        n_chunks=header.metadata.get(Keys.IMatrix.CHUNK_COUNT, 0),
        chunk_tokens=header.metadata.get(Keys.IMatrix.CHUNK_SIZE, CHUNK_TOKENS),
    )
    for name in checkpoint.shard_of:
        stem = checkpoint.architecture.to_gguf_name(name)
        if stem + _SUMS in arrays and stem + _COUNTS in arrays:
            found.sums[name] = arrays[stem + _SUMS]
            found.counts[name] = float(arrays[stem + _COUNTS].sum())
    _check_fit(path, found, checkpoint)
    return found


def _adder(total_K: torch.Tensor) -> Any:
    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        total_K.add_(args[0].flatten(0, -2).double().square().sum(0))

    return add


def _check_finite(sums: dict[str, torch.Tensor]) -> None:
    if broken := [name for name, total_K in sums.items() if not total_K.isfinite().all()]:
        raise ExportError(
            f"the calibration text drives the input of {broken[0]} to infinity or NaN "
            f"({len(broken)} matrices); the checkpoint is damaged"
        )


def _check_fit(path: Path, found: ImportanceMatrix, checkpoint: Checkpoint) -> None:
    if not found.sums:
        raise ExportError(f"{path} measures no matrix of {checkpoint.folder.name}")
    for name, sums_K in found.sums.items():
        if sums_K.shape != checkpoint.shape(name)[1:]:
            raise ExportError(
                f"{path} has {sums_K.size} columns for {name}, the model has "
                f"{checkpoint.shape(name)[-1]}; it was measured on another model"
            )
        if not (np.isfinite(sums_K).all() and (sums_K >= 0).all()):
            raise ExportError(f"{path} has values for {name} that are no sums of squares")


def _read(path: Path, entry: GgufTensor) -> NDArray[np.float32]:
    if entry.type_name != "F32":
        raise ExportError(f"{path} stores {entry.name} as {entry.type_name}, not as F32")
    n_values = entry.size_bytes // 4
    return np.fromfile(path, np.float32, n_values, offset=entry.offset_bytes)
