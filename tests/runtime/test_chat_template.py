import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate
from tests.conftest import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi <b> & \u00fc"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(add_generation_prompt: bool) -> None:
    (expected,), _ = render_jinja_template(
        [MESSAGES], chat_template=CHAT_TEMPLATE, add_generation_prompt=add_generation_prompt
    )
    template = ChatTemplate(CHAT_TEMPLATE, {})
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}xxxxxxxx{% endfor %}",
        "{{ raise_exception('no system role') }}",
    ],
)
def test_a_hostile_template_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match="refuses these messages|more than"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_an_oversized_or_broken_template_is_refused() -> None:
    with pytest.raises(ModelError, match="are allowed"):
        ChatTemplate("x" * 100_000, {})
    with pytest.raises(ModelError, match="malformed"):
        ChatTemplate("{% if %}", {}).render(MESSAGES)
    with pytest.raises(ModelError, match="malformed"):
        ChatTemplate("{{ " + "(" * 9999 + " }}", {}).render(MESSAGES)
