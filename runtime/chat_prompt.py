"""A chat as prompt ids."""

from collections.abc import Sequence

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import Message
from edgekd.runtime.loading import LoadedModel
from edgekd.runtime.tokenizer import Tokenizer


def chat_prompt(loaded: LoadedModel, messages: Sequence[Message]) -> list[int]:
    """Return the prompt ids of ``messages``, ready for the assistant's turn.

    Raises:
        ModelError: the model has no chat template, or it refuses the messages.
    """
    if loaded.chat_template is None:
        raise ModelError(
            f"{loaded.path} has no chat template, so it is a base model; "
            "use an instruct model, or have it continue a text instead of chatting"
        )
    return encode_chat(loaded.tokenizer, loaded.chat_template.render(messages))


def encode_chat(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of what a chat template rendered, with one BOS where there is one."""
    ids = tokenizer.encode(prompt)
    # Some templates write the BOS that the tokenizer adds as well.
    is_doubled = len(ids) > 1 and ids[0] == ids[1] and tokenizer.token_bytes(ids[0]) == b""
    return ids[1:] if is_doubled else ids
