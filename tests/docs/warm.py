"""A process that has imported everything, and forks a command for whoever types one.

    python tests/docs/warm.py SOCKET       says "ready", then listens

What ``write_program`` writes is typed in a shell like any program: it hands its arguments, folder,
environment, input and output over and ends as the command does. Importing torch takes seconds, a
command on a tiny model less than one, and the documentation has a hundred commands.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as there:
    there.connect({address!r})
    asked = [{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(there, [b"x"], [0, 1, 2])
    there.sendall(json.dumps(asked).encode() + b"\\n")
    sys.exit(int(there.recv(16) or b"70"))
"""


def write_program(path: Path, address: Path) -> None:
    """Write the program ``path``, whose name says what is run: edgekd, or python with a script."""
    text = _CLIENT.format(python=sys.executable, address=str(address), name=path.name)
    path.write_text(text)
    path.chmod(0o755)


def listen(address: str) -> None:
    """Fork a waiting process for every connection."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                with contextlib.suppress(OSError):
                    connection.sendall(str(_answer(connection)).encode())
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> int:
    """Return the exit code of the command that the other side of ``connection`` asks for."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as file:
        name, arguments, folder, environment = json.loads(file.readline())
    is_server = name == "edgekd" and arguments[:1] == ["serve"]
    spoken, speaks = os.pipe()
    pid = os.fork()
    if pid == 0:
        for descriptor, there in enumerate(descriptors):
            os.dup2(there, descriptor)
        if is_server:
            os.dup2(speaks, 1)
        _become(name, arguments + ["--port", "0"] * is_server, folder, environment)
    os.close(speaks)
    if is_server:  # it never ends by itself, and its usual port may be taken
        os.write(descriptors[1], os.read(spoken, 4096))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    code = _wait(pid, connection)
    if is_server and code == -signal.SIGTERM:
        return 0
    return code if code >= 0 else 128 - code


def _wait(pid: int, connection: socket.socket) -> int:
    """Return the exit code of ``pid``, which is killed as soon as the program that asked is."""
    connection.setblocking(False)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        with contextlib.suppress(BlockingIOError, ProcessLookupError):
            if connection.recv(1) == b"":
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _become(name: str, arguments: list[str], folder: str, environment: dict[str, Any]) -> None:
    """Run the command in this process, which ends with it."""
    from tests.faults.zygote import call_main

    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
        if name == "edgekd":
            sys.argv = ["edgekd", *arguments]
            code = call_main()
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    from tests.faults.zygote import import_everything

    import_everything()
    listen(sys.argv[1])
