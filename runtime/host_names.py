"""By which names a server may be called.

A web page can point a name of its own at any address that the user's browser reaches. The browser
then takes the server for the page's own, but names the page's host in every request.
"""

import ipaddress
import re

from edgekd.errors import RecipeError

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\]", re.ASCII)


def allowed_names(host: str, allowed: tuple[str, ...]) -> frozenset[str] | None:
    """Return what a server on ``host`` answers to besides ``allowed``; None stands for any name.

    Which names lead to an address of the network the server cannot know, so there it asks for
    none of them unless some are given.
    """
    if not allowed and not is_loopback(host):
        return None
    return LOOPBACK_HOSTS | {host_name(name) for name in (host, *allowed)}


def check_names(allowed: tuple[str, ...]) -> None:
    """Return only if every one of ``allowed`` is the name or address of a host.

    Raises:
        RecipeError: one is not.
    """
    for name in allowed:
        if host_name(name) != bracketed(name).lower() or not _NAME.fullmatch(host_name(name)):
            raise RecipeError(
                f"{name!r} is no host; name each as a browser does, without scheme and port, such "
                "as models.example.org or 192.168.1.20"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """Return ``host`` without its port, IPv6 in brackets, as a Host header names it."""
    name, bracket, _ = bracketed(host).partition("]")
    return (name + bracket if bracket else name.partition(":")[0]).lower()


def bracketed(host: str) -> str:
    """Return ``host`` as it stands in a URL: a bare IPv6 address in brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host
