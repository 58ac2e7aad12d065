"""Which form each weight takes in an artifact: the plan that both formats follow."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from edgekd.errors import ExportError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.grid_rows import BITS, BLOCK_SIZE, GridName
from edgekd.export.k_quants import K_TYPES, MIXTURES, KType, Mixture, mixture_types
from edgekd.export.kept_rows import KeptRows

Quant = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q5_k_m", "q6_k"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
HeadQuant = Literal["q8_0", "q4_0"]
_ALIASES: dict[str, Quant] = {"int4": "q4_0", "int8": "q8_0"}

# The embedding and the head carry most of a small model's error: unless asked otherwise they stay
# at 8 bits, as in llama.cpp's own recipe for models trained on Q4_0. At 4 bits a small model is
# faster and smaller.
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Plan:
    """Checkpoint tensor name to the type it is stored in."""

    quant: Quant
    types: dict[str, str]
    """Of each tensor: f32, f16, bf16, a grid, or in GGUF one of ggml's other types."""
    head: HeadQuant = "q8_0"
    """Of embedding and head, where the other matrices have 4 bits."""
    fallen: tuple[str, ...] = ()
    """Matrices that are stored in a larger type, their rows being no multiple of 256."""
    budget: dict[str, Any] | None = None
    """What the choice of types cost, where a size was given; for the manifest."""
    kept: KeptRows | None = None
    """Matrices that were rounded beforehand, on calibration data."""

    def grid_of(self, name: str) -> GridName | None:
        """Return the grid of the tensor ``name``; none where it is stored as float."""
        return next((grid for grid in BITS if grid == self.types[name]), None)

    def k_types(self) -> dict[str, KType]:
        """Return the tensors that have one of ggml's other types."""
        return {name: kind for name in self.types if (kind := _as_k_type(self.types[name]))}

    def grids(self) -> dict[str, GridName]:
        """Return the tensors that lie on a grid."""
        return {name: grid for name in self.types if (grid := self.grid_of(name))}


def _as_k_type(stored: str) -> KType | None:
    return next((known for known in K_TYPES if known == stored), None)


def parse_quant(name: str) -> Quant:
    """Return the type called ``name``, in any case and by its aliases int4 and int8.

    Raises:
        ExportError: there is no such type.
    """
    lowered = name.lower()
    quant = _ALIASES.get(lowered, lowered)
    if quant not in QUANTS:
        raise ExportError(
            f"unknown quantization {name!r}; choose one of {', '.join((*QUANTS, *_ALIASES))}"
        )
    return quant


def make_plan(checkpoint: Checkpoint, quant: Quant, head: HeadQuant = "q8_0") -> Plan:
    """Return the plan for ``checkpoint``: norms and biases float32, matrices as ``quant`` says.

    Raises:
        ExportError: a matrix has rows that the grid cannot hold.
    """
    if quant in MIXTURES:
        return _mixture_plan(checkpoint, quant)
    types: dict[str, str] = {}
    faults = []
    for name in checkpoint.shard_of:
        shape = checkpoint.shape(name)
        stored = _type_of(name, len(shape), quant, head)
        if stored in BITS and shape[1] % BLOCK_SIZE:
            faults.append(f"{name} has rows of {shape[1]}")
        types[name] = stored
    if faults:
        raise ExportError(
            f"{quant} needs rows that are a multiple of {BLOCK_SIZE}, but {'; '.join(faults[:3])}"
            f"{' and more' if len(faults) > 3 else ''}; export as f16"
        )
    return Plan(quant, types, head)


def recorded_plan(checkpoint: Checkpoint, recipe: dict[str, Any]) -> Plan:
    """Return the plan that the ``recipe`` in an artifact's manifest tells.

    Raises:
        ExportError: the recipe is of another model.
    """
    plan = make_plan(checkpoint, parse_quant(recipe["quant"]), recipe.get("head", "q8_0"))
    if "budget" not in recipe:
        return plan
    if set(recipe["tensor_types"]) != set(plan.types):
        raise ExportError("the manifest's tensors are not those of the reference")
    return replace(plan, types=dict(recipe["tensor_types"]))


def describe_rounding(plan: Plan) -> dict[str, Any]:
    """Return what a manifest says of calibration and budget; nothing for plain rounding."""
    calibration = {} if plan.kept is None else {"calibration": plan.kept.describe()}
    return calibration if plan.budget is None else {**calibration, "budget": plan.budget}


def _mixture_plan(checkpoint: Checkpoint, quant: Mixture) -> Plan:
    matrices, fallen = mixture_types(checkpoint, quant)
    types = {name: matrices.get(name, "f32") for name in checkpoint.shard_of}
    return Plan(quant, types, fallen=tuple(fallen))


def _type_of(name: str, n_dims: int, quant: Quant, head: HeadQuant) -> Quant:
    if n_dims == 1:
        return "f32"
    if quant in ("q4_0", "q4_1") and name in _OUTER:
        return head
    return quant
