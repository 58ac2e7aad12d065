"""What the commands share: option types, checks before heavy imports, and how they print."""

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated, Any, TextIO

import typer

from edgekd.distill.recipe import setting_fields, setting_types
from edgekd.errors import MissingExtraError

Model = Annotated[
    str, typer.Argument(help="HF folder, hub id, .gguf file or ONNX folder.", metavar="MODEL")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print results only.")]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="CPU threads.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Provider = Annotated[
    str,
    typer.Option(
        help="Execution provider of an ONNX folder: auto, cpu, qnn, openvino, webgpu, cuda, "
        "tensorrt, coreml."
    ),
]
RequireNpu = Annotated[
    bool, typer.Option("--require-npu", help="Refuse to leave any of an ONNX folder to the CPU.")
]
Emulate = Annotated[bool, typer.Option(help="Run what is compiled for an NPU, in its emulator.")]
Context = Annotated[int, typer.Option(help="Tokens of context.")]


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` one option for each setting of a recipe, passed on as keywords.

    An option that is not given is None, so that the recipe file, or the default, decides.
    """
    signature = inspect.signature(command)
    own = [entry for entry in signature.parameters.values() if entry.kind is not entry.VAR_KEYWORD]
    hints = setting_types()
    added = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_option(hints[entry.name], entry.metadata["help"], entry.default),
        )
        for entry in setting_fields()
    ]
    command.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
    command.__annotations__ |= {entry.name: entry.annotation for entry in added}
    return command


def need(extra: str, *packages: str) -> None:
    """Refuse to start where one of ``packages`` is missing.

    Raises:
        MissingExtraError: it names the ``extra`` that brings the package.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra)


def parse_layers(text: str) -> list[int]:
    """Return the numbers in ``text``, such as 0,1,5."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list such as 0,1,5") from None


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers in ``text``, such as 0,1024, the value of ``option``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is no list of numbers such as 0,1024"
        raise typer.BadParameter(message, param_hint=option) from None


def parse_count(text: str) -> int:
    """Return the number that ``text`` stands for, such as 90M."""
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1)
    try:
        return int(float(text[:-1] if scale > 1 else text) * scale)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no size such as 90M") from None


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` stands for, such as 80MB, with decimal units as vendors."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G)?B?", text, re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size such as 80MB")
    scale = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[(match[2] or "").lower()]
    return int(float(match[1]) * scale)


def is_first_rank() -> bool:
    """Whether this process speaks for all that torchrun or accelerate launch started."""
    return os.environ.get("RANK", "0") == "0"


def print_result(document: Any, as_json: bool, text: str) -> None:
    """Print the result of a command: for programs, or for people."""
    print(json.dumps(document) if as_json else text)


def ask_line(prompt: str, spoken: TextIO) -> str:
    """Return the next line that is typed, with the arrow keys' history on a terminal.

    Ctrl-C gives up the line; a second one in a row leaves, as the end of input does.

    Raises:
        EOFError: there is no more.
    """
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    for _ in range(2):
        try:
            if spoken is sys.stdout:
                return input(prompt)
            print(prompt, end="", file=spoken, flush=True)
            return input()
        except KeyboardInterrupt:
            print(file=spoken)
    raise EOFError


def _option(kind: Any, help: str, default: Any) -> Any:
    return Annotated[kind | None, typer.Option(help=f"{help}  [default: {default}]")]
