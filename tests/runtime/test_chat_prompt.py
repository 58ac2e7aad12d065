import dataclasses
from pathlib import Path

import pytest

from edgekd.errors import ModelError
from edgekd.runtime.chat_prompt import chat_prompt
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.loading import LoadedModel, open_model

MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def loaded(tiny_gguf: Path) -> LoadedModel:
    return open_model(tiny_gguf, context_tokens=128, n_threads=1)


def test_a_model_without_a_chat_template_is_refused_with_advice(loaded: LoadedModel) -> None:
    base = dataclasses.replace(loaded, chat_template=None)
    with pytest.raises(ModelError, match="instruct model"):
        chat_prompt(base, [MESSAGE])


def test_a_begin_mark_that_the_tokenizer_adds_too_is_not_doubled(loaded: LoadedModel) -> None:
    template = ChatTemplate("{{ bos_token * 2 }}{{ messages[0].content }}", {"bos_token": "<s>"})
    doubled = dataclasses.replace(loaded, chat_template=template)
    assert len(chat_prompt(doubled, [MESSAGE])) > 2  # "<s>" is text to this model, so it stays
    template = ChatTemplate("{{ '<|im_start|>' * 2 }}hi", {})
    doubled = dataclasses.replace(loaded, chat_template=template)
    assert chat_prompt(doubled, [MESSAGE]) == [1, *loaded.tokenizer.encode("hi")]
