"""Training text in, documents of token ids out.

A document is token ids and, for each, whether it is to be learned: all of plain text, the
replies (with the token that ends them) of a chat.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import DataError, MissingExtraError
from edgekd.runtime.chat_template import ChatTemplate, Message
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.untrusted import parse_json

_SEPARATOR = "\n\n\n"  # two blank lines part the documents of a text file
_HUB_PREFIX = "hf://"


@dataclass(frozen=True)
class Document:
    """One text as token ids."""

    ids: list[int]
    learned: list[bool]
    """Whether each token is a target."""


def read_documents(
    sources: Sequence[str], tokenizer: FileTokenizer, template: ChatTemplate | None
) -> list[Document]:
    """Return the documents of all ``sources``: text files, JSONL files, folders or ``hf://`` names.

    JSONL lines hold ``text``, ``messages``, or ``prompt`` and ``response``.

    Raises:
        DataError: a source is missing, empty, binary or malformed.
    """
    documents = []
    for source in sources:
        found = [
            document
            for sample in _read_samples(source)
            if len((document := encode_sample(sample, tokenizer, template)).ids) > 1
        ]
        if not found:
            raise DataError(f"{source} holds no text to train on; give a file with documents")
        documents.extend(found)
    return documents


def encode_sample(
    sample: dict[str, Any], tokenizer: FileTokenizer, template: ChatTemplate | None
) -> Document:
    """Return one sample as token ids.

    Raises:
        DataError: it has none of the known fields, or is a chat without a template.
    """
    if isinstance(sample.get("text"), str):
        ids = tokenizer.encode(sample["text"])
        return Document(ids, [True] * len(ids))
    if isinstance(sample.get("messages"), list):
        return _encode_chat(sample["messages"], tokenizer, template)
    if isinstance(sample.get("prompt"), str) and isinstance(sample.get("response"), str):
        messages = [
            {"role": "user", "content": sample["prompt"]},
            {"role": "assistant", "content": sample["response"]},
        ]
        return _encode_chat(messages, tokenizer, template)
    raise DataError(
        f"a sample has the fields {', '.join(sorted(sample)) or 'none'}; needed are text, "
        "messages, or prompt and response"
    )


def _encode_chat(
    messages: list[Message], tokenizer: FileTokenizer, template: ChatTemplate | None
) -> Document:
    """Return a chat with its replies as targets, each up to the token that ends it."""
    if template is None:
        raise DataError("chat data needs a chat template, and the student's tokenizer has none")
    text = template.render(messages, add_generation_prompt=False)
    spans = [
        _reply_span(messages, index, text, template)
        for index, message in enumerate(messages)
        if message.get("role") == "assistant"
    ]
    if not spans:
        raise DataError("a chat without any assistant message has nothing to learn")
    encoding = tokenizer.core.encode(text)
    ids = list(encoding.ids)
    learned = [False] * len(ids)
    for start, end in spans:
        for index, (first, last) in enumerate(encoding.offsets):
            if start <= first < end and last > first:
                learned[index] = True
                if ids[index] in tokenizer.stop_ids:
                    break
    return Document(ids, learned)


def _reply_span(
    messages: list[Message], index: int, text: str, template: ChatTemplate
) -> tuple[int, int]:
    """Return where reply ``index`` starts and ends in the rendered ``text``."""
    before = template.render(messages[:index], add_generation_prompt=True)
    after = template.render(messages[: index + 1], add_generation_prompt=False)
    if not (text.startswith(after) and after.startswith(before)):
        raise DataError(
            "the chat template renders a conversation unlike its beginning, so replies cannot be "
            "located; give prompt and response as text"
        )
    return len(before), len(after)


def _read_samples(source: str) -> Iterator[dict[str, Any]]:
    if source.startswith(_HUB_PREFIX):
        yield from _read_dataset(source.removeprefix(_HUB_PREFIX))
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"no data at {path}; give a text or JSONL file, a folder, or hf://NAME")
    if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
        yield from _read_dataset(str(path), is_saved=True)
        return
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of one file; JSONL is known by its first line, not by its name."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start}); convert it first"
        ) from error
    first = text.lstrip().partition("\n")[0]
    if not first.startswith("{") or not _is_object(first):
        yield from ({"text": part.strip("\n")} for part in text.split(_SEPARATOR) if part.strip())
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            if not _is_object(line):
                raise DataError(f"{path}, line {number} is no JSON object: {line[:40]!r}")
            yield parse_json(line)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _read_dataset(name: str, *, is_saved: bool = False) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "distill") from error
    try:
        found = (
            datasets.load_from_disk(name)
            if is_saved
            else datasets.load_dataset(name, split="train")
        )
    except (OSError, ValueError, ConnectionError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"cannot load the data set {name}: {reason}") from error
    yield from (found["train"] if isinstance(found, datasets.DatasetDict) else found)
