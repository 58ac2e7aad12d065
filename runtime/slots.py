"""Which tokens each slot of an engine holds, and which slot a new request gets.

A prompt that begins like another one does not pay for the beginning again: it takes over the
slot that holds it, or a copy of it. A conversation is not thrown away for a short shared start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from edgekd.runtime.batch_engine import BatchEngine

KEEP_SHARE = 0.5
"""A slot is taken over by a prompt that uses at least this share of its tokens."""
WAIT_TOKENS = 32
"""A request waits for another one's prompt if so many more tokens can then be shared."""


@dataclass(frozen=True)
class Claim:
    """A slot for a request, and how much of the prompt it holds already."""

    slot: int
    n_cached: int


class Slots:
    """The slots of one engine; every change to the engine's caches goes through here."""

    def __init__(self, engine: BatchEngine) -> None:
        """Begin with empty, free slots."""
        self._engine = engine
        self._tokens: list[list[int]] = [[] for _ in range(engine.n_slots)]
        self._promised: dict[int, Sequence[int]] = {}  # prompts of busy slots
        self._clock = count(1)
        self._last_used = [0] * engine.n_slots

    def free(self) -> list[int]:
        """Return the slots that no request has."""
        return [slot for slot in range(self._engine.n_slots) if slot not in self._promised]

    def n_tokens(self, slot: int) -> int:
        """Return how many tokens ``slot`` holds."""
        return len(self._tokens[slot])

    def claim(
        self, prompt_ids: Sequence[int], wanted: int | None = None, *, reuse: bool = True
    ) -> Claim | None:
        """Take a slot for ``prompt_ids``; None if none is free, or waiting for one is better.

        The last token of a prompt is always computed, since its logits are needed. ``wanted``
        asks for one slot, ``reuse=False`` for one without a trace of earlier requests.
        """
        free = self.free() if wanted is None else [slot for slot in self.free() if slot == wanted]
        if not free:
            return None
        prompt = list(prompt_ids)
        shared = [common_prefix(prompt[:-1], held) for held in self._tokens]
        if not reuse:
            shared = [0] * len(shared)
        elif self._is_worth_waiting(prompt, max(shared)):
            return None
        target = self._choose(free, shared)
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot == target))
        n_cached = self._prepare(source, target, shared[source])
        self._promised[target] = prompt
        return Claim(target, n_cached)

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """Note that the engine appended ``ids`` to ``slot``."""
        self._tokens[slot].extend(ids)

    def release(self, slot: int) -> None:
        """Make ``slot`` free; it keeps its tokens for the next one who begins so."""
        self._promised.pop(slot, None)
        self._last_used[slot] = next(self._clock)

    def clear(self) -> None:
        """Empty every slot, after an engine failed."""
        for slot in range(self._engine.n_slots):
            self._engine.forget(slot)
            self._tokens[slot] = []

    def _is_worth_waiting(self, prompt: list[int], n_shared_now: int) -> bool:
        """Return whether a running prompt will soon hold much more of ``prompt``."""
        soon = [common_prefix(prompt[:-1], list(each)) for each in self._promised.values()]
        return max(soon, default=0) - n_shared_now >= WAIT_TOKENS

    def _choose(self, free: list[int], shared: list[int]) -> int:
        """Return the free slot of which most is used; where that is little, a cheap one.

        Beside busy slots, since engines do neighbours in one pass; then an empty one; then the
        oldest.
        """
        best = max(free, key=lambda slot: shared[slot])
        if shared[best] and shared[best] >= KEEP_SHARE * len(self._tokens[best]):
            return best
        return min(
            free,
            key=lambda slot: (
                not self._is_beside_busy(slot),
                bool(self._tokens[slot]),
                self._last_used[slot],
            ),
        )

    def _is_beside_busy(self, slot: int) -> bool:
        return slot - 1 in self._promised or slot + 1 in self._promised

    def _prepare(self, source: int, target: int, n_tokens: int) -> int:
        """Make ``target`` hold the first ``n_tokens`` of ``source`` only; return how many."""
        if source == target or n_tokens == 0:
            n_kept = self._engine.forget(target, n_tokens)
        else:
            n_kept = self._engine.copy_prefix(source, target, n_tokens)
        self._tokens[target] = self._tokens[source][:n_kept]
        return n_kept


def common_prefix(first: list[int], second: list[int]) -> int:
    """Return how many tokens both begin with, by halving: slices compare at C speed."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
