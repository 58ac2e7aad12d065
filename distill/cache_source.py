"""Where captured distributions come from: an engine on this machine, or an endpoint elsewhere."""

import hashlib
import os
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from edgekd.distill.cache_codec import encode, encode_top
from edgekd.distill.cache_format import Identity, Records
from edgekd.distill.data import Document
from edgekd.distill.load_models import backbone_dtype
from edgekd.distill.packing import IGNORED, labels_of
from edgekd.errors import EngineError, MissingExtraError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.files import sha256_of
from edgekd.runtime.engine import Engine
from edgekd.runtime.loading import open_model
from edgekd.runtime.model_kind import ModelKind, locate_model
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm

_TIMEOUT_S = 600.0


class TeacherSource(Protocol):
    """Gives the records of one sample at a time, the same ones each time."""

    name: str
    kind: str
    sha256: str
    revision: str | None
    dtype: str
    knows_temperatures: bool
    """Whether it gives enough to compute log Z at other temperatures than 1."""

    def records(self, key: bytes, sample: Document, identity: Identity) -> Records:
        """Return the records of the learned positions of ``sample``."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server that returns the log-probabilities of prompt tokens."""

    url: str
    """Up to and with ``/v1``."""
    model: str
    api_key: str | None = None


def open_source(
    teacher: str | Endpoint, context_tokens: int, revision: str | None
) -> TeacherSource:
    """Return the source for ``teacher``.

    Raises:
        ModelError: it cannot be read or run.
    """
    if isinstance(teacher, Endpoint):
        return EndpointSource(teacher)
    kind, path = locate_model(teacher, revision)
    if kind is not ModelKind.CHECKPOINT:
        engine = open_model(path, context_tokens=context_tokens).engine
        file = path if kind is ModelKind.GGUF else path / "model.onnx"
        return EngineSource(engine, path.name, str(kind), sha256_of(file), revision, "as stored")
    dtype = backbone_dtype("auto")
    model = load_causal_lm(path, dtype).to(_place())
    return EngineSource(
        TorchEngine(model, context_tokens),
        path.name,
        str(kind),
        open_checkpoint(path).weights_sha256(),
        revision,
        str(dtype).removeprefix("torch."),
    )


def _place() -> str:
    """Return this rank's GPU, so that the ranks of a node do not share the first one."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


class EngineSource:
    """A model run here: every logit is known, so records are unbiased."""

    knows_temperatures = True

    def __init__(
        self, engine: Engine, name: str, kind: str, sha256: str, revision: str | None, dtype: str
    ) -> None:
        """Ask ``engine``; the other arguments say what it runs."""
        self.name, self.kind, self.sha256 = name, kind, sha256
        self.revision, self.dtype = revision, dtype
        self._engine = engine

    def records(self, key: bytes, sample: Document, identity: Identity) -> Records:
        """Return the records of the learned positions of ``sample``."""
        self._engine.rewind()
        logits_TV = torch.from_numpy(self._engine.forward(sample.ids, every_logit=True))
        is_learned_T = torch.tensor(labels_of(sample)) != IGNORED
        # Seeded by the sample, so that order, ranks and restarts change nothing.
        digest = hashlib.sha256(key + str(identity.seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return encode(logits_TV[is_learned_T, : identity.vocab_size], identity, generator)


class EndpointSource:
    """A server: it gives the likeliest tokens only, so what they lack is kept as one sum.

    vLLM's ``prompt_logprobs`` names tokens by id. Servers of the older ``echo`` form name them by
    text, unless they know ``return_tokens_as_token_ids``.
    """

    kind = "endpoint"
    revision: str | None = None
    dtype = "as served"
    knows_temperatures = False

    def __init__(self, endpoint: Endpoint) -> None:
        """Ask ``endpoint``."""
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "distill") from error
        self.name = f"{endpoint.model} at {endpoint.url}"
        self.sha256 = hashlib.sha256(self.name.encode()).hexdigest()
        self._model = endpoint.model
        headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
        self._client = httpx.Client(
            base_url=endpoint.url.rstrip("/") + "/", headers=headers, timeout=_TIMEOUT_S
        )
        weakref.finalize(self, self._client.close)
        self._failures = (httpx.HTTPError, ValueError)

    def records(self, key: bytes, sample: Document, identity: Identity) -> Records:
        """Return the records of the learned positions of ``sample``."""
        answer = self._ask(sample.ids, identity.top_k)
        positions = _prompt_log_p(answer, len(sample.ids))
        ids, log_p = [], []
        for place, label in enumerate(labels_of(sample)):
            if label != IGNORED:  # the distribution after this token is listed at the next
                ranked = sorted(positions[place + 1].items(), key=lambda pair: -pair[1])
                kept = [pair for pair in ranked[: identity.top_k] if pair[0] < identity.vocab_size]
                ids.append([token for token, _ in kept])
                log_p.append([value for _, value in kept])
        return encode_top(ids, log_p)

    def _ask(self, ids: list[int], top_k: int) -> dict[str, Any]:
        request = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": top_k,
            "logprobs": top_k,
            "echo": True,
            "return_tokens_as_token_ids": True,
        }
        try:
            response = self._client.post("completions", json=request)
            response.raise_for_status()
            choice: dict[str, Any] = response.json()["choices"][0]
        except self._failures as error:
            raise EngineError(f"{self.name} failed: {error}") from error
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{self.name} answered without choices") from error
        return choice


def _prompt_log_p(choice: dict[str, Any], n_tokens: int) -> list[dict[int, float]]:
    """Return token id to log-probability for each token of the prompt; none for the first.

    Raises:
        EngineError: the answer has neither form, or is too short.
    """
    if served := choice.get("prompt_logprobs"):
        found = [
            {int(token): float(entry["logprob"]) for token, entry in (position or {}).items()}
            for position in served
        ]
    else:
        listed = (choice.get("logprobs") or {}).get("top_logprobs") or []
        found = [
            {_token_id(token): float(log_p) for token, log_p in (position or {}).items()}
            for position in listed
        ]
    if len(found) < n_tokens:
        raise EngineError(
            f"the endpoint gave log-probabilities for {len(found)} of {n_tokens} prompt tokens; it "
            "must support prompt_logprobs, or echo with logprobs"
        )
    return found


def _token_id(name: str) -> int:
    prefix, _, number = name.partition(":")
    if prefix != "token_id" or not number.isdigit():
        raise EngineError(
            f"the endpoint names tokens by text ({name!r}); one that knows "
            "return_tokens_as_token_ids, or prompt_logprobs, is needed"
        )
    return int(number)
