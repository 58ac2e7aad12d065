"""Prove that an artifact is what it claims to be, in layers that are never mixed.

* structure: the manifest's hashes, the header, the tokenizer, the chat template;
* weights: codes and scales equal the checkpoint's, rounded by the training grid, bit for bit;
* arithmetic: what the engine adds on top of those weights (int8 activations), as KL and top-1
  against torch running the very same rounded weights;
* and beside them, never as a gate, what the rounding itself costs against the float checkpoint.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgekd.errors import VerificationError
from edgekd.export.blocks import Blocks, fake_quantize, quantize
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import Plan, Quant
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.fidelity import compare_engines
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.model_kind import ModelKind, detect_kind
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
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]


@dataclass(frozen=True)
class _Limit:
    """How far an engine's arithmetic may stray from torch on the same weights."""

    kl_nats: float
    top1_agreement: float


# int8 activations cost KL 0.003-0.005 and 3-5 % of top-1 on a 135M model, measured.
_INT8_ACTIVATIONS = _Limit(0.02, 0.92)
_LIMITS: dict[Quant, _Limit] = {
    "f32": _Limit(1e-4, 0.99),
    "f16": _Limit(1e-4, 0.99),
    "q8_0": _INT8_ACTIVATIONS,
    "q4_0": _INT8_ACTIVATIONS,
}


def verify_against_checkpoint(artifact: Path, checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return the report of every check of ``artifact`` against its ``checkpoint``.

    Raises:
        VerificationError: a check failed; it says which and by how much.
    """
    n_matrices = check_blocks(artifact, checkpoint, plan)
    loaded = open_model(artifact, context_tokens=512)
    try:
        check_text_side(loaded, checkpoint)
        arithmetic, rounding = _measure(loaded, checkpoint, plan)
    finally:
        loaded.engine.close()
    limit = _LIMITS[plan.quant]
    if arithmetic["kl_nats"] > limit.kl_nats or arithmetic["top1_agreement"] < limit.top1_agreement:
        raise VerificationError(
            f"{artifact} strays from its own weights in torch: KL {arithmetic['kl_nats']:.2e} nats "
            f"(limit {limit.kl_nats}), top-1 {arithmetic['top1_agreement']:.1%} (limit "
            f"{limit.top1_agreement:.0%}); do not ship it, report the model"
        )
    return {
        "equal_matrices": n_matrices,
        "tokenizer": "equal ids",
        "arithmetic": arithmetic,
        "rounding": rounding,
        "limits": asdict(limit),
    }


def check_blocks(artifact: Path, checkpoint: Checkpoint, plan: Plan) -> int:
    """Return how many matrices carry exactly the codes and scales that ``plan`` asks for.

    Raises:
        VerificationError: one differs, or is missing.
    """
    if detect_kind(artifact) is ModelKind.GGUF:
        found = dict(read_gguf_blocks(artifact, checkpoint))
    else:
        found = dict(read_onnx_blocks(artifact))
    # A tied head is stored under the embedding's name in both formats.
    for name, grid in plan.grids().items():
        expected = quantize(checkpoint.tensor(name), grid)
        stored = found.get(name)
        is_lookup_only = name == "model.embed_tokens.weight" and not checkpoint.is_tied
        if stored is None and is_lookup_only and detect_kind(artifact) is ModelKind.ONNX:
            continue
        if stored is None or not blocks_equal(stored, expected):
            raise VerificationError(f"{artifact}: matrix {name} is not the checkpoint's on {grid}")
    return len(found)


def blocks_equal(one: Blocks, other: Blocks) -> bool:
    """Return whether two matrices have the same codes and, bit for bit, the same scales."""
    return (
        one.grid == other.grid
        and torch.equal(one.codes_NBK, other.codes_NBK)
        and torch.equal(one.scales_NB.view(torch.int16), other.scales_NB.view(torch.int16))
    )


def check_text_side(loaded: LoadedModel, checkpoint: Checkpoint) -> None:
    """Compare token ids and rendered chats of the artifact with the checkpoint's.

    Raises:
        VerificationError: they differ; the first difference is shown.
    """
    tokenizer = FileTokenizer(checkpoint.folder)
    for text in PROBE_TEXTS:
        expected, found = tokenizer.encode(text), loaded.tokenizer.encode(text)
        if expected != found:
            raise VerificationError(
                f"{loaded.path} tokenizes {text[:24]!r} as {found[:8]}, the checkpoint as "
                f"{expected[:8]}"
            )
    template = read_chat_template(checkpoint.folder)
    wanted = template.render(_CONVERSATION) if template else None
    rendered = loaded.chat_template.render(_CONVERSATION) if loaded.chat_template else None
    if wanted != rendered:
        raise VerificationError(f"{loaded.path} renders chats unlike its checkpoint")


def _measure(
    loaded: LoadedModel, checkpoint: Checkpoint, plan: Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the engine's distance from the rounded weights, and theirs from the float ones."""
    sequences = [loaded.tokenizer.encode(text) for text in PROBE_TEXTS]
    rounded = TorchEngine(rounded_model(checkpoint, plan), 512)
    arithmetic = compare_engines(rounded, loaded.engine, sequences)
    exact = TorchEngine(load_causal_lm(checkpoint.folder, torch.float32), 512)
    rounding = compare_engines(exact, rounded, sequences)
    return asdict(arithmetic), asdict(rounding)


def rounded_model(checkpoint: Checkpoint, plan: Plan) -> Any:
    """Return the checkpoint in torch, float32, with every matrix of ``plan`` on its grid."""
    model = load_causal_lm(checkpoint.folder, torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, grid in plan.grids().items():
            parameters[name].copy_(fake_quantize(parameters[name], grid))
    return model
