"""A teacher with other tokens: distributions compared by rank, where both texts end alike.

Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): the likeliest token's
probability is compared with the likeliest token's, the second's with the second's, and so on,
whatever the tokens are. It approximates: two models that are sure of different words look alike.
Positions are aligned by byte offsets: both models must have read exactly the same bytes, so tokens
that end inside a teacher's token are left out, and learned neither from it nor from the text.
Special tokens stand for no bytes: each model reads its own before the text, or none.
"""

import codecs
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgekd.distill.data import Document
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import Measure, Measured, Target
from edgekd.distill.model import Batch, OnlineTeacher
from edgekd.distill.packing import IGNORED, Row, pack
from edgekd.distill.trainer import collate
from edgekd.errors import VocabularyError
from edgekd.runtime.tokenizer import FileTokenizer

# N learned positions, C of one chunk, V vocabulary of the student, W of the teacher, K ranks

_N_RANKS = 256
_NOWHERE = (-1, -1)


@dataclass(frozen=True)
class Aligned:
    """A sample in the teacher's tokens, and where the two agree."""

    teacher_ids: list[int]
    teacher_of: list[int | None]
    """For each of the student's positions the teacher's that has read the same bytes."""


def align(sample: Document, student: FileTokenizer, teacher: FileTokenizer) -> Aligned:
    """Return ``sample`` in the teacher's tokens, aligned by byte offsets."""
    pieces = [student.token_bytes(token) for token in sample.ids]
    text, n_skipped = _whole_characters(b"".join(pieces))
    teacher_ids = teacher.encode(text, parse_special=False)  # names of specials are text here
    teacher_ids = teacher_ids or [teacher.first_id or 0]  # it must read something
    teacher_at = _positions_by_bytes(map(teacher.token_bytes, teacher_ids), text.encode("utf-8"))
    ends = [None if end is None else end - n_skipped for end in _read_so_far(pieces)]
    return Aligned(teacher_ids, [None if end is None else teacher_at.get(end) for end in ends])


def learn_where_aligned(
    samples: Sequence[Document],
    rows: Sequence[Row],
    student: FileTokenizer,
    teacher: FileTokenizer,
) -> list[Row]:
    """Return ``rows`` of ``samples`` that learn only where the teacher has read the same bytes.

    What has no teacher must not count as learned either: the loss is divided by that count.
    """
    teacher_of = [align(sample, student, teacher).teacher_of for sample in samples]
    learned = []
    for row in rows:
        places = [place for index in row.samples for place in teacher_of[index]]
        places += [None] * (len(row.labels) - len(places))
        labels = [
            IGNORED if place is None else label
            for label, place in zip(row.labels, places, strict=True)
        ]
        if any(label != IGNORED for label in labels):
            learned.append(replace(row, labels=labels))
    if not learned:
        raise VocabularyError(
            "student and teacher never end a token at the same byte of this data; give longer "
            "texts, or teach with edgekd answer"
        )
    return learned


