"""Which other machine ``edgekd bench --device`` means: ``ssh://[user@]host[:port]``, ``adb://SERIAL``.

A host may be a name out of the user's ssh_config. No part can begin with a dash, which ssh and adb
would take for an option.
"""

import re
from dataclasses import dataclass

from edgekd.errors import DeviceError

_SSH = re.compile(
    r"ssh://(?:(?P<user>\w[\w.+-]*)@)?(?P<host>\w[\w.-]*|\[[0-9A-Fa-f:]+(?:%\w+)?\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?",
    re.ASCII,
)
_ADB = re.compile(r"adb://(?P<serial>\w[\w.:-]*)/?", re.ASCII)


@dataclass(frozen=True)
class SshAddress:
    """A machine that ssh reaches."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        """Return the address as it was given."""
        return f"ssh://{self.login}{f':{self.port}' if self.port else ''}"

    @property
    def login(self) -> str:
        """Return ``user@host``; ssh's configuration may know the user."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def ssh(self) -> tuple[str, ...]:
        """Return the command that runs what follows it there."""
        port = ("-p", str(self.port)) if self.port else ()
        return ("ssh", *port, self.login.replace("[", "").replace("]", ""))


@dataclass(frozen=True)
class AdbAddress:
    """An Android phone that adb reaches."""

    serial: str

    def __str__(self) -> str:
        """Return the address as it was given."""
        return f"adb://{self.serial}"


def parse_address(text: str) -> SshAddress | AdbAddress:
    """Return which machine ``text`` means.

    Raises:
        DeviceError: it is no such address.
    """
    if match := _SSH.fullmatch(text):
        port = match["port"]
        if port is None or 0 < int(port) < 2**16:
            return SshAddress(match["host"], match["user"], int(port) if port else None)
    if match := _ADB.fullmatch(text):
        return AdbAddress(match["serial"])
    raise DeviceError(
        f"{text!r} is no device; give ssh://user@host, ssh://user@host:port or adb://SERIAL "
        "(as 'adb devices' lists it)"
    )
