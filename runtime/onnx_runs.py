"""How one step over many slots becomes runs of an ONNX graph, which wants equal rows.

A run covers neighbouring slots, since their KV caches lie side by side in one buffer. Rows that
have fewer tokens than the longest are padded on the right: what padding writes into the cache
lies behind the row's real tokens, is never attended to, and is overwritten by the next step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgekd.runtime.batch_engine import Work

MAX_IDLE_ROWS = 2
"""Slots without work between two with work; more are cheaper left out by a second run."""
MAX_PADDING = 1.5
"""How many times the real tokens a run of prompts may compute."""


@dataclass(frozen=True)
class Run:
    """One call of the graph: rows ``first`` to ``last``, ``n_tokens`` wide."""

    first: int
    last: int
    n_tokens: int
    items: tuple[Work, ...]


def plan_runs(
    work: Sequence[Work],
    lengths: Sequence[int],
    context_tokens: int,
    *,
    never_alone: bool = False,
) -> list[Run]:
    """Return the runs that do ``work`` for slots that hold ``lengths`` tokens.

    Single tokens go together, whatever the slots hold. Prompts go together only from an empty
    cache, as GroupQueryAttention wants it; a prompt that continues one goes alone. With
    ``never_alone`` a single token takes an idle slot along, where one beside it has room.
    """
    runs: list[Run] = []
    for item in sorted(work, key=lambda item: (len(item.ids) > 1, item.slot)):
        joined = _join(runs[-1], item, lengths) if runs else None
        if joined and _has_room(joined, lengths, context_tokens):
            runs[-1] = joined
        else:
            runs.append(Run(item.slot, item.slot, len(item.ids), (item,)))
    if never_alone:
        single = {item.slot for item in work if len(item.ids) == 1}
        idle = {
            slot
            for slot, length in enumerate(lengths)
            if slot not in single and length < context_tokens
        }
        runs = [_in_company(run, idle) for run in runs]
    return runs


def _in_company(run: Run, idle: set[int]) -> Run:
    if run.n_tokens > 1 or run.first < run.last:
        return run
    beside = (slot for slot in (run.first + 1, run.first - 1) if slot in idle)
    other = next(beside, run.first)
    return replace(run, first=min(run.first, other), last=max(run.last, other))


def _join(run: Run, item: Work, lengths: Sequence[int]) -> Run | None:
    """Return ``run`` with one more item; None where that is slower or not possible."""
    joined = Run(run.first, item.slot, max(run.n_tokens, len(item.ids)), (*run.items, item))
    n_rows = joined.last - joined.first + 1
    if item.slot - run.last > MAX_IDLE_ROWS + 1:
        return None
    if joined.n_tokens == 1:
        return joined
    are_new = all(len(each.ids) > 1 and lengths[each.slot] == 0 for each in joined.items)
    n_real = sum(len(each.ids) for each in joined.items)
    is_cheap = n_rows * joined.n_tokens <= MAX_PADDING * n_real
    # An idle row between would have to be empty too.
    return joined if are_new and is_cheap and n_rows == len(joined.items) else None


def _has_room(run: Run, lengths: Sequence[int], context_tokens: int) -> bool:
    """Return whether the padding of every row fits into its cache."""
    rows = range(run.first, run.last + 1)
    return all(lengths[row] + run.n_tokens <= context_tokens for row in rows)
