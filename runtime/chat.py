"""A conversation with a model: what to ask and where to say it are the caller's business.

The engine runs in a process of its own, as for the server: what was said before stays in its
KV cache, and a crash costs one reply.
"""

import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from edgekd.errors import EdgekdError, ModelError
from edgekd.runtime.chat_template import Message
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.messages import Failed, Finished, GenerationRequest, Token
from edgekd.runtime.sampling import SamplingParams

QUOTES = '"""'
HELP = f"""/system TEXT  tells the model how to behave, from here on; without TEXT, no longer
/reset        forgets what was said
/exit         leaves, as the end of input does
Several lines: end each but the last with \\, or put them between {QUOTES} and {QUOTES}.
Ctrl-C stops a reply; what was said of it stays."""


@dataclass(frozen=True)
class Terminal:
    """Where a conversation takes place."""

    ask: Callable[[str], str]
    """Returns a line for a prompt such as "> "; raises EOFError at the end."""
    say: Callable[[str], None]
    """Takes a reply in parts as they come, and a line feed after it."""
    note: Callable[[str], None]
    """Takes one line about the conversation that need not be shown."""
    warn: Callable[[str], None]
    """Takes one line that must be: a failure, or what was asked for."""


@dataclass
class Conversation:
    """What was said, and the engine that goes on."""

    engine: EngineProcess
    params: SamplingParams
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The system prompt, where there is one, and every turn."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns


def chat(
    engine: EngineProcess, params: SamplingParams, terminal: Terminal, system: str = ""
) -> list[Message]:
    """Return the conversation when it ends; ``HELP`` says what can be typed.

    Raises:
        ModelError: the model has no chat template.
    """
    engine.wait_ready()
    if not engine.call("describe").result()["chat_template"]:
        raise ModelError(
            "the model has no chat template, so it is a base model; use an instruct model, "
            "or have it continue a text instead of chatting"
        )
    talk = Conversation(engine, params, system)
    while (text := read_message(terminal.ask)) != "/exit":
        if text.startswith("/"):
            _obey(talk, text, terminal)
        elif text:
            _exchange(talk, text, terminal)
    return talk.messages


def read_message(ask: Callable[[str], str]) -> str:
    """Return the next message, which may have several lines; /exit at the end of input."""
    try:
        line = ask("> ")
        if line.lstrip().startswith(QUOTES):
            return _quoted(line.lstrip().removeprefix(QUOTES), ask)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(ask("  "))
        return "\n".join(lines).strip()
    except EOFError:
        return "/exit"


def _quoted(line: str, ask: Callable[[str], str]) -> str:
    """Return the lines up to the closing quotes."""
    lines = [line]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(ask("  "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()


def _obey(talk: Conversation, text: str, terminal: Terminal) -> None:
    command, _, rest = text.partition(" ")
    if command == "/reset":
        talk.turns.clear()
    elif command == "/system":
        talk.system = rest.strip()
    elif command == "/help":
        for line in HELP.splitlines():
            terminal.warn(line)
    else:
        terminal.warn(f"there is no {command}; /help lists what there is")


def _exchange(talk: Conversation, text: str, terminal: Terminal) -> None:
    """Say the reply to ``text``; an exchange that fails leaves no trace."""
    talk.turns.append({"role": "user", "content": text})
    reply: list[str] = []
    end: Finished | Failed | None = None
    try:
        end = _stream(talk, reply, terminal.say)
    except KeyboardInterrupt:
        terminal.say("\n")
        terminal.note("stopped")
    except EdgekdError as error:
        terminal.warn(str(error))
    if isinstance(end, Failed):
        terminal.warn(f"{end.message} (/reset forgets what was said before)")
    if isinstance(end, Failed) or not reply:
        talk.turns.pop()
        return
    talk.turns.append({"role": "assistant", "content": "".join(reply)})
    if isinstance(end, Finished):
        terminal.say("\n")
        terminal.note(speed_of(end))


def _stream(talk: Conversation, reply: list[str], say: Callable[[str], None]) -> Finished | Failed:
    """Say the reply and collect it in ``reply``, so that a part of it is not lost."""
    talk.engine.wait_ready()
    found = talk.engine.call("chat", messages=talk.messages, tools=[], variables={}, opening="")
    request = GenerationRequest(
        id=uuid.uuid4().hex, prompt_ids=tuple(found.result()["ids"]), params=talk.params
    )
    with closing(talk.engine.stream(request)) as events:
        for event in events:
            if isinstance(event, Token | Finished):
                reply.append(event.text)
                say(event.text)
            if isinstance(event, Finished | Failed):
                return event
    raise AssertionError("a stream ends with Finished or Failed")


def speed_of(end: Finished) -> str:
    """Return how fast a reply was, for people."""
    n_new = end.n_prompt - end.n_cached
    first = f"{n_new} prompt tokens in {end.prompt_s:.2f} s"
    if end.n_generated < 2:
        return first
    return f"{first}, then {(end.n_generated - 1) / end.decode_s:.1f} tokens/s"
