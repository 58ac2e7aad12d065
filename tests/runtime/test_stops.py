from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.stops import StopFilter, TextOut

ALPHABET = "ab🎉é"
CHUNKS = st.lists(st.text(ALPHABET, max_size=6), max_size=8)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


class ByteTokenizer:
    """Token i is byte i: every character of more than one byte is cut."""

    stop_ids: frozenset[int] = frozenset()

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        return list(text.encode())

    n_ids = 256
    first_id = None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def raw_token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def before_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@given(CHUNKS, STOPS)
def test_exactly_the_text_before_the_first_stop_string_passes(
    chunks: list[str], stops: list[str]
) -> None:
    out = StopFilter(stops)
    passed = "".join(out.feed(chunk) for chunk in chunks) + out.flush()
    assert (passed, out.is_stopped) == before_first_stop("".join(chunks), stops)


@given(CHUNKS, STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(
    chunks: list[str], stops: list[str]
) -> None:
    out, passed, given_text = StopFilter(stops), "", ""
    for chunk in chunks:
        passed += out.feed(chunk)
        given_text += chunk
        held = "" if out.is_stopped else given_text[len(passed) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(st.text(ALPHABET, max_size=12), STOPS)
def test_bytes_one_by_one_give_the_same_text(text: str, stops: list[str]) -> None:
    tokenizer = ByteTokenizer()
    out = TextOut(tokenizer, stops)
    passed = "".join(out.add(token_id) for token_id in tokenizer.encode(text))
    if not out.is_stopped:
        passed += out.end()
    assert (passed, out.is_stopped) == before_first_stop(text, stops)


def test_a_broken_character_becomes_a_replacement_mark_at_the_end() -> None:
    out = TextOut(ByteTokenizer(), ["x"])
    assert [out.add(byte) for byte in "é".encode()] == ["", "é"]
    assert [out.add(byte) for byte in "🎉".encode()[:3]] == ["", "", ""]
    assert out.end() == "\ufffd"


def test_the_stop_string_that_matched_is_named() -> None:
    out = StopFilter(["xyz", "yz", "q"])
    assert out.feed("abxy") == "ab"
    assert (out.feed("z!"), out.matched) == ("", "xyz")
