"""What another machine's edgekd answered: JSON that is checked before anything here reads it.

The check is the published schema, docs/schemas/bench-1.json, which lies in the package. So no
later step meets a figure that is text, a missing field, or a number that is none.
"""

import json
import math
from importlib.resources import files
from typing import Any

from edgekd.errors import DeviceError, MissingExtraError
from edgekd.runtime.bench_remote_tied import clean
from edgekd.runtime.bench_result import SCHEMA

_MAX_DIGITS = 30  # nanoseconds and bytes have 20 at most; more do not fit into a float's range
_SHOWN_CHARS = 80


class DocumentReader:
    """Reads what machines answer."""

    def __init__(self) -> None:
        """Get ready before anything is copied or measured.

        Raises:
            MissingExtraError: jsonschema is not installed.
        """
        try:
            from jsonschema import Draft202012Validator
        except ImportError as error:
            raise MissingExtraError("jsonschema", "remote") from error
        schema = files("edgekd").joinpath("schemas", "bench-1.json").read_text("utf-8")
        self._checker = Draft202012Validator(json.loads(schema))

    def read(self, output: str, who: str, n_models: int) -> dict[str, Any]:
        """Return the document of ``n_models`` models in the last line of ``output``.

        Raises:
            DeviceError: it is none, or of another version; ``who`` wrote it.
        """
        lines = output.strip().splitlines() or [""]
        document = parse_json(lines[-1])
        if not isinstance(document, dict) or "schema" not in document:
            shown = output.strip()[:_SHOWN_CHARS]
            raise DeviceError(f"edgekd on {who} gave no document, but {shown!r}")
        if document["schema"] != SCHEMA:
            raise DeviceError(
                f"edgekd on {who} writes {str(document['schema'])[:_SHOWN_CHARS]!r}, this one "
                f"reads {SCHEMA}; install the same version on both"
            )
        if wrong := self._first_fault(document):
            raise DeviceError(
                f"edgekd on {who} gave a document that breaks its schema at {wrong}; install the "
                "same version on both"
            )
        if len(document["results"]) != n_models:
            raise DeviceError(
                f"edgekd on {who} measured {len(document['results'])} models of {n_models}; "
                "install the same version on both"
            )
        return document

    def _first_fault(self, document: dict[str, Any]) -> str | None:
        error = next(self._checker.iter_errors(document), None)
        if error is None:
            return None
        return f"{clean(error.json_path)[:_SHOWN_CHARS]}: {clean(error.message)[:_SHOWN_CHARS]}"


def parse_json(text: str) -> Any:
    """Return the JSON in ``text``, no string of which steers a terminal; None where it is none.

    Numbers are finite and of a size that arithmetic bears.
    """
    try:
        return _clean_strings(
            json.loads(text, parse_float=_finite, parse_int=_bounded, parse_constant=_refuse)
        )
    except (ValueError, RecursionError):
        return None


def _clean_strings(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_clean_strings(entry) for entry in value]
    if isinstance(value, dict):
        return {clean(key): _clean_strings(entry) for key, entry in value.items()}
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:_MAX_DIGITS]}... is too large")
    return int(text)


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")
