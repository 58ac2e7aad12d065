"""Chat templates compiled and rendered in a process of their own, within a time limit."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from edgekd.errors import ModelError
from edgekd.runtime.chat_template import ChatTemplate

RENDER_S = 5.0
"""A template takes milliseconds; small devices and long chats, tenths of a second."""
START_S = 60.0

Json = dict[str, Any]


class Renderer:
    """Renders one template; for one thread."""

    def __init__(self, template: ChatTemplate, limit_s: float = RENDER_S) -> None:
        """Begin to start the process, so that the first chat need not wait for it."""
        self.source = template.source
        self._special_tokens = template.special_tokens
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = self._start()
        self._is_ready = False
        self._fault: ModelError | None = None  # of the template itself: no chat will ever do

    def render(self, messages: list[Json], tools: list[Json], variables: Json) -> str:
        """Return the prompt text for ``messages``; see ChatTemplate.render.

        Raises:
            ModelError: the template cannot be compiled, refuses these messages, or takes too
                long over them.
        """
        if self._fault:
            raise self._fault
        if self._process is None:
            self._process, self._is_ready = self._start(), False
        if not self._is_ready:
            self._read(self._process, START_S)
            self._await_compiled(self._process)
            self._is_ready = True
        asked = {"messages": messages, "tools": tools, "variables": variables}
        found = self._read(self._process, self._limit_s, asked)
        if "error" in found:
            raise ModelError(found["error"])
        return str(found["text"])

    def _await_compiled(self, process: "subprocess.Popen[bytes]") -> None:
        """Return once the template is compiled; one that cannot be is not tried again."""
        try:
            found = self._read(process, self._limit_s)
            if "error" in found:
                raise ModelError(found["error"])
        except ModelError as error:
            self._fault = error
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.runtime.render_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        _write(process, {"source": self.source, "special_tokens": self._special_tokens})
        return process

    def _read(
        self, process: "subprocess.Popen[bytes]", limit_s: float, asked: Json | None = None
    ) -> Json:
        """Return what the process says next; it is killed if it says nothing in time."""
        assert process.stdout
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            if asked is not None:
                _write(process, asked)
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            found: Json = json.loads(line)
            return found
        self.close()
        why = f"took over {limit_s:g} s" if late.is_set() else "ended its process"
        if self._is_ready:
            why += " with these messages"
        raise ModelError(
            f"the chat template {why} and was stopped; send a simpler chat, or serve a model with "
            "another template"
        )


def _write(process: "subprocess.Popen[bytes]", message: Json) -> None:
    assert process.stdin
    with suppress(BrokenPipeError):  # the answer that does not come tells
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
