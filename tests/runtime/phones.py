"""Phones that adb reaches, without a phone: what answers is this machine.

``RealAdbd`` is Android's own daemon and client, in a network namespace of their own, since adbd
listens on every address. EDGEKD_ADBD names the folder where scripts/fetch_adbd unpacked Debian's
packages (not installed, which would open the machine). ``StandIn`` is a script in place of the adb
program, of none of our code: it runs what it is given in a local folder. In both getprop and
dumpsys answer from the fixture of a phone, and the binary that measures is a script.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.devices.replayed import read_fixture
from tests.runtime.ssh_machine import write_program

ADBD = Path(os.environ["EDGEKD_ADBD"]) if "EDGEKD_ADBD" in os.environ else None
PLACE = Path("/data/local/tmp")
_TOOLS = "usr/lib/android-sdk/platform-tools/adbd"
_LIBRARIES = ("usr/lib/*/android", "usr/lib/*-linux-gnu*")
_ADBD_PORT, _SERVER_PORT = "6555", "15037"
# As adbd does, a command gets one socket for both directions, and a session of its own.
_STAND_IN = """#!{python} -SE
import os, shutil, socket, subprocess, sys, threading, time
words = sys.argv[3:] if sys.argv[1] == "-s" else sys.argv[1:]
phone, place = {phone!r}, {place!r}

def watch():
    while not os.path.exists(phone + "/gone"):
        time.sleep(0.02)
    os._exit(1)

def feed():
    while sent := os.read(0, 4096):
        ours.sendall(sent)
    ours.shutdown(socket.SHUT_WR)

if os.path.exists(phone + "/gone"):
    sys.exit("error: device 'PHONE' not found")
threading.Thread(target=watch, daemon=True).start()
if words[0] == "get-state":
    print("device")
elif words[0] == "push":
    target = words[2].replace(place, phone + "/tmp")
    while os.path.exists(phone + "/slow"):
        open(target, "w").close()
        time.sleep(0.02)
    shutil.copyfile(words[1], target)
elif words[0] == "shell":
    line = " ".join(words[1:]).replace(place, phone + "/tmp")
    ours, theirs = socket.socketpair()
    os.environ["PATH"] = {programs!r} + ":" + os.environ["PATH"]
    command = ["setsid", "-w", "sh", "-c", line]
    there = subprocess.Popen(command, stdin=theirs, stdout=theirs)
    theirs.close()
    threading.Thread(target=feed, daemon=True).start()
    while answer := ours.recv(65536):
        sys.stdout.buffer.write(answer)
    sys.stdout.flush()
    sys.exit(there.wait())
"""
_LLAMA_BENCH = """
echo "$@" >>{told}
while [ $# -gt 0 ]; do
  case $1 in -m) model=$2;; -p) prompt=$2;; -n) steps=$2;; -r) runs=$2;; esac; shift 2
