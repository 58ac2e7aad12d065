"""Round with data: what calibration text, or a file made from it, does to a plan.

* Q4_0 and text: GPTQ, layer by layer (:mod:`edgekd.export.gptq`).
* Q4_0 and an importance matrix: ggml's weighted search for scales.
* Q4_1, K-quants, and either of them: the same search; from text the matrix is measured first.

The rows are kept in a folder, and both writers and the checks take them from there.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd.errors import DataError, ExportError
from edgekd.export.blocks import dequantize, pack_gguf
from edgekd.export.budget import N_TOKENS as N_BUDGET_TOKENS
from edgekd.export.budget import measure_costs, plan_within
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_options import Budget, CalibrationOptions
from edgekd.export.gptq import round_q4_0_by_gptq
from edgekd.export.importance_matrix import (
    CHUNK_TOKENS,
    ImportanceMatrix,
    measure_importance,
    read_importance,
    write_importance,
)
from edgekd.export.k_quants import MIXTURES, quantize_rows
from edgekd.export.kept_rows import KeptRows
from edgekd.export.layer_by_layer import Grams, round_layer_by_layer
from edgekd.export.plan import Plan
from edgekd.export.round_matrix import rounded_values
from edgekd.export.to_gguf import overhead_bytes
from edgekd.files import atomic_file, sha256_of
from edgekd.progress import Progress, Silence
from edgekd.runtime.tokenizer import FileTokenizer

_EMBEDDING = "model.embed_tokens.weight"


def plan_for_budget(
    checkpoint: Checkpoint,
    plan: Plan,
    budget: Budget,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> Plan:
    """Return ``plan``, which is Q4_0, with 8 bits where calibration text shows the most need.

    Raises:
        ExportError: there is no text, the plan is another, or the budget is too small.
        DataError: the text cannot be read, or is empty.
    """
    if plan.quant != "q4_0" or options.text is None:
        raise ExportError("a size is spent between q4_0 and q8_0, on calibration text; give both")
    ids = read_ids(checkpoint, options.text, N_BUDGET_TOKENS)
    costs_nats = measure_costs(checkpoint, plan, ids, progress)
    return plan_within(checkpoint, plan, budget, overhead_bytes(checkpoint, plan), costs_nats)


def check_options(options: CalibrationOptions, plan: Plan) -> None:
    """Refuse what cannot be meant.

    Raises:
        ExportError: all faults, in one line.
    """
    faults = []
    is_given = options.text is not None or options.imatrix is not None
    if is_given and plan.quant not in ("q4_0", "q4_1", *MIXTURES):
        faults.append(f"{plan.quant} is rounded without data; choose q4_0, q4_1 or a K-quant")
    if is_given and plan.kept is not None:
        faults.append("the student was trained with scales of its own; export it without data")
    if options.text is not None and options.imatrix is not None:
        faults.append("give calibration text or an importance matrix, not both")
    if options.save_imatrix is not None and (options.text is None or plan.quant == "q4_0"):
        faults.append("an importance matrix is measured for q4_1 and K-quants, on calibration text")
    if options.n_tokens < 1:
        faults.append(f"{options.n_tokens} calibration tokens; at least 1 is needed")
    if faults:
        raise ExportError("; ".join(faults))


def calibrate(
    checkpoint: Checkpoint,
    plan: Plan,
    options: CalibrationOptions,
    folder: Path,
    progress: Progress | None = None,
) -> Plan:
    """Return ``plan`` with its matrices rounded by ``options``, their rows kept in ``folder``.

    Raises:
        ExportError: the options contradict each other, or the data does not fit the model.
        DataError: the text cannot be read, or is empty.
    """
    check_options(options, plan)
    progress = progress or Silence()
    if options.imatrix is not None:
        importance = read_importance(options.imatrix, checkpoint)
        kept = KeptRows(
            folder,
            {"method": "importance matrix", "imatrix_sha256": sha256_of(options.imatrix)},
        )
        return _round_by_importance(checkpoint, plan, importance, kept)
    if options.text is None:
        return plan
    ids = read_ids(checkpoint, options.text, options.n_tokens)
    recipe: dict[str, Any] = {
        "method": "gptq" if plan.quant == "q4_0" else "importance matrix",
        "text_sha256": sha256_of(options.text),
        "n_tokens": len(ids),
        "chunk_tokens": CHUNK_TOKENS,
    }
    kept = KeptRows(folder, recipe)
    if plan.quant == "q4_0":
        return _round_by_gptq(checkpoint, plan, ids, kept, progress)
    importance = measure_importance(checkpoint, ids, options.text.name, progress)
    if options.save_imatrix is not None:
        with atomic_file(options.save_imatrix) as partial:
            write_importance(importance, checkpoint.architecture, partial)
    return _round_by_importance(checkpoint, plan, importance, kept)


def _round_by_importance(
    checkpoint: Checkpoint, plan: Plan, importance: ImportanceMatrix, kept: KeptRows
) -> Plan:
    for name, stored in {**plan.grids(), **plan.k_types()}.items():
        mean_K = importance.mean_squares(name)
        if mean_K is not None and stored != "q8_0":
            kept.keep(name, quantize_rows(checkpoint.tensor(name), stored, mean_K))
    return replace(plan, kept=kept)


def _round_by_gptq(
    checkpoint: Checkpoint, plan: Plan, ids: Sequence[int], kept: KeptRows, progress: Progress
) -> Plan:
    ids_BT = torch.tensor(ids).reshape(-1, min(len(ids), CHUNK_TOKENS))

    def round_layer(matrices: dict[str, nn.Linear], grams: Grams) -> None:
        for name, matrix in matrices.items():
            matrix.weight.copy_(_round_one(checkpoint, plan, name, grams[name], kept))

    embedding = _values(checkpoint, plan, _EMBEDDING)
    round_layer_by_layer(checkpoint, ids_BT, embedding, round_layer, progress)
    return replace(plan, kept=kept)


def _round_one(
    checkpoint: Checkpoint, plan: Plan, name: str, gram_KK: torch.Tensor, kept: KeptRows
) -> torch.Tensor:
    """Round the matrix ``name``, keep it where it is Q4_0, and return the values it then has."""
    if plan.grid_of(name) != "q4_0":
        return _values(checkpoint, plan, name)
    if not gram_KK.isfinite().all():
        raise ExportError(
            f"the calibration text drives the input of {name} to infinity or NaN; the checkpoint "
            "is damaged"
        )
    blocks = round_q4_0_by_gptq(checkpoint.tensor(name), gram_KK)
    kept.keep(name, pack_gguf(blocks))
    return dequantize(blocks)


def _values(checkpoint: Checkpoint, plan: Plan, name: str) -> torch.Tensor:
    grid = plan.grid_of(name)
    if grid is None:
        return checkpoint.tensor(name)
    return rounded_values(checkpoint, name, grid, None)


def read_ids(checkpoint: Checkpoint, text: Path, n_tokens: int) -> list[int]:
    """Return the first tokens of ``text``: whole chunks where it fills one.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        content = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} cannot be read as UTF-8 text: {error}") from error
    # A token is rarely longer than 16 characters; the tokenizer need not see a whole library.
    ids = FileTokenizer(checkpoint.folder).encode(content[: 16 * n_tokens])[:n_tokens]
    if not ids:
        raise DataError(f"{text} has no text to calibrate on")
    whole_chunks = len(ids) // CHUNK_TOKENS * CHUNK_TOKENS
    return ids[: whole_chunks or None]
