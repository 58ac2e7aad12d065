"""Bring an arm64 Python with edgekd's base and ONNX Runtime, run by an emulator, into FOLDER.

    python scripts/arm64_python.py FOLDER

Prints the path of a launcher, FOLDER/python, that behaves as an arm64 python3 does; it needs
neither root nor a change to the system, and FOLDER is all there is to delete. Works on Debian with
apt, dpkg-deb and pip: the emulator is qemu-user (the one on the PATH, else 13 MB), Python and its
libraries are Debian's for arm64 (25 MB with the list of packages), the wheels come from the package
index (54 MB). Exits with 3 where one of them cannot be had.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
UNREACHABLE = 3
# ONNX Runtime asks the processor for its instruction sets there, and qemu 7.2 shows the host's:
# importing it would crash. Features as those of qemu's neoverse-n1: int8 dot products, no i8mm.
CPU = "neoverse-n1"
CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc \
dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
# The emulator replaces itself by what the guest starts, so that must be this script again: -0 tells
# Python that it is its own executable.
LAUNCHER = """#!/bin/sh
PYTHONHOME={folder}/root/usr
PYTHONPATH={folder}/site${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONHOME PYTHONPATH
exec {emulator} -cpu {cpu} -L {folder}/root -0 {folder}/python {folder}/root/usr/bin/{name} "$@"
"""


class Failure(Exception):
    """What could not be had, and why."""


def main() -> None:
    """Print the launcher's path after putting everything it needs beside it."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            _give_up(f"there is no {tool}: this needs Debian")
    try:
        emulator = _emulator(folder)
        name = _system(folder)
        _wheels(folder, name.removeprefix("python"))
    except Failure as failure:
        _give_up(str(failure))
    launcher = folder / "python"
    launcher.write_text(LAUNCHER.format(folder=folder, emulator=emulator, cpu=CPU, name=name))
    launcher.chmod(0o755)
    print(launcher)


def _emulator(folder: Path) -> str:
    """Return the command that runs arm64 programs."""
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        if found := shutil.which(name):
            return found
    host, work, installed = folder / "host", folder / "apt-host", Path("/var/lib/dpkg/status")
    try:  # the machine's own list of packages spares one of 9 MB, but may be old or missing
        debs = _download(work, ["qemu-user"], system=installed, lists=Path("/var/lib/apt/lists"))
    except Failure:
        debs = _download(work, ["qemu-user"], system=installed)
    _unpack(debs, host)
    machine = platform.machine()
    loader = next(Path("/").glob("lib64/ld-linux-*.so.2"), None) or Path("/lib/ld-linux.so.2")
    return f"{loader} --library-path {host}/usr/lib/{machine}-linux-gnu {host}/usr/bin/qemu-aarch64"


def _system(folder: Path) -> str:
    """Unpack an arm64 Python and what it links to; return the name of its program."""
    nothing = folder / "apt" / "status"
    nothing.parent.mkdir(parents=True, exist_ok=True)
    nothing.touch()
    wanted = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
    root = folder / "root"
    _unpack(_download(folder / "apt", wanted, system=nothing, architecture="arm64"), root)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(CPUINFO)
    return next((root / "usr" / "bin").glob("python3.[0-9]*")).name


def _download(
    work: Path,
    packages: list[str],
    *,
    system: Path,
    lists: Path | None = None,
    architecture: str | None = None,
) -> list[Path]:
    """Return the .deb files of ``packages`` and of all they need beyond what ``system`` has.

    Without ``lists`` of what there is, fresh ones are fetched.
    """
    for name in ("lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True, exist_ok=True)
    options = [f"Dir::State={work}", f"Dir::Cache={work}/cache"]
    options += [f"Dir::State::lists={lists or work / 'lists'}"]
    options += [f"Dir::State::status={system}", "APT::Sandbox::User=", "Acquire::Languages=none"]
    options += ["APT::Install-Recommends=false", "Debug::NoLocking=1", "Acquire::Retries=3"]
    if architecture:
        options += [f"APT::Architecture={architecture}", f"APT::Architectures::={architecture}"]
    command = ["apt-get", "--quiet", "--yes", *(word for o in options for word in ("-o", o))]
    if lists is None:
        _run([*command, "update"])
    _run([*command, "--download-only", "install", *packages])
    return sorted((work / "cache" / "archives").glob("*.deb"))


def _unpack(debs: list[Path], folder: Path) -> None:
    for deb in debs:
        _run(["dpkg-deb", "-x", str(deb), str(folder)])


def _wheels(folder: Path, version: str) -> None:
    """Install edgekd, built from this checkout, with its extra ``onnx`` into FOLDER/site."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(ROOT)])
    (wheel,) = (folder / "wheel").glob("edgekd-*.whl")
    # Debian 12 has glibc 2.36; pip wants every older one named.
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)]
    target = ["--implementation=cp", f"--python-version={version}", "--only-binary=:all:"]
    place = ["--no-compile", "--target", str(folder / "site")]
    _run([*pip, "install", *platforms, *target, *place, f"{wheel}[onnx]"])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise Failure(f"{command[0]} failed: {last}")


def _give_up(reason: str) -> NoReturn:
    print(f"no arm64 Python: {reason}", file=sys.stderr)
    sys.exit(UNREACHABLE)


if __name__ == "__main__":
    main()
