"""Prove that an artifact is what it claims to be, in layers that are never mixed.

* structure: the manifest's hashes, the header, the tokenizer, the chat template;
* weights: codes and scales equal the checkpoint's, rounded by the training grid or on
  calibration data, bit for bit, and so do the numbers that they stand for, norms and biases too;
* arithmetic: what the engine adds on top of those weights (int8 activations), as KL, top-1 and
  perplexity against torch running the very same rounded weights;
* and beside them, never as a gate, what the rounding itself costs against the float checkpoint.
"""

import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.errors import VerificationError
from edgekd.export.blocks import Blocks
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.input_faults import check_input
from edgekd.export.kept_rows import keep_as_recorded
from edgekd.export.plan import Plan, Quant, recorded_plan
from edgekd.export.probe_chats import rendered_chats
from edgekd.export.read_back import (
    read_gguf_blocks,
    read_gguf_rows,
    read_onnx_blocks,
    read_rows,
)
from edgekd.export.round_matrix import matrix_blocks, matrix_rows
from edgekd.export.rounded_model import rounded_model
from edgekd.export.tensor_hashes import hash_and_compare
from edgekd.export.verify_npu import can_run, verify_on_npu
from edgekd.manifest import TENSORS_KEY
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.fidelity import Fidelity, GreedyAgreement, compare_engines, compare_greedy
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.model_kind import ModelKind, detect_kind
from edgekd.runtime.static_model import is_static, read_static
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

# Texts on which splitters, merges and byte fallbacks of different tokenizers part ways.
PROBE_TEXTS = (
    "The mitochondrion is the powerhouse of the cell; in 1953 Watson and Crick described DNA.",
    "def fibonacci(n):\n\tif n < 2:\n\t\treturn n\n    return fibonacci(n - 1) + fibonacci(n-2)\n",
    "Die Straße ist 3,14 km lang \u2014 \u00fcber \u00b2 und \u00bd. \u00a1Ol\u00e9!",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3001\u4e2d\u6587\u53e5\u5b50\uff0c\ud55c\uad6d\uc5b4 "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa   three   spaces"
    "\r\n\r\n\ttabs 1234567 12.5% can't I'LL they'RE",
)
_N_GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Limit:
    """How far an engine's arithmetic may stray from torch on the same weights."""

    kl_nats: float
    top1_agreement: float
    """Over many positions; fewer leave room for chance."""
    greedy_gap_nats: float
    """How much better than the engine's greedy choice torch may find another token."""

    def top1_floor(self, n_positions: int) -> float:
        """Return the limit for ``n_positions``: three standard errors below the long-run one."""
        share = self.top1_agreement
        return share - 3 * math.sqrt(share * (1 - share) / n_positions)

    def perplexity_ceiling(self, n_positions: int) -> float:
        """Return how many times the perplexity of torch is still within the limit.

        Of a token that is drawn from the reference, a small KL is the mean of what the candidate
        gives it less, and twice the KL the variance: three standard errors of that.
        """
        return math.exp(self.kl_nats + 3 * math.sqrt(2 * self.kl_nats / n_positions))


_FLOAT = Limit(1e-4, 0.995, 0.1)
# int8 activations cost KL 0.003-0.005 and 3-5 % of top-1 on a 135M model, measured over 2,048
# positions: benchmarks/results/export_fidelity.json.
_INT8_ACTIVATIONS = Limit(0.02, 0.94, 1.0)
# Graphs for NPUs calculate in fp16, whatever their weights are.
_FP16_THROUGHOUT = Limit(1e-3, 0.98, 0.3)
# Texts that calibration did not see may reach beyond its ranges, where values are cut off.
_INT16_ACTIVATIONS = Limit(0.01, 0.95, 0.5)
# llama.cpp rounds activations to bf16 too, where the weights are: eight bits, not eleven.
_BF16_ACTIVATIONS = Limit(2e-3, 0.97, 0.3)
_LIMITS: dict[Quant, Limit] = {
    "f32": _FLOAT,
    "f16": _FLOAT,
    "bf16": _BF16_ACTIVATIONS,
    "q8_0": _INT8_ACTIVATIONS,
    "q4_0": _INT8_ACTIVATIONS,
    "q4_1": _INT8_ACTIVATIONS,
    "q4_k_m": _INT8_ACTIVATIONS,
    "q5_k_m": _INT8_ACTIVATIONS,
    "q6_k": _INT8_ACTIVATIONS,
}


