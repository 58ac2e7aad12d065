"""OpenAI's routes: /v1/models, /v1/chat/completions and /v1/completions, with and without /v1."""

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from edgekd.errors import EngineUnavailableError
from edgekd.runtime.api_answers import ChatCompletion, Model, Models, TextCompletion
from edgekd.runtime.api_document import documented
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.chat_replies import ChatReply
from edgekd.runtime.generation_requests import biases, requests_for
from edgekd.runtime.openai_replies import Envelope
from edgekd.runtime.openai_requests import ChatRequest, CompletionRequest
from edgekd.runtime.sse import answer
from edgekd.runtime.text_replies import TextReply
from edgekd.runtime.texts import Texts
from edgekd.runtime.tool_calls import OPENING, call_grammar

Json = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """The one model of a server."""

    texts: Texts
    alias: str


def openai_routes(served: Served) -> APIRouter:
    """Return the routes for ``served``."""
    router = APIRouter(tags=["OpenAI"])
    started = int(time.time())
    chats = documented(ChatCompletion, streams=True, asks_model=True)
    completed = documented(TextCompletion, streams=True, asks_model=True)

    @router.get("/v1/models", responses=documented(Models))
    @router.get("/models", include_in_schema=False)
    async def models() -> Json:
        return {"object": "list", "data": [await describe_model(served, started)]}

    @router.get("/v1/models/{name}", responses=documented(Model, asks_model=True))
    async def model(name: str) -> Json:
        check_model(name, served.alias)
        return await describe_model(served, started)

    @router.post("/v1/chat/completions", responses=chats)
    @router.post("/chat/completions", include_in_schema=False)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        check_model(asked.model, served.alias)
        return await _chat(served, asked, request)

    @router.post("/v1/completions", responses=completed)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        check_model(asked.model, served.alias)
        return await _complete(served, asked, request)

    return router


async def describe_model(served: Served, started: int) -> Json:
    """Return the entry of the model in a list of models."""
    meta: Json | None = None
    with suppress(EngineUnavailableError):  # the list does not wait for the model
        found, info = await served.texts.describe(), served.texts.info
        meta = {"n_vocab": info.vocab_size, "n_ctx": info.context_tokens} | found["meta"]
    return {
        "id": served.alias,
        "object": "model",
        "created": started,
        "owned_by": "edgekd",
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "meta": meta,
    }


def check_model(model: str | None, alias: str) -> None:
    """Return only if ``model`` is the one that is served; it is a name, never a path.

    Raises:
        ApiError: it is not.
    """
    if model not in (None, alias):
        message = (
            f"there is no model {model[:100]!r} here, only {alias!r}; leave the name out or use it"
        )
        raise ApiError(404, message, code="model_not_found", param="model")


def chat_arguments(asked: ChatRequest) -> Json:
    """Return what the engine process needs to render a chat."""
    return {
        "messages": [message.for_template() for message in asked.messages],
        "tools": [tool.model_dump(exclude_none=True) for tool in asked.shown_tools()],
        "variables": asked.chat_template_kwargs,
    }


async def _chat(served: Served, asked: ChatRequest, request: Request) -> Response:
    texts = served.texts
    forced = asked.forced_tools()
    grammar = call_grammar(forced) if forced else asked.form()
    found = await texts.call(
        "chat",
        opening=OPENING if forced else "",
        **chat_arguments(asked),
    )
    requests = requests_for(texts, asked, found["ids"], await biases(texts, asked), grammar)
    envelope = Envelope(served.alias, is_chat=True)
    is_scored = asked.n_alternatives() is not None
    vocabulary = await texts.vocabulary() if is_scored else None
    reply = ChatReply(asked, envelope, len(found["ids"]), vocabulary)
    return await answer(texts.run(request, asked, requests), reply, streamed=asked.stream)


async def _complete(served: Served, asked: CompletionRequest, request: Request) -> Response:
    texts = served.texts
    prompts = [await texts.encode(prompt) for prompt in asked.prompts()]
    bias = await biases(texts, asked)
    requests = [
        each
        for ids in prompts
        for each in requests_for(texts, asked, ids, bias, asked.form(), asked.prompt_scores())
    ]
    vocabulary = await texts.vocabulary()
    envelope = Envelope(served.alias, is_chat=False)
    reply = TextReply(asked, envelope, prompts, vocabulary)
    return await answer(texts.run(request, asked, requests), reply, streamed=asked.stream)
