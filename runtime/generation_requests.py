"""From what a body asks for to the requests that the scheduler takes, one for each text."""

from collections.abc import Sequence

from edgekd.runtime.generation_fields import GenerationFields
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.messages import GenerationRequest
from edgekd.runtime.sampling import MAX_BIAS
from edgekd.runtime.texts import Texts, new_id

Biases = tuple[tuple[int, float], ...]


async def biases(texts: Texts, asked: GenerationFields) -> Biases:
    """Return the bias of each token; a text stands for all its tokens, false bans them."""
    given = asked.logit_bias
    pairs = list(given.items()) if isinstance(given, dict) else given
    found: list[tuple[int, float]] = []
    for name, bias in pairs:
        value = -MAX_BIAS if bias is False else bias
        if isinstance(name, str) and not (isinstance(given, dict) and name.isdecimal()):
            ids = await texts.encode(name, add_special=False)
        else:
            ids = [int(name)]
        found += [(token_id, value) for token_id in ids]
    return tuple(found)


def requests_for(
    texts: Texts,
    asked: GenerationFields,
    ids: Sequence[int],
    bias: Biases,
    grammar: Grammar | None,
    prompt_logprobs: int | None = None,
) -> list[GenerationRequest]:
    """Return a request for each text of one prompt."""
    room = texts.room(len(ids))
    return [
        GenerationRequest(
            id=new_id(),
            prompt_ids=tuple(ids),
            params=asked.sampling(room, bias, index),
            grammar=grammar,
            deadline_s=texts.timeout_s,
            slot=None if asked.id_slot < 0 else asked.id_slot,
            reuse_prefix=asked.cache_prompt,
            prompt_logprobs=prompt_logprobs,
            report_progress=asked.stream and asked.return_progress,
        )
        for index in range(asked.n_texts())
    ]
