"""A machine that ssh reaches: a real sshd on loopback with keys, port and configuration of its own.

Its users' home is a folder of the test (sshd's SetEnv), so nothing of the real home is touched. The
client is the real one too; what stands first in PATH only hands it a configuration file, where a
user has ~/.ssh/config.
"""

import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
MISSING = [name for name in ("ssh", "scp", "ssh-keygen") if shutil.which(name) is None]
_DEADLINE_S = 20.0


@dataclass(frozen=True)
class SshMachine:
    """The machine while it runs."""

    address: str
    home: Path
    """What is home there."""
    programs: Path
    """Found first by a login there."""
    client_path: str
    """PATH with which ssh here finds it."""
    server: psutil.Process

    @property
    def cache(self) -> Path:
        return self.home / ".cache/edgekd/artifacts"

    def install(self, name: str, script: str) -> None:
        """Give logins there a program."""
        write_program(self.programs / name, script)

    def install_edgekd(self) -> None:
        """Install the edgekd that is tested, as pip does it for a user."""
        path = shlex.quote(os.pathsep.join(sys.path))
        script = f'PYTHONPATH={path} exec {sys.executable} -m edgekd "$@"'
        write_program(self.home / ".local/bin/edgekd", script)

    def running(self, words: str = "") -> list[psutil.Process]:
        """Return what logins there have started and still runs, with ``words`` in its command."""
        found = []
        for process in psutil.process_iter():
            try:
                is_there = process.environ().get("HOME") == str(self.home)
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_there and is_alive and words in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def cut(self) -> None:
        """End every connection, as a lost network or a killed session does."""
        for process in self.server.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # ended with the one before
                if process.name().startswith("sshd"):
                    process.kill()


@contextmanager
def ssh_machine(folder: Path) -> Iterator[SshMachine]:
    """Yield a machine whose files lie in ``folder``, while it runs."""
    assert SSHD
    home, programs = folder / "home", folder / "programs"
    for place in (home, programs, folder / "client"):
        place.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _make_keys(folder, port)
    (folder / "sshd_config").write_text(_server_config(folder, home, programs, port))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd separates its privileges
    command = [SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "sshd.log")]
    with subprocess.Popen(command) as server:
        try:
            _wait_for(port, server, folder / "sshd.log")
            machine = SshMachine(
                address=f"ssh://{getpass.getuser()}@127.0.0.1:{port}",
                home=home,
                programs=programs,
                client_path=f"{folder / 'client'}{os.pathsep}{os.environ['PATH']}",
                server=psutil.Process(server.pid),
            )
            yield machine
            for process in machine.running():  # of a test that failed
                process.kill()
        finally:
            server.terminate()


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _make_keys(folder: Path, port: int) -> None:
    for name in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    host_key = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    config = folder / "ssh_config"
    config.write_text(
        f"IdentityFile {folder / 'user_key'}\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder / 'known_hosts'}\nStrictHostKeyChecking yes\n"
        "ControlPath none\nBatchMode yes\n"
    )
    for name in ("ssh", "scp"):
        real = shutil.which(name)
        write_program(folder / "client" / name, f'exec {real} -F {config} "$@"')


def _server_config(folder: Path, home: Path, programs: Path, port: int) -> str:
    path = f"{programs}:/usr/bin:/bin"
    return (
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host_key'}\n"
        f"AuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        f"PidFile {folder / 'sshd.pid'}\nSubsystem sftp internal-sftp\n"
        f'SetEnv "HOME={home}" "PATH={path}" TMPDIR=/tmp OMP_NUM_THREADS=1\n'
    )


def _wait_for(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline_s and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"sshd did not start: {log.read_text()}")
