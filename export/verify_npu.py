"""Run binaries for an NPU on a few tokens and hold them against the CPU and against torch.

On an x86 machine QNN is an emulator that takes seconds a token: a prompt of one piece and two
single tokens touch every node of both graphs. Its time says nothing about a chip and is not kept.
"""

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import VerificationError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import Plan
from edgekd.export.rounded_model import rounded_model
from edgekd.runtime.engine import Engine
from edgekd.runtime.fidelity import Fidelity, kl_per_token, log_softmax
from edgekd.runtime.npu_engine import NpuEngine
from edgekd.runtime.providers import PROVIDERS, is_emulated
from edgekd.runtime.static_model import Activations, is_static, read_static
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# T tokens, V vocabulary

_TEXT = (
    "The mitochondrion is the powerhouse of the cell; in 1953 Watson and Crick described the "
    "structure of DNA, the molecule that carries the instructions for growth in all organisms."
)
_N_SINGLE_TOKENS = 2


@dataclass(frozen=True)
class NpuLimit:
    """How far an NPU may stray from the CPU and from torch, both on the same weights."""

    kl_nats: float
    near_tie_nats: float
    """Two tokens this close may change places."""


_LIMITS: dict[Activations, NpuLimit] = {
    # fp16 activations cost 2e-4 on a model of 135M.
    "fp16": NpuLimit(1e-3, 0.05),
    "a16": NpuLimit(1e-2, 0.5),
}


def can_run(artifact: Path) -> bool:
    """Whether ``artifact`` holds binaries that this machine has the libraries for."""
    plugin = str(PROVIDERS["qnn"].plugin)
    return (
        is_static(artifact)
        and read_static(artifact).compiled is not None
        and find_spec(plugin) is not None
    )


def verify_on_npu(folder: Path, checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return how the compiled graphs in ``folder`` compare, and where that was seen.

    Raises:
        VerificationError: they stray from the same weights in torch, or from the CPU.
        EngineError: QNN leaves a node to the CPU, or cannot run them.
    """
    model = read_static(folder)
    n_tokens = min(model.prefill_tokens, model.context_tokens - _N_SINGLE_TOKENS)
    ids = FileTokenizer(folder).encode(_TEXT)[: n_tokens + _N_SINGLE_TOKENS]
    engine = NpuEngine(folder, model.context_tokens, 1, "qnn", require_npu=True)
    npu_TV = _logits(engine, ids)
    placed = engine.provider_use.nodes
    engine.close()
    cpu_TV = _logits(NpuEngine(folder, model.context_tokens, 1, "cpu"), ids)
    torch_TV = _logits(TorchEngine(rounded_model(checkpoint, plan), len(ids)), ids)
    to_torch, to_cpu = fidelity(torch_TV, npu_TV), fidelity(cpu_TV, npu_TV)
    gap_nats = worst_gap_nats(torch_TV, npu_TV)
    limit = _LIMITS[model.activations]
    if faults := npu_faults(to_torch, to_cpu, gap_nats, limit):
        raise VerificationError(
            f"{folder.name} strays from its own weights on the NPU: {'; '.join(faults)}; do not "
            "ship it, report the model"
        )
    return {
        "on_npu": {
            "label": "verified-in-emulator" if is_emulated("qnn") else "verified-on-device",
            "to_torch": asdict(to_torch),
            "to_onnx_cpu": asdict(to_cpu),
            "worst_gap_nats": gap_nats,
            "limits": asdict(limit),
            "placement": placed,
        }
    }


def npu_faults(to_torch: Fidelity, to_cpu: Fidelity, gap_nats: float, limit: NpuLimit) -> list[str]:
    """Return every figure that is out of ``limit``, with the limit."""
    faults = [
        f"KL {seen.kl_nats:.2e} nats to {name}, limit {limit.kl_nats}"
        for name, seen in (("torch", to_torch), ("the CPU", to_cpu))
        if not seen.kl_nats <= limit.kl_nats  # so written, NaN is a fault
    ]
    if not gap_nats <= limit.near_tie_nats:
        faults.append(
            f"a best token {gap_nats:.2f} nats below torch's, limit {limit.near_tie_nats}"
        )
    return faults


def fidelity(reference_TV: "Logits", candidate_TV: "Logits") -> Fidelity:
    """Return the distance between logits over the same positions."""
    kl_T = kl_per_token(log_softmax(reference_TV), log_softmax(candidate_TV))
    same_T = reference_TV.argmax(-1) == candidate_TV.argmax(-1)
    return Fidelity(float(kl_T.mean()), float(same_T.mean()), len(kl_T))


def worst_gap_nats(reference_TV: "Logits", candidate_TV: "Logits") -> float:
    """Return by how much the reference prefers its own best token, at worst."""
    log_p_TV = log_softmax(reference_TV)
    chosen_T = candidate_TV.argmax(-1)
    return float((log_p_TV.max(-1) - log_p_TV[np.arange(len(chosen_T)), chosen_T]).max())


def _logits(engine: Engine, ids: list[int]) -> "Logits":
    """Return the logits after each token; the last ones go in one by one."""
    engine.rewind()
    start = len(ids) - _N_SINGLE_TOKENS
    first_TV = engine.forward(ids[:start], every_logit=True)
    rest_TV = [engine.forward([token_id])[None] for token_id in ids[start:]]
    return np.concatenate([first_TV, *rest_TV])
