"""The shapes of the server's answers, for its OpenAPI document and those who generate clients.

Answers are made in ``*_replies`` without these classes: a text's tokens are not worth a
validation each. The tests hold the two together. Imports pydantic, so only the server imports
this.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Json = dict[str, Any]


class Answer(BaseModel):
    """JSON of an answer: nothing but what is described."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """Every answer that is no success."""

    error: ErrorDetail


class Health(Answer):
    """The model is ready."""

    status: Literal["ok"]


class ModelMeta(Answer):
    """Sizes of a model; null is what its files do not tell."""

    vocab_type: int | None
    """Of ``enum llama_vocab_type`` in llama.h."""
    n_vocab: int
    n_ctx: int
    n_ctx_train: int | None
    n_embd: int | None
    n_params: int | None
    size: int
    """Bytes of the weights."""


class Modalities(Answer):
    """What goes in and comes out."""

    input_modalities: list[str]
    output_modalities: list[str]


class Model(Answer):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    architecture: Modalities
    meta: ModelMeta | None


class Models(Answer):
    """All models, which is one."""

    object: Literal["list"]
    data: list[Model]


class PromptDetails(Answer):
    """What was known before."""

    cached_tokens: int


class Usage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Answer):
    """How fast a text was made, as llama-server tells it."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class CalledFunction(Answer):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class TokenLogprob(Answer):
    """A token with its log-probability."""

    id: int
    token: str
    logprob: float | None
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """The chosen token, and the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """The log-probabilities of a reply."""

    content: list[ChosenLogprob]
    refusal: None


class ChatChoice(Answer):
    """One reply of several."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    """A whole chat reply."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class TextLogprobs(Answer):
    """The log-probabilities of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    content: list[ChosenLogprob] = []


class TextChoice(Answer):
    """One text of several."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[Json | None] = []


class TextCompletion(Answer):
    """A whole plain completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings


class TokenPiece(Answer):
    """A token and its text, or its bytes where they are a part of a character."""

    id: int
    piece: str | list[int]


class Tokens(Answer):
    """The tokens of a text."""

    tokens: list[int] | list[TokenPiece]


class Content(Answer):
    """The text of tokens."""

    content: str


class Prompt(Answer):
    """A chat as the model sees it."""

    prompt: str


class NextToken(Answer):
    """How far a text is."""

    has_next_token: bool
    has_new_line: bool
    n_remain: int
    n_decoded: int


class Slot(Answer):
    """A place for one text, with its KV cache."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    id_task: int
    params: Json
    next_token: NextToken
    n_tokens: int


class Embedding(Answer):
    """The vector of one text: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    """The vectors of all texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
