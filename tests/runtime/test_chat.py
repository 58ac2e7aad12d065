from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.runtime.batch_engine import EngineOptions
from edgekd.runtime.chat import Terminal, chat, read_message
from edgekd.runtime.chat_template import Message
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Iterator[EngineProcess]:
    settings = WorkerSettings(
        model=str(tiny_gguf), options=EngineOptions(context_tokens=128), max_waiting=1
    )
    with EngineProcess(settings) as found:
        yield found


def asking(*lines: str) -> Callable[[str], str]:
    """Return a stand-in for a terminal that ends after ``lines``."""
    left: Iterator[str] = iter(lines)

    def ask(prompt: str) -> str:
        for line in left:
            return line
        raise EOFError

    return ask


def talk(
    engine: EngineProcess, *lines: str, system: str = "", params: SamplingParams = PARAMS
) -> tuple[list[Message], str, str]:
    """Return the conversation, what was said and what was noted."""
    said: list[str] = []
    noted: list[str] = []
    terminal = Terminal(asking(*lines), said.append, noted.append, noted.append)
    messages = chat(engine, params, terminal, system)
    return messages, "".join(said), "\n".join(noted)


def test_exit_and_the_end_of_input_end_the_chat(engine: EngineProcess) -> None:
    for lines in ((), ("/exit", "hello"), ("  ",)):
        assert talk(engine, *lines) == ([], "", "")


def test_every_reply_is_said_kept_and_timed(engine: EngineProcess) -> None:
    messages, said, noted = talk(engine, "The quick brown fox", "dogs bark")
    assert [each["role"] for each in messages] == ["user", "assistant"] * 2
    assert said == messages[1]["content"] + "\n" + messages[3]["content"] + "\n"
    assert noted.count("tokens/s") == 2


def test_a_second_question_goes_on_from_the_first_until_reset_forgets_it(
    engine: EngineProcess,
) -> None:
    def last_reply(*lines: str, system: str = "") -> str:
        return str(talk(engine, *lines, system=system)[0][-1]["content"])

    alone = last_reply("dogs bark")
    assert last_reply("The quick brown fox", "dogs bark") != alone
    assert last_reply("The quick brown fox", "/reset", "dogs bark") == alone
    assert last_reply("/system Be brief.", "dogs bark") == last_reply(
        "dogs bark", system="Be brief."
    )
    assert last_reply("dogs bark", system="Be brief.") != alone
    assert last_reply("/system Be brief.", "/system", "dogs bark") == alone


def test_what_was_said_before_is_not_computed_again(engine: EngineProcess) -> None:
    question = "The quick brown fox jumps over the lazy dog " * 3
    # Random tokens are many tokens when their text comes back.
    notes = talk(engine, question, "go on", params=SamplingParams(max_tokens=1))[2]
    first, second = notes.splitlines()
    new_tokens = [int(line.split()[0]) for line in (first, second)]
    assert new_tokens[1] < new_tokens[0]


def test_a_question_that_does_not_fit_leaves_the_chat_usable(engine: EngineProcess) -> None:
    messages, said, noted = talk(engine, "fox " * 200, "dogs bark")
    assert "the context holds 128" in noted and "/reset" in noted
    assert messages == talk(engine, "dogs bark")[0] and said.count("\n") >= 1


def test_an_unknown_command_is_no_question(engine: EngineProcess) -> None:
    messages, said, noted = talk(engine, "/rest", "/help")
    assert (messages, said) == ([], "")
    assert noted.startswith("there is no /rest") and "/system" in noted


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["  one  "], "one"),
        (["one\\", "two\\", " three"], "one\ntwo\n three"),
        (['"""one', "", "/two", 'three"""'], "one\n\n/two\nthree"),
        (['"""one"""'], "one"),
        (['"""', "one\\", '"""'], "one\\"),
        (["one\\"], "/exit"),
        (['"""one', "two"], "/exit"),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], message: str) -> None:
    assert read_message(asking(*lines)) == message


def test_ctrl_c_stops_a_reply_and_not_the_chat(engine: EngineProcess) -> None:
    said: list[str] = []
    noted: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt  # as where the signal comes while a part is printed

    long = SamplingParams(max_tokens=90)
    messages = chat(
        engine, long, Terminal(asking("dogs bark", "hi"), say, noted.append, noted.append)
    )
    assert noted[0] == "stopped"
    assert messages[1]["content"] == "".join(said[:3]) and said[3] == "\n"
    assert len(messages) == 4 and engine.n_requests == 0


def test_a_quiet_chat_still_says_what_failed(tiny_gguf: Path) -> None:
    found = CliRunner().invoke(
        app, ["chat", str(tiny_gguf), "--ctx", "64", "--quiet"], input="fox " * 200 + "\n"
    )
    assert found.exit_code == 0
    assert "the context holds 64" in found.stderr and "tokens/s" not in found.stderr
