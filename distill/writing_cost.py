"""What it costs that the student writes some of its text itself, for ``--plan``.

A step of generation reads every weight once, whatever the number of texts, and starts each layer's
operations anew: its time is that of memory and of the interpreter, not of matrix products.
"""

from dataclasses import dataclass

from edgekd.distill.machines import Machine
from edgekd.distill.recipe import Recipe
from edgekd.export.checkpoint import Checkpoint

_WEIGHT_BYTES = 4  # masters are float32
_LAYER_S = 4e-4  # of transformers' eager layers beside their products: benchmarks/results/plan.json


@dataclass(frozen=True)
class WritingCost:
    """Means over all micro-batches of a run, written ones and others."""

    learned_tokens: float
    """Of those that a batch of text has."""
    work: float
    """Of the work that a batch of text takes: written ones are shorter."""
    seconds: float
    """What generation adds."""


def writing_cost(
    recipe: Recipe, student: Checkpoint, machine: Machine, samples_per_row: float
) -> WritingCost:
    """Return what on-policy data changes, were no text ended by a stop token.

    ``samples_per_row`` is how many texts a row of the data holds, each of them begun anew.
    """
    new_tokens = min(recipe.on_policy_tokens, recipe.row_tokens - 1)
    room = recipe.rows_per_step * recipe.row_tokens
    text_tokens = recipe.on_policy_prompt_tokens + new_tokens
    n_texts = max(1.0, min(samples_per_row * recipe.rows_per_step, room // text_tokens))
    written = n_texts * new_tokens
    # A share of the learned tokens is asked for; batches hold different numbers of them.
    asked, plain = recipe.on_policy * room, (1 - recipe.on_policy) * written
    share = asked / (asked + plain)
    used = n_texts * text_tokens / room
    token_s = (
        student.n_parameters * _WEIGHT_BYTES / machine.read_bytes_per_s
        + student.n_layers * _LAYER_S
    )
    return WritingCost(
        learned_tokens=share * written + (1 - share) * room,
        work=share * used + (1 - share),
        seconds=share * new_tokens * token_s,
    )
