"""On-policy data: the student continues prompts, the teacher scores what it wrote (GKD).

Agarwal et al. 2024, "On-Policy Distillation of Language Models". Sampling has the temperature of
the loss and no other filter, so that what is scored is the distribution that is trained. Prompts
are padded on the left, and nothing after the first stop token is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edgekd.distill.data import Document
from edgekd.distill.packing import IGNORED, Row, cut, pack

# B prompts, T tokens


@dataclass
class StudentWriter:
    """Replaces batches by the student's own continuations, as often as asked for."""

    samples: Sequence[Document]
    rows: Sequence[Row]
    fraction: float
    """Share of the learned tokens that the student is to have written."""
    new_tokens: int
    plain_prompt_tokens: int
    """How much of a text without a prompt is given to continue."""
    row_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    n_written: int = field(default=0, init=False)
    n_learned: int = field(default=0, init=False)

    def is_due(self) -> bool:
        """Whether the next batch must be written by the student to keep the fraction."""
        return self.n_written < self.fraction * max(1, self.n_learned)

    def count(self, n_learned: int, *, is_written: bool) -> None:
        """Note that a batch with ``n_learned`` learned tokens was used."""
        self.n_learned += n_learned
        self.n_written += n_learned if is_written else 0

    def write(self, student: Any, row_numbers: Sequence[int]) -> list[Row]:
        """Return rows of the student's continuations of the prompts in the given rows."""
        by_number = {row.number: row for row in self.rows}
        chosen = [index for number in row_numbers for index in by_number[number].samples]
        longest = max(1, self.row_tokens - self.new_tokens)
        prompts = [
            prompt_of(self.samples[index], self.plain_prompt_tokens)[-longest:] for index in chosen
        ]
        room = len(row_numbers) * self.row_tokens
        fitting: list[list[int]] = []
        for prompt in prompts:
            room -= len(prompt) + self.new_tokens
            if room < 0 and fitting:
                break
            fitting.append(prompt)
        written = sample_continuations(
            student, fitting, self.new_tokens, self.temperature, self.stop_ids
        )
        return pack(cut(written, self.row_tokens), self.row_tokens)


def prompt_of(sample: Document, plain_tokens: int) -> list[int]:
    """Return what comes before the first learned token; of plain text its beginning."""
    first = next((i for i, wanted in enumerate(sample.learned) if wanted), 0)
    return sample.ids[: first or plain_tokens]


@torch.no_grad()
def sample_continuations(
    student: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
) -> list[Document]:
    """Return each prompt with the student's continuation, of which only that is learned."""
    width = max(map(len, prompts))
    device = next(student.parameters()).device
    ids_BT = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    was_training = student.training
    student.eval()  # no dropout, and no gradient checkpointing, which forbids the KV cache
    with torch.compiler.set_stance("force_eager"):  # every step has another shape
        found_BT = student.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,  # a model's generation_config.json would filter otherwise
            top_p=1.0,
            min_p=None,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=sorted(stop_ids) or None,
            pad_token_id=0,
        )
    student.train(was_training)
    continuations = found_BT[:, width:].tolist()
    return [
        written_document(prompt, continuation, stop_ids)
        for prompt, continuation in zip(prompts, continuations, strict=True)
    ]


def written_document(
    prompt: Sequence[int], continuation: Sequence[int], stop_ids: frozenset[int]
) -> Document:
    """Return prompt and continuation up to its first stop token, only the latter learned."""
    end = next((i + 1 for i, token in enumerate(continuation) if token in stop_ids), None)
    kept = list(continuation[:end])
    return Document([*prompt, *kept], [False] * len(prompt) + [True] * len(kept))


def n_learned(batch: dict[str, torch.Tensor]) -> int:
    """Return how many positions of ``batch`` are learned."""
    return int((batch["shift_labels"] != IGNORED).sum())
