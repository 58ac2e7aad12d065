"""OpenAI's /v1/embeddings: vectors of texts, for models whose engine gives hidden states."""

import struct
from base64 import b64decode, b64encode
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field

from edgekd.runtime.api_answers import Embeddings
from edgekd.runtime.api_document import documented
from edgekd.runtime.api_errors import ApiError
from edgekd.runtime.asked import AskedBody, Positive
from edgekd.runtime.generation_fields import MAX_PROMPTS
from edgekd.runtime.openai_requests import Ids
from edgekd.runtime.openai_routes import Served, check_model

Json = dict[str, Any]


class EmbeddingsRequest(AskedBody):
    """Body of /v1/embeddings."""

    ignored: ClassVar[frozenset[str]] = frozenset({"user"})
    input: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None

    def inputs(self) -> list[str | list[int]]:
        """Return each text, as text or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


def embedding_routes(served: Served) -> APIRouter:
    """Return the route for ``served``."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", responses=documented(Embeddings, asks_model=True))
    @router.post("/embeddings", include_in_schema=False)
    async def embeddings(asked: EmbeddingsRequest) -> Json:
        check_model(asked.model, served.alias)
        inputs = [await _ids(served, each) for each in asked.inputs()]
        vectors = [b64decode(await served.texts.call("embed", ids=ids)) for ids in inputs]
        _check_width(asked, len(vectors[0]) // 4)
        n_tokens = sum(map(len, inputs))
        return {
            "object": "list",
            "data": [_entry(asked, index, raw) for index, raw in enumerate(vectors)],
            "model": served.alias,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    return router


async def _ids(served: Served, given: str | list[int]) -> list[int]:
    """Return the ids of one input.

    Raises:
        ApiError: it is empty or too long, or has ids that are none.
    """
    ids = await served.texts.encode(given)
    served.texts.room(len(ids))
    vocab_size = served.texts.info.vocab_size
    if not ids or max(ids) >= vocab_size:
        message = f"each input needs a token at least, and ids go from 0 to {vocab_size - 1}"
        raise ApiError(400, message, code="invalid_value", param="input")
    return ids


def _check_width(asked: EmbeddingsRequest, width: int) -> None:
    if asked.dimensions not in (None, width):
        message = f"the embeddings have {width} dimensions, {asked.dimensions} cannot be had"
        raise ApiError(400, message, code="invalid_value", param="dimensions")


def _entry(asked: EmbeddingsRequest, index: int, raw: bytes) -> Json:
    """Return one vector; ``raw`` are little-endian float32, as OpenAI's clients decode them."""
    is_text = asked.encoding_format == "base64"
    vector = b64encode(raw).decode() if is_text else list(struct.unpack(f"<{len(raw) // 4}f", raw))
    return {"object": "embedding", "index": index, "embedding": vector}
