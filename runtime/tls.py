"""The server's certificate and key: both or none, and they must belong together."""

import ssl
from pathlib import Path

from edgekd.errors import RecipeError

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2; TLS 1.3 has its own list."""


def check_tls(cert: Path | None, key: Path | None) -> None:
    """Return only if ``cert`` and ``key`` can be served with, or neither is given.

    Raises:
        RecipeError: one is missing, cannot be read, or does not belong to the other.
    """
    if cert is None and key is None:
        return
    if cert is None or key is None:
        given, missing = ("key", "certificate") if cert is None else ("certificate", "key")
        raise RecipeError(f"TLS needs both files, but only the {given} is given; add the {missing}")
    for what, path in (("certificate", cert), ("key", key)):
        _check_readable(what, path)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=_refuse_password)
    except (ssl.SSLError, _EncryptedError) as error:
        raise RecipeError(_explain(error, cert, key)) from error


class _EncryptedError(Exception):
    """The key wants a password, which nobody is there to type."""


def _refuse_password() -> str:
    raise _EncryptedError


def _check_readable(what: str, path: Path) -> None:
    try:
        path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read the TLS {what} {path}: {error.strerror or error}"
        ) from error


def _explain(error: Exception, cert: Path, key: Path) -> str:
    if isinstance(error, _EncryptedError):
        return f"the TLS key {key} is encrypted; decrypt it: openssl pkey -in {key} -out NEW"
    reason = getattr(error, "reason", None) or "not PEM"
    if reason == "KEY_VALUES_MISMATCH":
        return f"the TLS key {key} does not belong to the certificate {cert}; give its own"
    return f"{cert} and {key} are no certificate and key in PEM format ({reason}); check both"
