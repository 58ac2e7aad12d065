"""The protocol of engines that keep many sequences and advance them together.

A slot holds one sequence and its KV cache. One step appends tokens to any of the slots: a
whole prompt, a part of one, or the one token chosen last; all of them share one pass over the
weights. Text, sampling and the order of requests are other modules' business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.engine import Engine

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits

# N outputs of one slot, V vocabulary

KvType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
BATCH_TOKENS = 512  # llama.cpp's own default for n_ubatch
MAX_OUTPUTS = 64  # rows of logits in one step; 512 would take 311 MB at 152,000 tokens


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is set up; what one engine has no use for, it ignores as said here."""

    context_tokens: int = 2048
    """Length that each sequence can reach."""
    n_slots: int = 1
    n_threads: int = 1
    """CPU threads for one token a slot, and for prompts unless ``n_threads_batch`` is set."""
    n_threads_batch: int | None = None
    """CPU threads for prompts (llama.cpp)."""
    gpu_layers: int | None = None
    """Layers on the GPU, -1 for all; None leaves it to the library (llama.cpp)."""
    provider: str = "cpu"
    """Execution provider: ``auto``, ``cpu``, ``qnn`` or another (ONNX)."""
    require_npu: bool = False
    """Refuse to run where the provider leaves a node to the CPU (ONNX)."""
    mmap: bool = True
    """Map the weights instead of reading them (llama.cpp; ONNX Runtime always maps)."""
    kv_type: KvType = "f16"
    """Type of the KV cache (llama.cpp; an ONNX graph brings its own)."""
    flash_attention: bool | None = None
    """None lets llama.cpp choose; quantized KV types need it.

    It rounds to half precision, and differently for one row than for several: without it, and
    with float weights and an f32 cache, a text does not hang on its neighbours.
    """
    unified_kv: bool = False
    """One pool of KV cells for all slots, so that a shared prefix is stored once (llama.cpp).

    A pool for each is faster while most slots are busy: attention reads only its own.
    """

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            RecipeError: one is out of range; all of them are named.
        """
        lowest = {
            "context_tokens": 1,
            "n_slots": 1,
            "n_threads": 1,
            "n_threads_batch": 1,
            "gpu_layers": -1,
        }
        faults = [
            f"{name} is {value}, {low} or more is needed"
            for name, low in lowest.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
        if faults:
            raise RecipeError("these engine settings are out of range: " + "; ".join(faults))


@dataclass(frozen=True)
class Work:
    """What one step does for one slot."""

    slot: int
    ids: Sequence[int]
    """Tokens to append, one or more."""
    n_outputs: int = 1
    """Logits are wanted after the last so many of them; 0 while a prompt is not complete."""


class BatchEngine(Protocol):
    """Turns token ids into logits, keeping the KV caches of many sequences."""

    name: str
    """As in reports: ``torch``, ``llama.cpp`` or ``onnxruntime``."""
    vocab_size: int
    context_tokens: int
    """How many tokens one sequence can have."""
    n_slots: int
    batch_tokens: int
    """How many tokens one step may append, over all slots."""
    max_outputs: int
    """How many rows of logits one step may give, over all slots."""

    def length(self, slot: int) -> int:
        """Return how many tokens ``slot`` holds."""

    def step(self, work: Sequence[Work]) -> "list[Logits]":
        """Append the tokens; return each item's logits [N, V], in the order of ``work``.

        They are valid until the next step, which may write over them.
        """

    def forget(self, slot: int, position: int = 0) -> int:
        """Drop every token from ``position`` on; return how many are left.

        They may be fewer than asked for: some models cannot drop a part of their memory.
        """

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> int:
        """Make ``target`` begin as ``source`` does, drop the rest; return how many tokens."""

    def close(self) -> None:
        """Free the model."""


def check_step(engine: BatchEngine, work: Sequence[Work]) -> None:
    """Refuse a step that the engine has no room for.

    Raises:
        EngineError: a context would overflow, or the step is too large.
    """
    for item in work:
        length = engine.length(item.slot)
        if length + len(item.ids) > engine.context_tokens:
            raise EngineError(
                f"{length} + {len(item.ids)} tokens do not fit into a context of "
                f"{engine.context_tokens}; raise --ctx or shorten the text"
            )
    n_tokens = sum(len(item.ids) for item in work)
    n_outputs = sum(item.n_outputs for item in work)
    if n_tokens > engine.batch_tokens or n_outputs > engine.max_outputs:
        raise EngineError(
            f"one step of {n_tokens} tokens and {n_outputs} rows of logits is too large: "
            f"{engine.batch_tokens} tokens and {engine.max_outputs} rows are allowed; split it"
        )
    assert len({item.slot for item in work}) == len(work), "a slot appears twice in one step"
    assert all(0 <= item.n_outputs <= len(item.ids) > 0 for item in work)


class OneSlotEngine:
    """An engine for one sequence behind the protocol for many: one slot, no copies."""

    n_slots = 1
    batch_tokens = BATCH_TOKENS
    max_outputs = MAX_OUTPUTS

    def __init__(self, engine: Engine) -> None:
        """Wrap ``engine``, which nothing else may use from now on."""
        self._engine = engine
        self.name = engine.name
        self.vocab_size = engine.vocab_size
        self.context_tokens = engine.context_tokens

    def length(self, slot: int) -> int:
        """Return how many tokens the sequence has."""
        return self._engine.position

    def step(self, work: Sequence[Work]) -> "list[Logits]":
        """Append the tokens; return the logits [N, V] of the one item."""
        check_step(self, work)
        return [self._append(item) for item in work]

    def forget(self, slot: int, position: int = 0) -> int:
        """Drop every token from ``position`` on; return how many are left."""
        self._engine.rewind(position)
        return self._engine.position

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> int:
        """Return what is left; there is no other slot to copy from."""
        return self.forget(target, n_tokens)

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def _append(self, item: Work) -> "Logits":
        if item.n_outputs > 1:
            return self._engine.forward(item.ids, every_logit=True)[-item.n_outputs :]
        return self._engine.forward(item.ids)[None][: item.n_outputs]
