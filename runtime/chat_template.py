"""Messages to prompt text, by the model's own Jinja template in a sandbox.

A template is code out of an untrusted file (CVE-2024-34359): it runs without access to Python
objects, its size is bounded, and so is what it may produce. Compiling runs its constants already
(``9 ** (9 ** 9)``), so that a server only compiles in edgekd.runtime.render_worker.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import ModelError
from edgekd.runtime.tokenizer import read_json
from edgekd.untrusted import MALFORMED

if TYPE_CHECKING:
    import jinja2

Message = dict[str, Any]

_MAX_TEMPLATE_CHARS = 64 * 1024
_MAX_PROMPT_CHARS = 4 * 1024 * 1024


class ChatTemplate:
    """A model's chat template; compiled when it is first used."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Take ``source``; ``special_tokens`` are its variables such as ``bos_token``.

        Raises:
            ModelError: the template is too large.
        """
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise ModelError(
                f"the chat template has {len(source)} characters, {_MAX_TEMPLATE_CHARS} are allowed"
            )
        self.source = source
        self.special_tokens = special_tokens

    @cached_property
    def compiled(self) -> "jinja2.Template":
        """The template as code, in a sandbox.

        Raises:
            ModelError: it is no valid Jinja.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            return environment.from_string(self.source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ModelError(f"the chat template is malformed: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Message] = (),
        variables: Message | None = None,
    ) -> str:
        """Return the prompt text for ``messages``.

        ``tools`` are functions that the model may call, in OpenAI's form; ``variables`` are the
        model's own switches, such as ``enable_thinking``.

        Raises:
            ModelError: the template is no valid Jinja, refuses these messages, or tries what the
                sandbox forbids.
        """
        import jinja2

        template = self.compiled
        parts: list[str] = []
        length = 0
        try:
            for part in template.generate(
                **(variables or {}) | self.special_tokens,
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_PROMPT_CHARS:
                    raise ModelError(
                        f"the chat template gave more than {_MAX_PROMPT_CHARS} characters"
                    )
        except (jinja2.TemplateError, RecursionError, *MALFORMED) as error:
            raise ModelError(f"the chat template refuses these messages: {error}") from error
        return "".join(parts)


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of the checkpoint in ``folder``; none where it has none."""
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named ones: the default is what a chat uses
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return ChatTemplate(source, _special_tokens(config)) if source else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        entry = config.get(role)
        name = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(name, str):
            found[role] = name
    return found


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Return JSON as transformers renders it in templates: not HTML-escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise ModelError(f"the chat template refuses these messages: {message}")
