"""The bodies of OpenAI's API: what is accepted, what is refused.

A field that would change the reply and is not supported is refused, never ignored in silence.
Imports pydantic, so only the server imports this.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.runtime.asked import Asked, Json, TokenId
from edgekd.runtime.generation_fields import MAX_PROMPTS, GenerationFields, Limit
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.sampling import MAX_LOGPROBS, MAX_SEED, MAX_TEMPERATURE

MAX_TOOLS = 128

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Asked):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: Json = {}
    strict: bool = False


class Tool(Asked):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Asked):
    """A function by its name."""

    name: Name


class NamedTool(Asked):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Asked):
    """A function that an earlier reply called."""

    name: str
    arguments: str | Json


class ToolCall(Asked):
    """A call in an earlier reply."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self) -> Json:
        """Return the call as chat templates expect it: arguments as an object."""
        given = self.function.arguments
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                given = self.function.arguments
        function = {"name": self.function.name, "arguments": given}
        return {"id": self.id, "type": "function", "function": function}


class TextPart(Asked):
    """One part of a message; images and sound are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Asked):
    """One turn of a conversation."""

    ignored: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations", "audio"})
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def for_template(self) -> Json:
        """Return the message as chat templates expect it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        rest = self.model_dump(include={"name", "tool_call_id", "reasoning_content"})
        role = "system" if self.role == "developer" else self.role
        found = {"role": role, "content": text} | {k: v for k, v in rest.items() if v is not None}
        if self.tool_calls:
            found["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return found


class StreamOptions(Asked):
    """What a stream carries besides text."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    include_usage: bool = False


class ResponseFormat(Asked):
    """The form that the reply must have; llama-server's ``schema`` beside the type too."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Json | None = None
    schema_: Json | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        self.grammar()
        return self

    def grammar(self) -> Grammar | None:
        """Return the form for the sampler."""
        if self.type == "text":
            return None
        found = (self.json_schema or {}).get("schema", self.schema_)
        if found is None and self.type == "json_object":
            return Grammar("json_object")
        if not isinstance(found, dict):
            raise ValueError("json_schema.schema is missing; it must be a JSON schema")
        return Grammar("json_schema", json.dumps(found))


class OpenAIFields(GenerationFields):
    """What chat and plain completions share; the defaults are OpenAI's."""

    ignored: ClassVar[frozenset[str]] = GenerationFields.ignored | {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
    }
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = GenerationFields.without_effect | {
        "response_fields": ([],),
        "return_tokens": (False,),
    }
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=MAX_TEMPERATURE)
    top_k: int = Field(0, ge=-1, le=MAX_SEED)
    top_p: float = Field(1.0, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    response_format: ResponseFormat | None = None

    def forms(self) -> list[Grammar]:
        """Return every form that the reply must have."""
        asked = self.response_format.grammar() if self.response_format else None
        return super().forms() + ([asked] if asked else [])


class ChatRequest(OpenAIFields):
    """Body of /v1/chat/completions."""

    ignored: ClassVar[frozenset[str]] = OpenAIFields.ignored | {"parallel_tool_calls"}
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIFields.without_effect | {
        "functions": ([],),
        "modalities": (["text"],),
        "reasoning_control": (False,),
    }
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    chat_template_kwargs: dict[Name, Any] = Field(
        {}, max_length=32, json_schema_extra={"additionalProperties": False}
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.limit() == 0:
            raise ValueError("max_tokens is 0; give at least 1, or -1 for as many as fit")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools]
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name!r}, which tools does not")
        if choice == "required" and not names:
            raise ValueError("tool_choice is required, so tools must name one")
        if self.forced_tools() and self.form():
            raise ValueError("a tool must be called, so the reply can have no other form")
        return self

    def n_alternatives(self) -> int | None:
        """Return how many rivals of each token to report."""
        return super().n_alternatives() or (self.top_logprobs if self.logprobs else None)

    def shown_tools(self) -> list[Tool]:
        """Return the tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    def forced_tools(self) -> list[Tool]:
        """Return the tools of which one must be called; none where the model is free."""
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == wanted]
        return self.tools if self.tool_choice == "required" else []


Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(OpenAIFields):
    """Body of /v1/completions."""

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIFields.without_effect | {
        "best_of": (1,),
        "suffix": ("",),
    }
    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Limit | None = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """vLLM's: the prompt's tokens by id, with ranks."""
    return_tokens_as_token_ids: bool = False
    """vLLM's: tokens are named ``token_id:7``, which no two tokens share."""

    @model_validator(mode="after")
    def _nothing_to_say(self) -> "CompletionRequest":
        if self.limit() == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens is 0, which only echo and prompt_logprobs can use")
        return self

    def n_alternatives(self) -> int | None:
        """Return how many rivals of each token to report."""
        return super().n_alternatives() or self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def prompt_scores(self) -> int | None:
        """Return how many alternatives of every prompt token are wanted; None for no scores."""
        wanted = [self.prompt_logprobs, self.n_alternatives() if self.echo else None]
        return max((each for each in wanted if each is not None), default=None)
