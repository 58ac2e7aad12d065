import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgekd.errors import ModelError
from edgekd.runtime.chat import chat, chat_prompt
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def loaded(tiny_gguf: Path) -> LoadedModel:
    return open_model(tiny_gguf, context_tokens=128, n_threads=1)


def asking(*lines: str) -> Callable[[], str]:
    """Return a stand-in for a terminal that ends after ``lines``."""
    left: Iterator[str] = iter(lines)

    def ask() -> str:
        for line in left:
            return line
        raise EOFError

    return ask


def talk(loaded: LoadedModel, *lines: str) -> list[str]:
    said: list[str] = []
    chat(loaded, PARAMS, asking(*lines), said.append)
    return "".join(said).split("\n")


def test_exit_and_the_end_of_input_end_the_chat(loaded: LoadedModel) -> None:
    assert talk(loaded) == talk(loaded, "/exit", "hello") == talk(loaded, "  ") == [""]


def test_a_second_question_knows_the_first_until_new_forgets_it(loaded: LoadedModel) -> None:
    def tokens_after(*lines: str) -> int:
        talk(loaded, *lines)
        return loaded.engine.position

    alone = tokens_after("dogs bark")
    assert tokens_after("The quick brown fox", "dogs bark") > alone
    assert tokens_after("The quick brown fox", "/new", "dogs bark") == alone


def test_a_question_that_does_not_fit_leaves_the_chat_usable(loaded: LoadedModel) -> None:
    said = talk(loaded, "fox " * 200, "dogs bark")
    assert "do not fit" in said[0] and "/new" in said[0]
    assert said[1:] == talk(loaded, "dogs bark")


def test_a_model_without_a_chat_template_is_refused_with_advice(loaded: LoadedModel) -> None:
    base = dataclasses.replace(loaded, chat_template=None)
    with pytest.raises(ModelError, match="instruct model"):
        chat(base, PARAMS, asking("hello"), print)


def test_a_begin_mark_that_the_tokenizer_adds_too_is_not_doubled(loaded: LoadedModel) -> None:
    template = ChatTemplate("{{ bos_token * 2 }}{{ messages[0].content }}", {"bos_token": "<s>"})
    doubled = dataclasses.replace(loaded, chat_template=template)
    message = {"role": "user", "content": "hi"}
    assert len(chat_prompt(doubled, [message])) > 2  # "<s>" is text to this model, so it stays
    template = ChatTemplate("{{ '<|im_start|>' * 2 }}hi", {})
    doubled = dataclasses.replace(loaded, chat_template=template)
    assert chat_prompt(doubled, [message]) == [1, *loaded.tokenizer.encode("hi")]
