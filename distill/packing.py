"""Documents into rows of fixed length.

A document that is too long is cut into samples; samples are packed whole, the longest first, each
where it leaves the least room (best-fit decreasing). Nothing in a row attends to, or is predicted
from, another sample, so a sample's targets do not depend on its neighbours.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekd.distill.data import Document

IGNORED = -100  # the label of a position that is not learned, as in torch's cross_entropy


@dataclass(frozen=True)
class Row:
    """One training row."""

    number: int
    ids: list[int]
    labels: list[int]
    """The next token of the same sample at each position, or ``IGNORED``."""
    positions: list[int]
    """Place within the sample."""
    segments: list[int]
    """Which of the row's samples a position belongs to; -1 is padding."""
    samples: list[int]
    """Indices of the row's samples, in their order."""


def cut(documents: Iterable[Document], row_tokens: int) -> list[Document]:
    """Return ``documents`` in pieces of at most ``row_tokens`` tokens with something to learn."""
    samples = []
    for document in documents:
        for start in range(0, len(document.ids), row_tokens):
            piece = slice(start, start + row_tokens)
            sample = Document(document.ids[piece], document.learned[piece])
            if any(sample.learned[1:]):  # the first token has nothing before it
                samples.append(sample)
    return samples


def pack(
    samples: Sequence[Document], row_tokens: int, *, first_number: int = 0, pad_id: int = 0
) -> list[Row]:
    """Return ``samples``, none longer than ``row_tokens``, as rows numbered on."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted
    by_length = sorted(range(len(samples)), key=lambda index: -len(samples[index].ids))
    for index in by_length:
        n_tokens = len(samples[index].ids)
        place = bisect_left(rooms, (n_tokens, -1))
        if place == len(rooms):
            room, row = row_tokens, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(index)
        insort(rooms, (room - n_tokens, row))
    return [
        _row(number, chosen, samples, row_tokens, pad_id)
        for number, chosen in enumerate(rows, first_number)
    ]


def _row(
    number: int, chosen: list[int], samples: Sequence[Document], row_tokens: int, pad_id: int
) -> Row:
    row = Row(number, [], [], [], [], chosen)
    for segment, index in enumerate(chosen):
        sample = samples[index]
        row.ids.extend(sample.ids)
        row.labels.extend(labels_of(sample))
        row.positions.extend(range(len(sample.ids)))
        row.segments.extend([segment] * len(sample.ids))
    n_padding = row_tokens - len(row.ids)
    row.ids.extend([pad_id] * n_padding)
    row.labels.extend([IGNORED] * n_padding)
    row.positions.extend(range(n_padding))
    row.segments.extend([-1] * n_padding)
    return row


def labels_of(sample: Document) -> list[int]:
    """Return what each position predicts: the next token where it is learned; never the last."""
    following = zip(sample.ids[1:], sample.learned[1:], strict=True)
    return [token if wanted else IGNORED for token, wanted in following] + [IGNORED]
