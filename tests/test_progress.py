import io
import re

import pytest
from rich.console import Console

from edgekd.progress import Bar, Lines


def test_lines_are_few_and_the_last_one_always_comes() -> None:
    stream = io.StringIO()
    with Lines(stream, interval_s=60).track("step", 100) as advance:
        for step in range(1, 101):
            advance(step, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 1/100", "loss 1"],
        ["step 100/100", "loss 100"],
    ]
    assert all(line.endswith(" left") for line in lines)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0, 10.0])
    stream = io.StringIO()
    monkeypatch.setattr("edgekd.progress.time.monotonic", lambda: next(times))
    with Lines(stream).track("step", 93, start=90) as advance:
        advance(91, "")  # the first step of this run took 10 s, 2 are left
    assert stream.getvalue().strip() == "step 91/93  20.0 s left"


def test_a_bar_shows_count_note_and_what_was_said() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = Bar(console)
    with bar.track("step", 3) as advance:
        bar.say("[not markup]")
        advance(2, "kl 0.5")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "[not markup]" in shown and "2/3" in shown and "kl 0.5" in shown
