"""A process that has imported everything and computed nothing, and forks one command after another.

    python tests/faults/zygote.py        a JSON job a line in, a JSON outcome a line out

Importing torch takes seconds, a command on a tiny model less than one. Every job is run by two
forks: the outer one lives in the broken world (mounts, limits, no network) and looks at the
outcome in it, the inner one is the command as its user starts it.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

Job = dict[str, Any]
ROOT = Path(__file__).parents[2]
FULL_DISK_BYTES = 16_384  # what is left on a full disk
LARGEST_FILE_BYTES = 4096
DISK_BYTES = 64 << 20
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000  # linux/sched.h
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18  # sys/mount.h
LIMIT_S = 60
PAUSE_S = 2
NOT_HERE = 77
"""Exit code where a fault cannot be caused on this machine."""


def serve() -> None:
    """Run jobs until the input ends."""
    import_everything()
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _run_outer(job)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        outcome = job["scratch"] + "/outcome.json"
        if code == NOT_HERE:
            print(json.dumps({"skipped": "needs root or user namespaces"}), flush=True)
        elif code == 0:
            print(Path(outcome).read_text(), flush=True)
        else:
            print(json.dumps({"broken": f"the harness exited with {code}"}), flush=True)


def import_everything() -> None:
    """Import all that commands do, so that their forks need not."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import llama_cpp  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import pydantic  # noqa: F401 - typer imports it with the first command
    import uvicorn  # noqa: F401

    import edgekd.cli
    import edgekd.distill.cache
    import edgekd.distill.carve
    import edgekd.distill.demo
    import edgekd.distill.distill
    import edgekd.export.export_model
    import edgekd.runtime.chat
    import edgekd.runtime.evaluate
    import edgekd.runtime.server  # noqa: F401


def _run_outer(job: Job) -> int:
    """Cause the fault, run the command in it, and write down what came of it."""
    os.setsid()
    place, scratch = Path(job["place"]), Path(job["scratch"])
    try:
        _prepare(job, place)
    except OSError:
        return NOT_HERE
    before = snapshot(place)
    start_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run_command(job, scratch)
    listens = job.get("stop_when_it_speaks") and job.get("kill_after_s") is None
    killed, code = _wait(
        pid, job.get("kill_after_s"), start_s, scratch / "stdout" if listens else None
    )
    left = _end_session()
    after = snapshot(place)
    spoken = {name: scratch / name for name in ("stdout", "stderr")}
    outcome = {
        "code": code,
        "killed": killed,
        "seconds": round(time.monotonic() - start_s, 3),
        **{
            name: path.read_text("utf-8", "replace") if path.is_file() else ""
            for name, path in spoken.items()
        },
        "before": before,
        "after": after,
        "orphans": left,
    }
    (scratch / "outcome.json").write_text(json.dumps(outcome))
    return 0


def _prepare(job: Job, place: Path) -> None:
    fault = job.get("fault")
    if fault in ("full", "readonly", "sensors", "network"):
        _unshare(_CLONE_NEWNET if fault == "network" else _CLONE_NEWNS)
    if fault in ("full", "readonly"):
        aside = Path(job["scratch"]) / "old"
        shutil.copytree(place, aside, symlinks=True)
        _mount("tmpfs", place, options=f"size={DISK_BYTES}")
        shutil.copytree(aside, place, dirs_exist_ok=True)
    if fault == "full":
        _fill(place / "filler")
    if fault == "readonly":
        _mount("tmpfs", place, _MS_REMOUNT | _MS_RDONLY)
    if fault == "sensors":
        _mount("tmpfs", Path("/sys"))


def _unshare(what: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user_id, group_id = os.getuid(), os.getgid()
    if libc.unshare(what):
        if libc.unshare(what | _CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user_id} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group_id} 1")
    if what == _CLONE_NEWNS:
        _mount("none", Path("/"), _MS_REC | _MS_PRIVATE)


def _mount(source: str, place: Path, flags: int = 0, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = source.encode(), str(place).encode(), b"tmpfs"
    if libc.mount(*names, ctypes.c_ulong(flags), options.encode()):
        raise OSError(ctypes.get_errno(), f"mount {place}")


def _fill(path: Path) -> None:
    """Write ``path`` until the disk has FULL_DISK_BYTES left."""
    free = os.statvfs(path.parent)
    size = free.f_bavail * free.f_frsize - FULL_DISK_BYTES
    with open(path, "wb") as file:
        file.write(bytes(size))


def _run_command(job: Job, scratch: Path) -> None:
    """Become the command: its arguments, input, output and limits."""
    code = 1
    try:
        for descriptor, name, mode in ((1, "stdout", "wb"), (2, "stderr", "wb")):
            with open(scratch / name, mode) as file:
                os.dup2(file.fileno(), descriptor)
        (scratch / "stdin").write_text(job.get("stdin", ""))
        with open(scratch / "stdin", "rb") as file:
            os.dup2(file.fileno(), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
        os.environ.update(job.get("env", {}))
        os.chdir(job["place"])
        if job.get("fault") == "file-size":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
        sys.argv = ["edgekd", *job["argv"]]
        if job.get("fault") == "memory" and job["memory_bytes"]:
            # Threads of a process without any memory hang in CPython: it starts afresh.
            resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
            os.execv(sys.executable, [sys.executable, "-m", "edgekd", *job["argv"]])
        elif job.get("fault") == "memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + job["headroom_bytes"]
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = call_main()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def call_main() -> int:
    """Return the exit code of ``edgekd``, its message printed as the interpreter does."""
    from edgekd.cli import main

    try:
        main()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


def _wait(
    pid: int, kill_after_s: float | None, start_s: float, spoken: Path | None
) -> tuple[bool, int]:
    """Return whether the command was killed, and its exit code; negative for a signal.

    One that never ends by itself gets SIGTERM when there is something in the file ``spoken``.
    """
    limit_s = LIMIT_S if kill_after_s is None else kill_after_s
    while time.monotonic() - start_s < limit_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return False, os.waitstatus_to_exitcode(status)
        if spoken and spoken.is_file() and spoken.stat().st_size:
            os.kill(pid, signal.SIGTERM)
            spoken = None
        slept_s = time.monotonic()
        time.sleep(0.002)
        if (paused_s := time.monotonic() - slept_s) > PAUSE_S:
            limit_s += paused_s  # the whole machine stood still, as virtual ones do
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return True, os.waitstatus_to_exitcode(status)


def _end_session() -> list[str]:
    """Return the commands of processes that outlived the command by two seconds; end them."""
    import psutil

    for _ in range(40):
        left = [
            process
            for process in psutil.process_iter()
            if process.pid != os.getpid() and _session(process.pid) == os.getpid()
        ]
        if not left:
            return []
        time.sleep(0.05)
    commands = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            commands.append(" ".join(process.cmdline()))
            process.kill()
    return commands


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def snapshot(place: Path) -> dict[str, str]:
    """Return the hash of every file below ``place``, and an empty one for an empty folder."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file() and path.name != "filler":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not any(path.iterdir()):
            found[name + "/"] = ""
    return found


if __name__ == "__main__":
    random.seed(0)
    serve()
