"""llama-server's own routes, with and without /v1: its clients work unchanged."""

from typing import Any

from fastapi import APIRouter, Request, Response

from edgekd.runtime.api_answers import Content, Tokens
from edgekd.runtime.api_answers import Prompt as PromptAnswer
from edgekd.runtime.api_document import documented, with_and_without_v1
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.generation_requests import biases, requests_for
from edgekd.runtime.native_replies import NativeReply
from edgekd.runtime.native_requests import (
    DetokenizeRequest,
    NativeRequest,
    Prompt,
    PromptObject,
    TokenizeRequest,
)
from edgekd.runtime.openai_requests import ChatRequest
from edgekd.runtime.openai_routes import Served, chat_arguments, check_model
from edgekd.runtime.sse import answer
from edgekd.runtime.state_routes import add_state
from edgekd.runtime.texts import Texts

Json = dict[str, Any]


def native_routes(served: Served) -> APIRouter:
    """Return the routes for ``served``."""
    router = APIRouter(tags=["llama-server"])
    _add_texts(router, served.texts)
    add_state(router, served)

    async def completion(asked: NativeRequest, request: Request) -> Response:
        check_model(asked.model, served.alias)
        return await _complete(served, asked, request)

    # /v1/completions is OpenAI's; without /v1 it always was another name of /completion.
    with_and_without_v1(
        router, "/completion", completion, "POST", documented(streams=True, asks_model=True)
    )
    router.add_api_route("/completions", completion, methods=["POST"], include_in_schema=False)
    return router


def _add_texts(router: APIRouter, texts: Texts) -> None:
    """Add what turns text into tokens and back."""

    async def tokenize(asked: TokenizeRequest) -> Json:
        flags = {"add_special": asked.add_special, "parse_special": asked.parse_special}
        ids = await texts.encode(asked.content, **flags)
        if not asked.with_pieces:
            return {"tokens": ids}
        vocabulary = await texts.vocabulary()
        return {"tokens": [{"id": i, "piece": _piece(vocabulary.bytes_of(i))} for i in ids]}

    async def detokenize(asked: DetokenizeRequest) -> Json:
        n_tokens = texts.info.vocab_size
        if wrong := next((each for each in asked.tokens if each >= n_tokens), None):
            message = f"there is no token {wrong}, they go from 0 to {n_tokens - 1}"
            raise ApiError(400, message, code="invalid_value", param="tokens")
        vocabulary = await texts.vocabulary()
        raw = b"".join(map(vocabulary.bytes_of, asked.tokens))
        return {"content": raw.decode("utf-8", "replace")}

    async def apply_template(asked: ChatRequest) -> Json:
        prompt = await texts.call("render", **chat_arguments(asked))
        return {"prompt": prompt}

    for path, route, answer_of in (
        ("/tokenize", tokenize, Tokens),
        ("/detokenize", detokenize, Content),
        ("/apply-template", apply_template, PromptAnswer),
    ):
        with_and_without_v1(router, path, route, "POST", documented(answer_of, asks_model=True))


async def _complete(served: Served, asked: NativeRequest, request: Request) -> Response:
    texts = served.texts
    bias, form = await biases(texts, asked), asked.form()
    requests = [
        each
        for prompt in asked.prompts()
        for each in requests_for(texts, asked, await _encode(texts, prompt), bias, form)
    ]
    n_ctx = texts.info.context_tokens
    reply = NativeReply(asked, served.alias, n_ctx, requests, await texts.vocabulary())
    return await answer(texts.run(request, asked, requests), reply, streamed=asked.stream)


async def _encode(texts: Texts, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt; only text that begins it gets the tokens of a beginning."""
    if isinstance(prompt, PromptObject):
        prompt = prompt.prompt_string
    pieces: list[int | str] = [prompt] if isinstance(prompt, str) else list(prompt)
    found: list[int] = []
    for place, piece in enumerate(pieces):
        found += (
            [piece] if isinstance(piece, int) else await texts.encode(piece, add_special=place == 0)
        )
    return found


def _piece(raw: bytes) -> str | list[int]:
    """Return a token's text, or its bytes where they are only a part of a character."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