done
[ "$(head -c 4 "$model")" = GGUF ] || {{ echo "error: failed to load model" >&2; exit 1; }}
echo "measuring $prompt and $steps" >&2
[ "$runs" -lt 1000 ] || sleep 600
row='"cpu_info": "", "n_threads": 4, "n_depth": 0, "samples_ns": [2000000000, 2000000000]'
echo "[{{\\"model_filename\\": \\"$model\\", \\"n_prompt\\": $prompt, \\"n_gen\\": 0, $row}},"
echo " {{\\"model_filename\\": \\"$model\\", \\"n_prompt\\": 0, \\"n_gen\\": $steps, $row}}]"
"""


class Phone:
    """One phone: how to start a program that sees it, and what happens on it."""

    def __init__(self, folder: Path) -> None:
        self.serial = "PHONE"
        self.programs = folder / "programs"
        self.told = folder / "told"
        """What the binary was given, a line for each call."""
        self.tmp = folder / "phone/tmp"
        """Its /data/local/tmp."""
        self.binary = folder / "llama-bench"
        self.tmp.mkdir(parents=True)
        write_program(self.binary, _LLAMA_BENCH.format(told=self.told))
        self.answer_as("snapdragon_phone", "Thermal Status: 1", "Thermal Status: 0")

    def answer_as(self, fixture: str, old: str = "", new: str = "") -> None:
        """Give it the properties and services of a phone that was recorded, ``old`` now ``new``."""
        cases: dict[str, list[str]] = {"getprop": [], "dumpsys": []}
        self.programs.mkdir(exist_ok=True)
        for number, (command, text) in enumerate(read_fixture(fixture).replies.items()):
            program, _, words = command.partition(" shell ")[2].partition(" ")
            if program in cases:
                file = self.programs / f"{number}.txt"
                file.write_text(text.replace(old, new) if old else text)
                cases[program].append(f"'{words}') cat {file};;")
        for program, lines in cases.items():
            write_program(self.programs / program, f'case "$*" in {" ".join(lines)} esac')

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs ``words`` where the phone is seen."""
        return list(words)

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def cut(self) -> None:
        """Take the phone away."""
        raise NotImplementedError

    def remove(self, *names: str) -> None:
        """Remove folders from its /data/local/tmp."""
        for name in names:
            shutil.rmtree(self.tmp / name, ignore_errors=True)

    def bench(self, model: Path, *options: str) -> "subprocess.Popen[str]":
        """Start edgekd bench on the phone."""
        words = [sys.executable, "-m", "edgekd", "bench", str(model), *options]
        words += ["--device", f"adb://{self.serial}", "--remote-binary", str(self.binary)]
        return subprocess.Popen(
            self.command(words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )

    def running(self) -> list[psutil.Process]:
        """Return what still runs of the binary, by the name of its folder."""
        found = []
        for process in psutil.process_iter():
            try:
                path = process.environ().get("LD_LIBRARY_PATH", "")
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if path.startswith(f"{self.tmp}/edgekd-") and process.status() != "zombie":
                found.append(process)
        return found


class StandIn(Phone):
    """A script in place of adb."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._client = folder / "client"
        self._phone = self.tmp.parent
        places = {"phone": self._phone, "place": PLACE, "programs": self.programs}
        texts = {name: str(place) for name, place in places.items()}
        self._client.mkdir()
        (self._client / "adb").write_text(_STAND_IN.format(python=sys.executable, **texts))
        (self._client / "adb").chmod(0o755)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self._client}{os.pathsep}{os.environ['PATH']}"}

    def cut(self) -> None:
        (self._phone / "gone").touch()


class RealAdbd(Phone):
    """Android's own adbd and adb."""

    def __init__(self, folder: Path, namespace: int) -> None:
        super().__init__(folder)
        assert ADBD
        self.serial, self.tmp = f"127.0.0.1:{_ADBD_PORT}", PLACE
        self._namespace = namespace
        self._home = str(folder)  # of the keys that adb makes
        libraries = ":".join(str(path) for name in _LIBRARIES for path in ADBD.glob(name))
        path = f"{self.programs}:{os.environ['PATH']}"
        settings = {"LD_LIBRARY_PATH": libraries, "ADBD_PORT": _ADBD_PORT, "PATH": path}
        self.daemon = subprocess.Popen(
            self.command([str(ADBD / _TOOLS)]),
            env={**os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def connect(self) -> None:
        for _ in range(50):
            if "connected to" in self.adb("connect", self.serial):
                return
            time.sleep(0.1)
        raise AssertionError("adbd did not start")

    def adb(self, *words: str) -> str:
        done = subprocess.run(
            self.command(["adb", *words]),
            capture_output=True,
            text=True,
            timeout=20,
            env=self.environment(),
            check=False,
        )
        return done.stdout

    def command(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._namespace}/ns/net", *words]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "ANDROID_ADB_SERVER_PORT": _SERVER_PORT, "HOME": self._home}

    def cut(self) -> None:
        self.daemon.kill()
        self.daemon.wait()


@contextmanager
def real_adbd(folder: Path) -> Iterator[RealAdbd]:
    """Yield a phone that is this machine, behind its own adbd."""
    made = [place for place in (PLACE, *PLACE.parents) if not place.exists()]
    PLACE.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout and holder.stdout.readline() == b"up\n"
    phone = RealAdbd(folder, holder.pid)
    try:
        phone.connect()
        yield phone
    finally:
        phone.adb("kill-server")
        phone.daemon.kill()
        phone.daemon.wait()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        phone.remove(*(entry.name for entry in PLACE.glob("edgekd-*")))
        for place in made:
            place.rmdir()


def why_no_adbd() -> str | None:
    """Return why Android's own daemon cannot be used here."""
    if ADBD is None or not (ADBD / _TOOLS).is_file():
        return "EDGEKD_ADBD names no folder with Debian's adbd; scripts/fetch_adbd DIR makes one"
    if os.geteuid() != 0 or any(shutil.which(n) is None for n in ("unshare", "nsenter", "ip")):
        return "a network namespace of its own needs root, util-linux and iproute2"
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        return "this container may not make a network namespace (CAP_SYS_ADMIN)"
    return None if shutil.which("adb") else "no adb here; on Debian: apt-get install adb"
