from hypothesis import given
from hypothesis import strategies as st

from edgekd.distill.data import Document
from edgekd.distill.packing import IGNORED, cut, labels_of, pack

documents = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=20).map(
        lambda pairs: Document([token for token, _ in pairs], [wanted for _, wanted in pairs])
    ),
    max_size=8,
)


@given(found=documents, row_tokens=st.integers(2, 16))
def test_cutting_keeps_every_piece_that_teaches(found: list[Document], row_tokens: int) -> None:
    samples = cut(found, row_tokens)
    assert all(2 <= len(sample.ids) <= row_tokens for sample in samples)
    n_learned = sum(
        wanted
        for document in found
        for index, wanted in enumerate(document.learned)
        if index % row_tokens  # the first token of a piece has nothing before it
    )
    assert sum(sum(sample.learned[1:]) for sample in samples) == n_learned


@given(found=documents, row_tokens=st.integers(2, 16))
def test_packing_keeps_every_sample_whole_and_predicts_within_it(
    found: list[Document], row_tokens: int
) -> None:
    samples = cut(found, row_tokens)
    rows = pack(samples, row_tokens)
    assert sorted(index for row in rows for index in row.samples) == list(range(len(samples)))
    for number, row in enumerate(rows):
        assert row.number == number
        assert len(row.ids) == len(row.labels) == len(row.segments) == row_tokens
        start = 0
        for segment, index in enumerate(row.samples):
            end = start + len(samples[index].ids)
            assert row.ids[start:end] == samples[index].ids
            assert row.labels[start:end] == labels_of(samples[index])
            assert row.segments[start:end] == [segment] * (end - start)
            assert row.positions[start:end] == list(range(end - start))
            start = end
        assert set(row.labels[start:]) <= {IGNORED} and set(row.segments[start:]) <= {-1}


def test_rows_are_filled_as_well_as_they_can_be() -> None:
    samples = [Document([1] * n, [True] * n) for n in (3, 7, 5, 2, 8, 5)]
    assert len(pack(samples, 10)) == 3  # 30 tokens


def test_a_prompt_of_two_tokens_and_a_reply_of_one_give_one_loss_position() -> None:
    assert labels_of(Document([5, 6, 7], [False, False, True])) == [IGNORED, 7, IGNORED]
