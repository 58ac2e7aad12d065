"""What the fuzzers found and what they grew up on, run again: nothing but one-line errors."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fuzz_targets import NAMES, Target, open_target

CORPUS = Path(__file__).with_name("corpus")


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest) -> Iterator[tuple[str, Target]]:
    with open_target(request.param) as found:
        yield request.param, found


def test_nothing_in_the_corpus_is_a_finding(target: tuple[str, Target]) -> None:
    name, run = target
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        try:
            run(path.read_bytes())
        except Exception as error:
            pytest.fail(f"{path}: {error!r}")
