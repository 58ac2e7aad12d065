"""Many sequences of one ONNX folder, on plain ONNX Runtime.

The KV caches of all slots lie in one buffer per layer and side, bound as past and present of
every run: where GroupQueryAttention sees the same memory on both sides, it writes in place and
nothing is copied per token. Bindings are made once for every range of slots.

That holds on the CPU; on other execution providers a folder gets one sequence (batch_loading).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.errors import EngineError
from edgekd.runtime.batch_engine import (
    BATCH_TOKENS,
    MAX_OUTPUTS,
    EngineOptions,
    Work,
    check_step,
)
from edgekd.runtime.huge_pages import in_huge_pages
from edgekd.runtime.onnx_engine import CacheBinding, allocate_cache, input_names, open_session
from edgekd.runtime.onnx_inputs import Mask, StepInputs, make_inputs
from edgekd.runtime.onnx_runs import Run, plan_runs
from edgekd.runtime.tokenizer import read_json

if TYPE_CHECKING:
    from edgekd.runtime.engine import Logits
    from edgekd.runtime.onnx_inputs import Arrays

# R rows (slots of a run), S tokens of a row, C context, H heads, D head size
# N outputs of one slot, V vocabulary


class OnnxBatchEngine:
    """One ONNX model with the KV caches of many sequences."""

    name = "onnxruntime"
    batch_tokens = BATCH_TOKENS

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        """Load the model in ``folder``; its trained context bounds ``context_tokens``.

        Raises:
            ModelError: ONNX Runtime refuses the model, or it is no decoder.
            RecipeError: the execution provider is not known or not installed.
        """
        config = read_json(folder / "config.json")
        with in_huge_pages():
            self._session = open_session(
                folder, options.n_threads, options.provider, require_npu=options.require_npu
            )
        self.vocab_size = int(config["vocab_size"])
        self.context_tokens = min(options.context_tokens, int(config["max_position_embeddings"]))
        self.n_slots = options.n_slots
        self.max_outputs = max(MAX_OUTPUTS, options.n_slots)
        self._inputs = input_names(self._session)
        self._cache = allocate_cache(self._session, self.n_slots, self.context_tokens)
        self._bindings: dict[tuple[int, int], CacheBinding] = {}
        self._steps: dict[tuple[int, int], StepInputs] = {}
        self._mask = Mask(self.n_slots, self.context_tokens)
        self._lengths = [0] * options.n_slots
        self._never_alone = False
        if self.n_slots > 1:
            self._never_alone = self._one_row_is_summed_otherwise()

    def length(self, slot: int) -> int:
        """Return how many tokens ``slot`` holds."""
        return self._lengths[slot]

    def step(self, work: Sequence[Work]) -> "list[Logits]":
        """Append the tokens; return each item's logits [N, V], in the order of ``work``."""
        check_step(self, work)
        found: dict[int, Logits] = {}
        runs = plan_runs(work, self._lengths, self.context_tokens, never_alone=self._never_alone)
        for run in runs:
            found |= self._run(run)
            for item in run.items:
                self._lengths[item.slot] += len(item.ids)
        return [found[item.slot] for item in work]

    def forget(self, slot: int, position: int = 0) -> int:
        """Drop every token from ``position`` on: later steps overwrite them."""
        self._lengths[slot] = min(position, self._lengths[slot])
        return self._lengths[slot]

    def copy_prefix(self, source: int, target: int, n_tokens: int) -> int:
        """Make ``target`` begin as ``source`` does, drop the rest; return how many tokens."""
        n_tokens = min(n_tokens, self._lengths[source])
        for rows_RHCD in self._cache.values():
            rows_RHCD[target, :, :n_tokens] = rows_RHCD[source, :, :n_tokens]
        self._lengths[target] = n_tokens
        return n_tokens

    def close(self) -> None:
        """Free the model and the caches."""
        self._bindings.clear()
        self._steps.clear()
        self._cache.clear()
        self._session = None

    def _one_row_is_summed_otherwise(self) -> bool:
        """Return whether a text would get other logits beside another than alone.

        Processors without VNNI have a kernel of its own for one row of an int4 product, which sums
        in another order. A last bit decides now and then how an activation is rounded to int8, and
        that changes all that follows.
        """
        import numpy as np

        item = Work(0, (0,), 1)
        alone, beside = (self._run(Run(0, last, 1, (item,)))[0] for last in (0, 1))
        return not np.array_equal(alone, beside)

    def _run(self, run: Run) -> "dict[int, Logits]":
        """Return the logits of every slot in ``run``."""
        binding = self._binding(run.first, run.last)
        n_kept = run.n_tokens
        if "logits_to_keep" in self._inputs:
            most = max(run.n_tokens - len(item.ids) + item.n_outputs for item in run.items)
            # The graph takes 0 for all, and its head is a matrix of as many rows.
            n_kept = max(most, 2 if self._never_alone and run.n_tokens > 1 else 1)
        shape = (run.last - run.first + 1, n_kept, self.vocab_size)
        try:
            logits_RNV = binding.run(self._arrays(run, n_kept), shape)
        except Exception as error:  # the library raises a family without a common base
            reason = str(error).strip().splitlines()[0]
            n_tokens = sum(len(item.ids) for item in run.items)
            raise EngineError(f"ONNX Runtime failed on {n_tokens} tokens: {reason}") from error
        return {
            item.slot: _outputs(logits_RNV[item.slot - run.first], run, item) for item in run.items
        }

    def _arrays(self, run: Run, n_kept: int) -> "Arrays":
        """Return the inputs that change from run to run."""
        import numpy as np

        lengths = self._lengths[run.first : run.last + 1]
        if run.n_tokens == 1:
            ids = [0] * len(lengths)
            for item in run.items:
                ids[item.slot - run.first] = item.ids[0]
            return self._step(run.first, run.last).fill(ids, lengths)
        ids_RS = np.zeros((len(lengths), run.n_tokens), np.int64)
        for item in run.items:
            ids_RS[item.slot - run.first, : len(item.ids)] = item.ids
        return make_inputs(ids_RS, lengths, n_kept, self._inputs)

    def _step(self, first: int, last: int) -> StepInputs:
        """Return the inputs of single tokens for the slots ``first`` to ``last``."""
        if (first, last) not in self._steps:
            mask = self._mask.part(slice(first, last + 1))
            self._steps[first, last] = StepInputs(mask, self._inputs)
        return self._steps[first, last]

    def _binding(self, first: int, last: int) -> CacheBinding:
        """Return the binding whose caches are those of the slots ``first`` to ``last``."""
        if (first, last) not in self._bindings:
            rows = {name: rows_RHCD[first : last + 1] for name, rows_RHCD in self._cache.items()}
            self._bindings[first, last] = CacheBinding(self._session, rows)
        return self._bindings[first, last]


def _outputs(logits_NV: "Logits", run: Run, item: Work) -> "Logits":
    """Return a row's logits after the last real tokens of ``item``, without the padding."""
    import numpy as np

    n_padding = run.n_tokens - len(item.ids)
    end = len(logits_NV) - n_padding
    return np.array(logits_NV[end - item.n_outputs : end], np.float32)
