"""The process that renders a chat template; started and bounded by edgekd.runtime.rendering.

A template is code out of an untrusted file. The sandbox keeps it from Python's objects, but not
from looping for hours, or from one power of numbers that holds the interpreter for days: only
a process can be stopped then. JSON lines in, JSON lines out; it ends when its stdin does.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate

MAX_BYTES = 1024**3
"""Address space; a prompt has 4 MB at most."""
MAX_S = 60
"""Longest life of one rendering, should the process that bounds it be gone."""


def main() -> int:
    """Serve until stdin ends; return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    template = ChatTemplate(**json.loads(sys.stdin.buffer.readline()))
    import jinja2.sandbox  # noqa: F401  # slow on a small device, and no fault of the template

    _bound_memory()
    _write(out, {"started": True})
    _end_in(MAX_S)
    _write(out, _compile(template))
    _end_in(0)
    for line in sys.stdin.buffer:
        _end_in(MAX_S)
        _write(out, _answer(template, json.loads(line)))
        _end_in(0)
    return 0


def _compile(template: ChatTemplate) -> dict[str, Any]:
    try:
        template.compiled  # noqa: B018  # constants are computed here, for ever if they like
    except ModelError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"the chat template cannot be compiled: {error!r}"[:500]}
    return {"ready": True}


def _answer(template: ChatTemplate, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"text": template.render(**asked)}
    except ModelError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "the chat template needs too much memory for these messages"}
    except Exception as error:  # what a template may do wrong has no end
        return {"error": f"the chat template fails on these messages: {error!r}"[:500]}


def _end_in(limit_s: int) -> None:
    """Let the system end this process then, though nobody is left to do it; 0 for never."""
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(limit_s)


def _bound_memory() -> None:
    """Let a template that doubles a string again and again hurt nobody else."""
    with suppress(ImportError, ValueError, OSError):  # not every system has such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))


def _write(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # nobody waits for an answer any more
        sys.exit(main())
