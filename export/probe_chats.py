"""Conversations on which chat templates part ways, and what a template makes of each.

Some templates refuse a system message (Mistral's and Gemma's raise an exception); so must the
template of what is exported from such a model.
"""

from pathlib import Path

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate, Message, read_chat_template

_TALK: list[Message] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]
_PROBES: list[list[Message]] = [_TALK, [{"role": "system", "content": "Be brief."}, *_TALK]]


def rendered_chats(template: ChatTemplate | None) -> list[str | None]:
    """Return every probe as ``template`` renders it; None where it refuses. Without one, nothing.

    The first has no system message, the second has one.
    """
    return [] if template is None else [_rendered(template, probe) for probe in _PROBES]


def chat_template_fault(folder: Path) -> str | None:
    """Return why the chat template of the checkpoint in ``folder`` renders no conversation."""
    try:
        if template := read_chat_template(folder):
            template.render(_TALK)
    except ModelError as error:
        return str(error)
    return None


def _rendered(template: ChatTemplate, messages: list[Message]) -> str | None:
    try:
        return template.render(messages)
    except ModelError:
        return None
