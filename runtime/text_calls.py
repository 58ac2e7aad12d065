"""Questions about text that the engine process answers: tokens, templates, vocabulary.

They are answered there since llama.cpp's tokenizer is native code that reads the model's file
and the client's text; the server's process runs neither.
"""

import traceback
from base64 import b64encode
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgekd.errors import EdgekdError, EngineError, ModelError
from edgekd.runtime.batch_loading import BatchModel
from edgekd.runtime.chat_prompt import encode_chat
from edgekd.runtime.model_meta import read_meta
from edgekd.runtime.rendering import Renderer

if TYPE_CHECKING:
    from edgekd.runtime.llamacpp_embedder import LlamaCppEmbedder

Json = dict[str, Any]

LANES = {"chat": "render", "render": "render", "embed": "embed"}
"""What may take long has a thread of its own, so that nothing else waits for it."""


class TextCalls:
    """What one model says about text."""

    def __init__(self, model: BatchModel) -> None:
        """Answer for ``model``; its engine is not touched."""
        self._model = model
        self._renderer = Renderer(model.chat_template) if model.chat_template else None
        self._embedder: LlamaCppEmbedder | None = None
        self._functions: dict[str, Callable[..., Any]] = {
            "encode": self._encode,
            "render": self._render,
            "chat": self._chat,
            "vocabulary": self._vocabulary,
            "describe": self._describe,
            "embed": self._embed,
        }

    def answer(self, asked: Json) -> Json:
        """Return the message that answers ``asked``, errors included."""
        number = asked["call"]
        try:
            return {"call": number, "value": self._functions[asked["name"]](**asked["arguments"])}
        except EdgekdError as error:
            return {"call": number, "error": str(error), "kind": type(error).__name__}
        except Exception as error:  # one text that breaks a tokenizer must not end the thread
            traceback.print_exc()  # a bug keeps its traceback, in the log of the server
            return {"call": number, "error": repr(error), "kind": EngineError.__name__}

    def _encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return self._model.tokenizer.encode(
            text, add_special=add_special, parse_special=parse_special
        )

    def _render(self, messages: list[Json], tools: list[Json], variables: Json) -> str:
        if self._renderer is None:
            raise ModelError(
                "the model has no chat template, so it is a base model; use /v1/completions, "
                "or serve an instruct model"
            )
        if tools and "tools" not in self._renderer.source:
            raise ModelError(
                "the model's chat template knows no tools, so the model was not trained to call "
                "functions; leave tools out, or serve a model that knows them"
            )
        return self._renderer.render(messages, tools, variables)

    def _chat(self, messages: list[Json], tools: list[Json], variables: Json, opening: str) -> Json:
        """Return prompt and ids of a chat whose reply begins with ``opening``."""
        prompt = self._render(messages, tools, variables) + opening
        return {"prompt": prompt, "ids": encode_chat(self._model.tokenizer, prompt)}

    def _embed(self, ids: list[int]) -> str:
        """Return the embedding of a text: base64 of little-endian float32."""
        if self._embedder is None:
            from edgekd.runtime.llamacpp_batch import LlamaCppBatchEngine
            from edgekd.runtime.llamacpp_embedder import LlamaCppEmbedder

            engine = self._model.engine
            if not isinstance(engine, LlamaCppBatchEngine):
                raise ModelError(
                    f"this model gives no embeddings: on {engine.name}, only its logits come out; "
                    "serve it as GGUF"
                )
            self._embedder = LlamaCppEmbedder(engine)
        return b64encode(self._embedder.embed(ids).astype("<f4").tobytes()).decode()

    def _vocabulary(self) -> Json:
        """Return every token's bytes, special names included, and which tokens are special."""
        tokenizer, ids = self._model.tokenizer, range(self._model.engine.vocab_size)
        raw = [tokenizer.raw_token_bytes(token_id) for token_id in ids]
        special = [i for i in ids if raw[i] and not tokenizer.token_bytes(i)]
        return {"tokens": [b64encode(piece).decode() for piece in raw], "special": special}

    def _describe(self) -> Json:
        template = self._model.chat_template
        return {
            "kind": self._model.kind.value,
            "file": self._model.path.name,
            "chat_template": template.source if template else None,
            "special_tokens": template.special_tokens if template else {},
            "meta": read_meta(self._model.kind, self._model.path, self._model.tokenizer),
            "stop_ids": sorted(self._model.tokenizer.stop_ids),
        }
