"""A conversation with a model: what to ask and where to say it are the caller's business."""

from collections.abc import Callable, Sequence
from contextlib import closing

from edgekd.errors import EngineError, ModelError
from edgekd.runtime.chat_template import Message
from edgekd.runtime.generate import generate
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.sampling import SamplingParams
from edgekd.runtime.tokenizer import Tokenizer


def chat(
    loaded: LoadedModel,
    params: SamplingParams,
    ask: Callable[[], str],
    say: Callable[[str], None],
) -> list[Message]:
    """Return the conversation when ``ask`` raises EOFError or gives "/exit".

    "/new" forgets what was said. ``say`` gets each reply in parts as they come, and a line feed
    after it.

    Raises:
        ModelError: the model has no chat template, or it refuses the messages.
    """
    require_chat_template(loaded)
    history: list[Message] = []
    while (line := _next_line(ask)) != "/exit":
        if line == "/new":
            history.clear()
        elif line:
            _exchange(loaded, params, history, line, say)
    return history


def chat_prompt(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """Return the prompt ids of ``messages``, ready for the assistant's turn.

    Raises:
        ModelError: the model has no chat template, or it refuses the messages.
    """
    require_chat_template(loaded)
    assert loaded.chat_template is not None
    return encode_chat(loaded.tokenizer, loaded.chat_template.render(messages))


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of what a chat template rendered, with one BOS where there is one."""
    ids = tokenizer.encode(prompt)
    # Some templates write the BOS that the tokenizer adds as well.
    is_doubled = len(ids) > 1 and ids[0] == ids[1] and tokenizer.token_bytes(ids[0]) == b""
    return ids[1:] if is_doubled else ids


def require_chat_template(loaded: LoadedModel) -> None:
    """Return only if the model can chat.

    Raises:
        ModelError: it has no chat template.
    """
    if loaded.chat_template is None:
        raise ModelError(
            f"{loaded.path} has no chat template, so it is a base model; "
            "use an instruct model, or have it continue a text instead of chatting"
        )


def _next_line(ask: Callable[[], str]) -> str:
    try:
        return ask().strip()
    except EOFError:
        return "/exit"


def _exchange(
    loaded: LoadedModel,
    params: SamplingParams,
    history: list[Message],
    line: str,
    say: Callable[[str], None],
) -> None:
    """Say the reply to ``line``; a failed exchange leaves no trace in ``history``."""
    question: Message = {"role": "user", "content": line}
    reply = ""
    try:
        prompt_ids = chat_prompt(loaded, [*history, question])
        with closing(generate(loaded, prompt_ids, params)) as pieces:
            for piece in pieces:
                reply += piece.text
                say(piece.text)
    except EngineError as error:
        say(f"{error}; /new forgets what was said before\n")
        return
    say("\n")
    history += [question, {"role": "assistant", "content": reply}]
