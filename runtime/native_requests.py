"""The bodies of llama-server's own routes; names and defaults are those of its README."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from edgekd.runtime.asked import MAX_STOPS, AskedBody, Count, StopString, TokenId
from edgekd.runtime.generation_fields import MAX_PROMPTS, GenerationFields

Pieces = Annotated[list[TokenId | str], Field(min_length=1)]
"""Token ids and texts, one behind the other."""


class PromptObject(AskedBody):
    """A prompt as an object; pictures and sound are not supported."""

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {"multimodal_data": ([],)}
    prompt_string: str


Prompt = str | PromptObject | Pieces


class NativeRequest(GenerationFields):
    """Body of /completion."""

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: values
        for name, values in GenerationFields.without_effect.items()
        if name != "post_sampling_probs"
    }
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    stop: (
        Annotated[str, Field(max_length=128)]
        | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
    ) = []
    post_sampling_probs: bool = False
    return_tokens: bool = False
    response_fields: list[str] = Field([], max_length=64)

    def prompts(self) -> list[Prompt]:
        """Return each prompt; a list that holds a number is one of pieces."""
        if not isinstance(self.prompt, list):
            return [self.prompt]
        if any(isinstance(each, int) for each in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def is_after_sampling(self) -> bool:
        """Return whether probabilities are those behind the samplers, as llama-server's can be."""
        return self.post_sampling_probs

    @property
    def is_list(self) -> bool:
        """Whether the answer is an array."""
        return self.n_texts() > 1 or (isinstance(self.prompt, list) and len(self.prompts()) > 1)


class TokenizeRequest(AskedBody):
    """Body of /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(AskedBody):
    """Body of /detokenize."""

    tokens: list[Count]
