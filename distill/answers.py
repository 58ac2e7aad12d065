"""Sequence-level distillation: the teacher answers prompts, the student learns the answers.

Kim and Rush 2016. Answers are text, so teacher and student need not share a tokenizer. They are
appended to a JSONL file one by one; a run that was killed goes on with the first prompt missing.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from edgekd.distill.cache_source import Endpoint
from edgekd.errors import DataError, EngineError, MissingExtraError
from edgekd.files import disk_errors
from edgekd.progress import Progress, Silence
from edgekd.runtime.chat_prompt import chat_prompt
from edgekd.runtime.generate import generate
from edgekd.runtime.loading import open_model
from edgekd.runtime.sampling import SamplingParams
from edgekd.untrusted import parse_json

Messages = list[dict[str, Any]]
Answer = Callable[[Messages], str]

_TIMEOUT_S = 600.0


def write_answers(
    teacher: str | Endpoint,
    prompts: Path,
    out: Path,
    params: SamplingParams,
    *,
    context_tokens: int = 2048,
    revision: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Append the teacher's answers to ``prompts`` to ``out`` and return how many there are.

    ``prompts`` is JSONL with ``prompt`` or ``messages``; ``out`` gets ``messages``.

    Raises:
        DataError: the prompts are missing or malformed, or ``out`` answers other prompts.
        ModelError: the teacher cannot be read, or has no chat template.
        EngineError: the teacher, or the endpoint, fails.
        OutputError: ``out`` cannot be written.
    """
    asked = [_messages_of(line, prompts, number) for number, line in _lines(prompts)]
    if not asked:
        raise DataError(f"{prompts} holds no prompts; give JSONL with prompt or messages")
    n_done = _count_answered(out, asked)
    if n_done == len(asked):
        return n_done
    answer = _asker(teacher, params, context_tokens, revision)
    with (progress or Silence()).track("answer", len(asked)) as advance, _append(out) as write:
        for number, messages in enumerate(asked[n_done:], n_done + 1):
            reply = {"role": "assistant", "content": answer(messages)}
            write(json.dumps({"messages": [*messages, reply]}, ensure_ascii=False))
            advance(number, f"{len(reply['content'])} characters")
    return len(asked)


def _asker(
    teacher: str | Endpoint, params: SamplingParams, context_tokens: int, revision: str | None
) -> Answer:
    if isinstance(teacher, Endpoint):
        return _endpoint_asker(teacher, params)
    loaded = open_model(teacher, context_tokens=context_tokens, revision=revision)

    def answer(messages: Messages) -> str:
        prompt_ids = chat_prompt(loaded, messages)
        with closing(generate(loaded, prompt_ids, params)) as pieces:
            return "".join(piece.text for piece in pieces)

    return answer


def _endpoint_asker(endpoint: Endpoint, params: SamplingParams) -> Answer:
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("httpx", "distill") from error
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    client = httpx.Client(
        base_url=endpoint.url.rstrip("/") + "/", headers=headers, timeout=_TIMEOUT_S
    )

    def answer(messages: Messages) -> str:
        request = {
            "model": endpoint.model,
            "messages": messages,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
        }
        try:
            response = client.post("chat/completions", json=request)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{endpoint.model} at {endpoint.url} failed: {error!r}") from error

    return answer


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _messages_of(line: str, path: Path, number: int) -> Messages:
    try:
        sample = parse_json(line)
        if isinstance(sample.get("prompt"), str):
            return [{"role": "user", "content": sample["prompt"]}]
        messages = sample["messages"]
        is_asked = isinstance(messages, list) and messages and messages[-1]["role"] != "assistant"
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number} has neither prompt nor messages") from error
    if not is_asked:
        raise DataError(f"{path}, line {number} has messages that end with an answer already")
    return list(messages)


def _count_answered(out: Path, asked: list[Messages]) -> int:
    """Return how many prompts ``out`` answers; a line cut short by a kill is dropped."""
    if not out.exists():
        return 0
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").splitlines()
    for number, (line, messages) in enumerate(zip(lines, asked, strict=False), 1):
        if _answered(line) != messages:
            raise DataError(f"{out}, line {number} answers another prompt; choose another --out")
    if len(whole) < len(content):
        os.truncate(out, len(whole))
    return min(len(lines), len(asked))


def _answered(line: str) -> Messages | None:
    """Return the messages that a line of ours answers; None if it is no such line."""
    try:
        return list(parse_json(line)["messages"][:-1])
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _append(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield what appends one line to ``path`` and flushes it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", buffering=1) as file:
            yield lambda line: print(line, file=file)
