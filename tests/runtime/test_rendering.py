"""A chat template is code of strangers: whatever it does, it ends, and nobody else waits."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate
from edgekd.runtime.rendering import Renderer
from tests.runtime.serving import CHAT, CONTINUE, HELLO, TEXT, Serving, refused, serving

LOOPS = (
    "{% if messages[0].content == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
POWER = "{% if messages[0].content == 'loop' %}{{ 1 if x ** (x ** x) else 2 }}{% endif %}hi"


def render(renderer: Renderer, content: str, **variables: object) -> str:
    return renderer.render([{"role": "user", "content": content}], [], variables)


@pytest.mark.parametrize("source", [LOOPS, POWER])
def test_a_template_without_end_is_stopped_and_the_next_chat_is_rendered(source: str) -> None:
    with closing(Renderer(ChatTemplate(source, {}), limit_s=1)) as renderer:
        assert render(renderer, "hi") == "hi"
        begun_s = time.monotonic()
        with pytest.raises(ModelError, match="took over 1 s"):
            render(renderer, "loop", x=9)
        assert time.monotonic() - begun_s < 4
        assert render(renderer, "hi") == "hi"


def test_a_template_whose_constants_never_end_is_stopped_and_not_tried_again() -> None:
    with closing(Renderer(ChatTemplate("{{ 9 ** (9 ** 9) }}", {}), limit_s=1)) as renderer:
        with pytest.raises(ModelError, match="took over 1 s and was stopped"):
            render(renderer, "hi")
        begun_s = time.monotonic()
        with pytest.raises(ModelError, match="took over 1 s and was stopped"):
            render(renderer, "hi")
        assert time.monotonic() - begun_s < 0.5


def test_a_broken_template_is_told_with_every_chat() -> None:
    with closing(Renderer(ChatTemplate("{% if %}", {}))) as renderer:
        for _ in range(2):
            with pytest.raises(ModelError, match="malformed"):
                render(renderer, "hi")


def test_a_model_whose_template_never_compiles_is_served_without_chats(
    float_onnx: Path, tmp_path: Path
) -> None:
    shutil.copytree(float_onnx, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ 9 ** (9 ** 9) }}")
    with serving(tmp_path / "model") as server:
        assert server.post(TEXT, CONTINUE).status_code == 200
        assert "took over" in refused(server.post(CHAT, HELLO), 422, "model_cannot")
        assert server.engine.restarts == 0


def test_what_a_template_does_wrong_is_told_and_harms_nothing() -> None:
    source = (
        "{% set m = messages[0].content %}"
        "{% if m == 'memory' %}{% set ns = namespace(s='x' * 9999) %}"
        "{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
        "{% elif m == 'divide' %}{{ 1 // 0 }}"
        "{% elif m == 'refuse' %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}ü"
    )
    with closing(Renderer(ChatTemplate(source, {"bos_token": "<s>"}))) as renderer:
        for content, message in (
            ("memory", "memory"),
            ("divide", "refuses these messages: integer division"),
            ("refuse", "refuses these messages: no"),
        ):
            with pytest.raises(ModelError, match=message):
                render(renderer, content)
            assert render(renderer, "fine") == "<s>ü"


@pytest.fixture(scope="module")
def server(float_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(float_onnx, folder)
    (folder / "chat_template.jinja").write_text(LOOPS)
    with serving(folder) as found:
        yield found


def test_others_are_answered_while_a_template_loops(server: Serving) -> None:
    assert server.post(CHAT, HELLO).status_code == 200
    answers = []
    loop = HELLO | {"messages": [{"role": "user", "content": "loop"}]}
    client = threading.Thread(target=lambda: answers.append(server.post(CHAT, loop)))
    client.start()
    time.sleep(0.2)
    for _ in range(5):
        begun_s = time.monotonic()
        assert server.post(TEXT, CONTINUE).status_code == 200
        assert server.get("/health").status_code == 200
        assert time.monotonic() - begun_s < 2
    assert client.is_alive()
    client.join()
    assert "took over" in refused(answers[0], 422, "model_cannot")
    assert json.loads(server.post(CHAT, HELLO).content)["choices"]
    assert server.engine.restarts == 0
