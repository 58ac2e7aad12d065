"""Reading what a stranger wrote: malformed contents become one error that names the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekd.errors import EdgekdError, ModelError

MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
"""What code raises that takes a file's own values for counts, names and types."""
_MAX_NAME_BYTES = 255  # NAME_MAX of Linux file systems


def parse_json(text: str | bytes) -> Any:
    """Return what the JSON ``text`` says.

    Raises:
        ValueError: it is no JSON, or nested so deeply that Python's parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` can be that of a file in a folder, and of nothing outside it."""
    try:
        is_short = len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False
    return is_short and "\0" not in name and name not in ("", "..") and Path(name).name == name


@contextmanager
def untrusted(path: Path) -> Iterator[None]:
    """Turn what malformed contents of ``path`` make Python raise into a ModelError.

    For code that takes a file's own values for counts, names and types.

    Raises:
        ModelError: the contents are malformed.
    """
    try:
        yield
    except EdgekdError:
        raise
    except MALFORMED as error:
        raise _malformed(path, error) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises bare ones
            raise
        raise _malformed(path, error) from error


def _malformed(path: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(
        f"{path} lacks something or contradicts itself ({type(error).__name__}: {reason}); "
        "fetch it again or export it again"
    )
