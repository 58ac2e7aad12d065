"""llama-server's own routes, with and without /v1: its clients work unchanged."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from edgekd.runtime.api_answers import Content, Slot, Tokens
from edgekd.runtime.api_answers import Prompt as PromptAnswer
from edgekd.runtime.api_document import Responses, documented
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.generation_requests import biases, requests_for
from edgekd.runtime.generation_settings import settings_of
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
from edgekd.runtime.texts import Texts

Json = dict[str, Any]
_Route = Callable[..., Any]


def native_routes(served: Served) -> APIRouter:
    """Return the routes for ``served``."""
    router = APIRouter(tags=["llama-server"])
    _add_texts(router, served.texts)
    _add_status(router, served)

    async def completion(asked: NativeRequest, request: Request) -> Response:
        check_model(asked.model, served.alias)
        return await _complete(served, asked, request)

    # /v1/completions is OpenAI's; without /v1 it always was another name of /completion.
    _both(router, "/completion", completion, "POST", documented(streams=True, asks_model=True))
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

    _both(router, "/tokenize", tokenize, "POST", documented(Tokens, asks_model=True))
    _both(router, "/detokenize", detokenize, "POST", documented(Content, asks_model=True))
    _both(
        router, "/apply-template", apply_template, "POST", documented(PromptAnswer, asks_model=True)
    )


def _add_status(router: APIRouter, served: Served) -> None:
    """Add what tells how the server is set up and what its slots do."""
    texts = served.texts

    async def props() -> Json:
        found = await texts.describe()
        n_ctx = texts.info.context_tokens
        template = found["chat_template"]
        defaults = NativeRequest.model_validate({"prompt": ""})
        return {
            "default_generation_settings": {
                "id": 0,
                "id_task": -1,
                "n_ctx": n_ctx,
                "speculative": False,
                "is_processing": False,
                "params": settings_of(defaults, defaults.sampling(n_ctx), n_ctx, served.alias),
            },
            "total_slots": texts.info.n_slots,
            "model_alias": served.alias,
            "model_path": found["file"],  # its name: where it lies is nobody's business
            "chat_template": template or "",
            "chat_template_caps": {"supports_tools": "tools" in (template or "")},
            "bos_token": found["special_tokens"].get("bos_token", ""),
            "eos_token": found["special_tokens"].get("eos_token", ""),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"edgekd-{version('edgekd')}",
            "is_sleeping": False,
        }

    async def slots(fail_on_no_slot: str | None = None) -> list[Json]:
        snapshot, info = texts.engine.snapshot, texts.info
        # The last word of an idle engine may name a request that has ended since.
        is_idle = texts.engine.n_requests == 0
        held = snapshot.slot_tokens if snapshot else (0,) * info.n_slots
        requests = snapshot.slot_requests if snapshot else (None,) * info.n_slots
        found = [
            {
                "id": slot,
                "n_ctx": info.context_tokens,
                "speculative": False,
                "is_processing": requests[slot] is not None and not is_idle,
                "id_task": -1 if is_idle or requests[slot] is None else slot,
                "n_tokens": held[slot],
            }
            for slot in range(info.n_slots)
        ]
        if fail_on_no_slot and all(slot["is_processing"] for slot in found):
            raise ApiError(503, "no slot is free", code="no_slot", type="server_error")
        return found

    _both(router, "/props", props, "GET", documented(asks_model=True))
    _both(router, "/slots", slots, "GET", documented(list[Slot], asks_model=True))


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
    return await answer(texts.run(request, requests), reply, streamed=asked.stream)


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


def _both(router: APIRouter, path: str, route: _Route, method: str, responses: Responses) -> None:
    router.add_api_route(path, route, methods=[method], responses=responses)
    router.add_api_route("/v1" + path, route, methods=[method], include_in_schema=False)


def _piece(raw: bytes) -> str | list[int]:
    """Return a token's text, or its bytes where they are only a part of a character."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
