"""Another machine over plain ssh and scp: what is installed there, a model copied once, a command.

Both programs run as the user would run them: ssh_config, keys, agent, jump hosts and known_hosts
are the user's own, and no check is switched off.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgekd.errors import DeviceError
from edgekd.progress import Progress
from edgekd.runtime.bench_remote_address import SshAddress
from edgekd.runtime.bench_remote_artifact import Artifact
from edgekd.runtime.bench_remote_tied import Ended, run_streaming, shell_line, tied, unsaid
from edgekd.units import format_bytes

LOST = 255  # what ssh ends with when it is the connection that failed: ssh(1)
_SPARE_BYTES = 1 << 20  # folders, and what the disk rounds up
_NEEDED_PYTHON = (3, 11)
_FREE = re.compile(r"(\d+)\s+\d+%\s")  # df -P: blocks, used, available, capacity, mount point
# $1 names edgekd or is empty, the rest are hashes; one fact a line.
_LOOK = """
cache=$HOME/.cache/edgekd/artifacts
mkdir -p "$cache" || exit 1
find "$cache" -name '.incoming-*' -prune -mtime +0 -exec rm -rf {} + 2>/dev/null
echo "cache $cache"
echo "df $(df -Pk "$cache" | tail -n 1)"
named=$1; shift
for hash; do if [ -d "$cache/$hash" ]; then echo "has $hash $(ls "$cache/$hash")"; fi; done
if [ -n "$named" ]; then set -- "$named"
else set -- edgekd "$HOME/.local/bin/edgekd" "$HOME/.edgekd/bin/edgekd"; fi
for program; do
  case $program in '~/'*) program=$HOME/${program#'~/'};; esac
  if command -v "$program" >/dev/null; then echo "edgekd $program"; exit 0; fi
done
python3 -c 'import sys; print("python", *sys.version_info[:2])' 2>/dev/null || exit 0
if [ -z "$named" ] && python3 -c 'import edgekd' 2>/dev/null; then echo "module edgekd"; fi
"""
_SUMS = """
cd "$1" || exit 1
if command -v sha256sum >/dev/null; then find . -type f -exec sha256sum {} +
else find . -type f -exec shasum -a 256 {} +; fi
"""
_PUBLISH = 'if [ -d "$2" ]; then rm -rf "$1"; else mv "$1" "$2"; fi'


@dataclass(frozen=True)
class RemoteFacts:
    """What is on the other machine."""

    cache: str
    free_bytes: int | None
    held: dict[str, str]
    """Hash to the name of the model that lies there."""
    edgekd: tuple[str, ...] | None
    """The words that start it."""
    python: tuple[int, ...] | None


class SshHost:
    """One machine that ssh reaches."""

    def __init__(self, address: SshAddress, progress: Progress) -> None:
        """Remember where it is; ``progress`` hears what the programs there say."""
        self.address = address
        self._progress = progress

    def look(self, hashes: Sequence[str], edgekd: str | None) -> RemoteFacts:
        """Return what is there, which of ``hashes`` among it.

        Raises:
            DeviceError: it cannot be reached, or its home cannot be written.
        """
        ended = self._short(shell_line(_LOOK, edgekd or "", *hashes))
        if ended.code:
            raise self.error(ended, "cannot be used")
        return parse_facts(ended.output)

    def copy(self, artifact: Artifact, facts: RemoteFacts) -> str:
        """Return where ``artifact`` lies there, copied unless its hash is there already.

        Raises:
            DeviceError: there is no room, or the copy failed; what lay there is as it was.
        """
        if name := facts.held.get(artifact.sha256):
            return f"{facts.cache}/{artifact.sha256}/{name}"
        self._need_room(artifact, facts)
        size = format_bytes(artifact.n_bytes)
        self._progress.say(f"copying {artifact.path.name} ({size}) to {self.address}")
        incoming = f"{facts.cache}/.incoming-{artifact.sha256}-{secrets.token_hex(4)}"
        try:
            self._send(artifact, incoming)
            self._publish(incoming, f"{facts.cache}/{artifact.sha256}")
        except BaseException:
            self._short(shell_line('rm -rf "$1"', incoming))
            raise
        facts.held[artifact.sha256] = artifact.name
        return f"{facts.cache}/{artifact.sha256}/{artifact.name}"

    def run(self, command: Sequence[str]) -> Ended:
        """Run ``command`` there, which does not outlive the connection; say its progress."""
        return self._ssh(tied(command), self._progress.say)

    def error(self, ended: Ended, what: str) -> DeviceError:
        """Return what to say of a command that failed: of the connection, or of the machine."""
        if ended.code == LOST:
            advice = f"see that this works, then try again: {' '.join(self.address.ssh)} true"
            return DeviceError(f"{self.address} {what}: {ended.last_line}; {advice}")
        return DeviceError(f"{self.address} {what}: {ended.last_line}")

    def _need_room(self, artifact: Artifact, facts: RemoteFacts) -> None:
        needed, free = artifact.n_bytes + _SPARE_BYTES, facts.free_bytes
        if free is not None and free < needed:
            raise DeviceError(
                f"{self.address} has {format_bytes(free)} free in {facts.cache}, "
                f"{artifact.path.name} needs {format_bytes(needed)}; make room there, "
                "old models in that folder can be removed"
            )

    def _send(self, artifact: Artifact, incoming: str) -> None:
        made = self._short(shell_line('mkdir "$1"', incoming))
        if made.code:
            raise self.error(made, "cannot hold the model")
        port = ("-P", str(self.address.port)) if self.address.port else ()
        target = f"{self.address.login}:{incoming}/{artifact.name}"
        source = str(artifact.path.absolute())  # absolute, so that no colon makes a host of it
        sent = run_streaming(("scp", "-q", "-r", *port, source, target))
        if sent.code:
            raise self._not_arrived(artifact, sent, incoming)
        sums = self._short(shell_line(_SUMS, incoming))
        if sums.code:
            raise self.error(sums, "cannot check the model")
        if sorted(parse_sums(sums.output)) != sorted(artifact.hashes.values()):
            raise DeviceError(
                f"{artifact.path.name} changed on its way to {self.address}; try again, and look "
                "at the disk there if it happens again"
            )

    def _not_arrived(self, artifact: Artifact, sent: Ended, incoming: str) -> DeviceError:
        """Return what to say of a copy that failed; scp does not tell a full disk from others."""
        what = f"{artifact.path.name} did not arrive on {self.address}: {sent.last_line}"
        free = parse_free(self._short(shell_line('df -Pk "$1" | tail -n 1', incoming)).output)
        if free is not None and free < _SPARE_BYTES:
            return DeviceError(f"{what}; {format_bytes(free)} are free there, make room")
        return DeviceError(f"{what}; nothing is left of it if that can be reached, try again")

    def _publish(self, incoming: str, place: str) -> None:
        moved = self._short(shell_line(_PUBLISH, incoming, place))
        if moved.code:
            raise self.error(moved, "cannot hold the model")

    def _short(self, line: str) -> Ended:
        return self._ssh(line)

    def _ssh(self, line: str, say: Callable[[str], None] = unsaid) -> Ended:
        return run_streaming((*self.address.ssh, line), say)


def parse_facts(text: str) -> RemoteFacts:
    """Return the facts that the script ``_LOOK`` printed.

    Raises:
        DeviceError: its output is not there, as where a login prints and ends.
    """
    cache, free = "", None
    edgekd: tuple[str, ...] | None = None
    python: tuple[int, ...] | None = None
    held: dict[str, str] = {}
    for line in text.splitlines():
        match line.split(" ", 2):
            case ["cache", *rest]:
                cache = " ".join(rest)
            case ["df", *rest]:
                free = parse_free(" ".join(rest))
            case ["has", sha256, name]:
                held[sha256] = name
            case ["edgekd", *rest]:
                edgekd = (" ".join(rest),)
            case ["module", _]:
                edgekd = ("python3", "-m", "edgekd")
            case ["python", major, minor] if (major + minor).isdigit():
                python = (int(major), int(minor))
    if not cache.startswith("/"):
        raise DeviceError(f"no POSIX shell answered there, but {text.strip()[:80]!r}")
    return RemoteFacts(cache, free, held, edgekd, python)


def parse_free(line: str) -> int | None:
    """Return the bytes that are free by a line of df; None where it is none."""
    found = _FREE.search(line)
    return int(found[1]) * 1024 if found else None


def parse_sums(text: str) -> list[str]:
    """Return the hashes out of what sha256sum printed; it marks strange names with a backslash."""
    return [line.lstrip("\\").split()[0] for line in text.splitlines() if line.strip()]


def missing_edgekd(
    address: SshAddress, facts: RemoteFacts, extras: Sequence[str], named: str | None
) -> DeviceError:
    """Return what to say where edgekd was not found."""
    ssh = " ".join(address.ssh)
    if named:
        advice = "give --remote-edgekd the whole path of a program there"
        return DeviceError(f"{address} has no program {named}; {advice}")
    found = "no python3" if facts.python is None else f"Python {'.'.join(map(str, facts.python))}"
    if facts.python is None or facts.python < _NEEDED_PYTHON:
        return DeviceError(
            f"{address} has {found}, and no edgekd; install Python 3.11 or later there, "
            "or name an edgekd with --remote-edgekd PATH"
        )
    install = f"~/.edgekd/bin/pip install 'edgekd[{','.join(extras)}]'"
    return DeviceError(
        f"{address} has {found}, but no edgekd; install it by: "
        f'{ssh} "python3 -m venv ~/.edgekd && {install}", '
        "or name it with --remote-edgekd PATH"
    )