def verify_against_checkpoint(
    artifact: Path, checkpoint: Checkpoint, plan: Plan, *, on_npu: bool = True
) -> dict[str, Any]:
    """Return the report of every check of ``artifact`` against its ``checkpoint``.

    Binaries for an NPU are run too, a few tokens, where QNN is installed and ``on_npu``.

    Raises:
        VerificationError: a check failed; it says which and by how much.
    """
    n_matrices = check_blocks(artifact, checkpoint, plan)
    rounded = rounded_model(checkpoint, plan)
    hashes = hash_and_compare(artifact, checkpoint, plan, dict(rounded.named_parameters()))
    loaded = open_model(artifact, context_tokens=512)
    try:
        check_text_side(loaded, checkpoint)
        arithmetic, greedy, rounding = _measure(loaded, checkpoint, rounded)
    finally:
        loaded.engine.close()
    limit = _limit_of(artifact, plan)
    if faults := limit_faults(arithmetic, greedy, limit):
        raise VerificationError(
            f"{artifact.name} strays from its own weights in torch: {'; '.join(faults)}; do not "
            "ship it, report the model"
        )
    return {
        "equal_matrices": n_matrices,
        TENSORS_KEY: hashes,
        "tokenizer": "equal ids",
        "arithmetic": asdict(arithmetic),
        "greedy": asdict(greedy),
        "rounding": asdict(rounding),
        "limits": {
            **asdict(limit),
            "top1_floor": limit.top1_floor(arithmetic.n_positions),
            "perplexity_ceiling": limit.perplexity_ceiling(arithmetic.n_positions),
        },
        **(verify_on_npu(artifact, checkpoint, plan) if on_npu and can_run(artifact) else {}),
    }


def _limit_of(artifact: Path, plan: Plan) -> Limit:
    if not is_static(artifact):
        return _LIMITS[plan.quant]
    is_rounded = read_static(artifact).activations == "a16"
    return _INT16_ACTIVATIONS if is_rounded else _FP16_THROUGHOUT


def verify_as_recorded(
    artifact: Path, reference: Path, recipe: dict[str, Any], *, on_npu: bool = True
) -> dict[str, Any]:
    """Return the report of every check of ``artifact``, with the plan that its manifest records.

    Matrices that were rounded on calibration data are held against the hashes recorded then.

    Raises:
        VerificationError: a check failed; it says which and by how much.
        ModelError: the reference itself is damaged.
    """
    checkpoint = open_checkpoint(reference)
    check_input(checkpoint)
    plan = recorded_plan(checkpoint, recipe)
    recorded = recipe.get("calibration")
    if recorded is None:
        return verify_against_checkpoint(artifact, checkpoint, plan, on_npu=on_npu)
    with tempfile.TemporaryDirectory(prefix="edgekd-rows-") as folder:
        kept = keep_as_recorded(Path(folder), recorded, read_rows(artifact, checkpoint))
        plan = replace(plan, kept=kept)
        return verify_against_checkpoint(artifact, checkpoint, plan, on_npu=on_npu)


def limit_faults(arithmetic: Fidelity, greedy: GreedyAgreement, limit: Limit) -> list[str]:
    """Return every figure that is out of ``limit``, with the limit."""
    floor = limit.top1_floor(arithmetic.n_positions)
    faults = []
    if not arithmetic.kl_nats <= limit.kl_nats:  # so written, NaN is a fault
        faults.append(f"KL {arithmetic.kl_nats:.2e} nats, limit {limit.kl_nats}")
    if not arithmetic.top1_agreement >= floor:
        faults.append(f"top-1 {arithmetic.top1_agreement:.1%}, limit {floor:.1%}")
    ratio, ceiling = arithmetic.perplexity_ratio, limit.perplexity_ceiling(arithmetic.n_positions)
    if ratio is not None and not ratio <= ceiling:
        faults.append(f"perplexity {ratio:.4f} times as high, limit {ceiling:.4f}")
    if not greedy.worst_gap_nats <= limit.greedy_gap_nats:
        faults.append(
            f"a greedy choice {greedy.worst_gap_nats:.2f} nats below the best token, limit "
            f"{limit.greedy_gap_nats}"
        )
    return faults