class RankedTarget:
    """The teacher's head on its hidden states, where there are any for a position."""

    def __init__(
        self, hidden_NH: torch.Tensor, head_WH: torch.Tensor, weights_N: torch.Tensor
    ) -> None:
        """Follow the teacher at positions of weight 1."""
        self._hidden_NH, self._head_WH = hidden_NH, head_WH
        self.weights_N: torch.Tensor | None = weights_N
        self.measure: Measure = measure_ranks

    def chunk(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return the teacher's product [C, W]."""
        return ((self._hidden_NH[rows].to(dtype) @ self._head_WH.to(dtype).T).float(),)

    def likeliest(self, rows: slice, options: LossOptions) -> torch.Tensor | None:
        """Return None: ids of different vocabularies cannot be compared."""
        return None


class CrossTeacher:
    """Runs a teacher on its own tokens of the same text."""

    def __init__(
        self,
        model: Any,
        packed: Sequence[tuple[Sequence[Document], Sequence[Row]]],
        student: FileTokenizer,
        teacher: FileTokenizer,
        row_tokens: int,
    ) -> None:
        """Run ``model`` on the rows that were ``packed`` from samples."""
        self._online = OnlineTeacher(model, int(model.config.vocab_size))
        self._row_tokens = row_tokens
        self._aligned_of_row: dict[int, list[Aligned]] = {}
        for samples, rows in packed:
            aligned = [align(sample, student, teacher) for sample in samples]
            for row in rows:
                self._aligned_of_row[row.number] = [aligned[index] for index in row.samples]

    @torch.no_grad()
    def target(self, batch: Batch, is_learned_BT: torch.Tensor) -> Target:
        """Return the teacher's distributions at the learned positions of ``batch``."""
        device = is_learned_BT.device
        found = [self._aligned_of_row[number] for number in batch["row_numbers"].tolist()]
        samples = [aligned for row in found for aligned in row]
        longest = max(len(aligned.teacher_ids) for aligned in samples)
        documents = [Document(a.teacher_ids, [True] * len(a.teacher_ids)) for a in samples]
        rows = pack(documents, max(self._row_tokens, longest))
        teacher_batch = {name: value.to(device) for name, value in collate(rows).items()}
        hidden_BTH, head_WH = self._online.hidden_and_head(teacher_batch)
        start_of = {
            index: (number, start)
            for number, row in enumerate(rows)
            for index, start in zip(row.samples, _starts(row, documents), strict=True)
        }
        places: list[tuple[int, int]] = []
        index = 0
        for row_number, row in enumerate(found):
            for aligned in row:
                places += _places(aligned, *start_of[index])
                index += 1
            n_padding = (row_number + 1) * is_learned_BT.shape[1] - len(places)
            places += [_NOWHERE] * n_padding
        wanted = torch.tensor(places, device=device).view(*is_learned_BT.shape, 2)[is_learned_BT]
        is_aligned_N = wanted[:, 0] >= 0
        hidden_NH = hidden_BTH[wanted[:, 0].clamp(min=0), wanted[:, 1].clamp(min=0)]
        return RankedTarget(hidden_NH, head_WH, is_aligned_N.float())


def measure_ranks(
    student_CV: torch.Tensor, teacher_CW: torch.Tensor, options: LossOptions
) -> Measured:
    """Return half the L1 distance of the sorted probabilities [C], and its gradient [C, V].

    The first ranks one by one, all others as one sum.
    """
    q_CV = (student_CV / options.temperature).softmax(-1)
    shaped_CW = options.teacher_shape.shape(teacher_CW)
    p_CW = (shaped_CW / options.temperature).softmax(-1)
    n_ranks = min(_N_RANKS, q_CV.shape[1], p_CW.shape[1])
    q_CK, index_CK = q_CV.topk(n_ranks, dim=-1)
    difference_CK = q_CK - p_CW.topk(n_ranks, dim=-1).values
    rest_C1 = -difference_CK.sum(-1, keepdim=True)  # both sum to one
    value_C = (difference_CK.abs().sum(-1) + rest_C1.squeeze(1).abs()) / 2
    slope_CV = (rest_C1.sign() / 2).expand_as(q_CV).scatter(1, index_CK, difference_CK.sign() / 2)
    return Measured(value_C, q_CV * (slope_CV - (q_CV * slope_CV).sum(-1, keepdim=True)))


def _places(aligned: Aligned, row: int, start: int) -> list[tuple[int, int]]:
    """Return the teacher's row and position for each of the student's positions of one sample."""
    found = aligned.teacher_of
    return [_NOWHERE if place is None else (row, start + place) for place in found]


def _whole_characters(read: bytes) -> tuple[str, int]:
    """Return the text in ``read`` without halves of characters, and how many bytes are before it.

    A sample that was cut out of a long text may begin and end within a character.
    """
    n_skipped = next((i for i, byte in enumerate(read) if byte & 0xC0 != 0x80), len(read))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(read[n_skipped:]), n_skipped  # it waits for the rest of the last one


def _positions_by_bytes(pieces: Iterable[bytes], text: bytes) -> dict[int, int]:
    """Return how much of ``text`` has been read -> the position at which it has.

    No further than to where the pieces say something else than the text, as they do after a
    tokenizer has normalized it. A space that SentencePiece puts before each text is no byte of it.
    """
    pieces = list(pieces)
    read = b"".join(pieces)
    same, same_after_space = (_n_same_bytes(read[n:], text) for n in (0, 1))
    n_added = int(read.startswith(b" ") and same_after_space > same)
    n_same = same_after_space if n_added else same
    ends = _read_so_far(pieces)
    offsets = [None if end is None else max(0, end - n_added) for end in ends]
    return {end: place for place, end in enumerate(offsets) if end is not None and end <= n_same}


def _n_same_bytes(one: bytes, other: bytes) -> int:
    """Return how many bytes the two have in common before they differ."""
    return len(os.path.commonprefix([one, other]))


def _read_so_far(pieces: Iterable[bytes]) -> list[int | None]:
    """Return the byte offset at which each token ends; None for a special one after some text.

    After it a model expects something else than the other, which has not read it.
    """
    ends: list[int | None] = []
    end = 0
    for piece in pieces:
        end += len(piece)
        ends.append(end if piece or end == 0 else None)
    return ends


def _starts(row: Row, documents: Sequence[Document]) -> list[int]:
    starts, start = [], 0
    for index in row.samples:
        starts.append(start)
        start += len(documents[index].ids)
    return starts