def check_blocks(artifact: Path, checkpoint: Checkpoint, plan: Plan) -> int:
    """Return how many matrices carry exactly the codes and scales that ``plan`` asks for.

    Raises:
        VerificationError: one differs, or is missing.
    """
    if detect_kind(artifact) is ModelKind.GGUF:
        found = read_gguf_blocks(artifact, checkpoint)
    else:
        found = read_onnx_blocks(artifact)
    # A tied head is stored under the embedding's name in both formats.
    grids, seen, faulty = plan.grids(), set(), set()
    for name, stored in found:  # graphs of one folder hold the same matrix, each of them is held up
        seen.add(name)
        grid = grids.get(name)
        if grid and not blocks_equal(stored, matrix_blocks(checkpoint, name, grid, plan.kept)):
            faulty.add(name)
    for name in grids:
        if name in faulty or name not in seen:
            raise VerificationError(
                f"{artifact.name}: matrix {name} is not the checkpoint's on {grids[name]}"
            )
    return len(seen) + _check_rows(artifact, checkpoint, plan)


def _check_rows(artifact: Path, checkpoint: Checkpoint, plan: Plan) -> int:
    """Return how many matrices of ggml's other types hold the bytes that they should."""
    kinds = plan.k_types()
    stored = dict(read_gguf_rows(artifact, checkpoint)) if kinds else {}
    for name, kind in kinds.items():
        rows = stored.get(name)
        expected = matrix_rows(checkpoint, name, kind, plan.kept)
        if rows is None or not np.array_equal(rows, expected):
            raise VerificationError(
                f"{artifact.name}: matrix {name} is not the checkpoint's as {kind}"
            )
    return len(kinds)


def blocks_equal(one: Blocks, other: Blocks) -> bool:
    """Return whether two matrices have the same codes and, bit for bit, the same scales."""
    return (
        one.grid == other.grid
        and torch.equal(one.codes_NBK, other.codes_NBK)
        and torch.equal(one.scales_NB.view(torch.int16), other.scales_NB.view(torch.int16))
        and _mins_equal(one.mins_NB, other.mins_NB)
    )


def _mins_equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Compare as numbers: a zero point has no sign, a minimum of zero may have."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def check_text_side(loaded: LoadedModel, checkpoint: Checkpoint) -> None:
    """Compare token ids, rendered chats and stop tokens of the artifact with the checkpoint's.

    Raises:
        VerificationError: they differ; the first difference is shown.
    """
    tokenizer = FileTokenizer(checkpoint.folder)
    template = read_chat_template(checkpoint.folder)
    wanted = rendered_chats(template)
    if wanted != rendered_chats(loaded.chat_template):
        raise VerificationError(f"{loaded.path.name} renders chats unlike its checkpoint")
    for text in (*PROBE_TEXTS, *filter(None, wanted)):
        expected, found = tokenizer.encode(text), loaded.tokenizer.encode(text)
        if expected != found:
            raise VerificationError(
                f"{loaded.path.name} tokenizes {text[:24]!r} as {found[:8]}, the checkpoint as "
                f"{expected[:8]}"
            )
    if lost := tokenizer.stop_ids - loaded.tokenizer.stop_ids:
        raise VerificationError(f"{loaded.path.name} would not stop at tokens {sorted(lost)}")


def _measure(
    loaded: LoadedModel, checkpoint: Checkpoint, rounded_weights: Any
) -> tuple[Fidelity, GreedyAgreement, Fidelity]:
    """Return the engine's distance from the rounded weights, and theirs from the float ones."""
    room = loaded.engine.context_tokens - _N_GREEDY_TOKENS
    sequences = [loaded.tokenizer.encode(text)[:room] for text in PROBE_TEXTS]
    rounded = TorchEngine(rounded_weights, 512)
    arithmetic = compare_engines(rounded, loaded.engine, sequences)
    prompts = [ids[: len(ids) // 2] for ids in sequences[:2]]
    greedy = compare_greedy(rounded, loaded.engine, prompts, _N_GREEDY_TOKENS)
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), 512)
    return arithmetic, greedy, compare_engines(exact, rounded, sequences)
