"""What ``edgekd report`` is asked for: from a TOML file, from options, or both.

The keys of the file are the names of the options, with ``_`` for ``-``.
"""

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError
from edgekd.runtime.bench_settings import BenchSettings
from edgekd.runtime.report_settings import ROWS, ReportSettings

_FILES = ("text", "reference", "questions")
_BENCH = {
    "prompt_tokens": "prompt_tokens",
    "decode_tokens": "decode_tokens",
    "depth": "depths",
    "repetitions": "repetitions",
    "threads": "n_threads",
    "ttft": "ttft_tokens",
    "roofline": "roofline",
}
"""Settings of the benchmark by their keys here."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


_COUNTS = ("tokens", "limit", "prompt_tokens", "decode_tokens", "repetitions", "threads")
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys((*ROWS, *_FILES), ("text", lambda value: isinstance(value, str))),
    **dict.fromkeys(_COUNTS, ("a whole number", _is_whole)),
    **dict.fromkeys(("depth", "ttft"), ("a list of whole numbers", _are_whole)),
    "roofline": ("true or false", lambda value: isinstance(value, bool)),
}


def resolve_report(path: Path | None, given: Mapping[str, Any]) -> ReportSettings:
    """Return the settings in the TOML file at ``path``, if any; what is ``given`` goes over it.

    A value of None counts as not given. Paths in the file are taken from where the command runs.

    Raises:
        RecipeError: the file is missing or malformed, or keys are unknown or of the wrong kind;
            all of them are named.
    """
    values = {} if path is None else _read_toml(path)
    values |= {key: value for key, value in given.items() if value is not None}
    bench = {name: values[key] for key, name in _BENCH.items() if key in values}
    for name in ("depths", "ttft_tokens"):
        if name in bench:
            bench[name] = tuple(bench[name])
    paths: dict[str, Any] = {key: Path(values[key]) for key in _FILES if key in values}
    counts = {"tokens": "n_tokens", "limit": "n_questions"}
    return ReportSettings(
        models={key: values[key] for key in ROWS if key in values},
        bench=BenchSettings(**({"roofline": True} | bench)),
        **paths,
        **{name: values[key] for key, name in counts.items() if key in values},
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}") from error
    faults = [
        f"{key} {value!r} is not {_KINDS[key][0]}"
        for key, value in values.items()
        if key in _KINDS and not _KINDS[key][1](value)
    ]
    if unknown := sorted(values.keys() - _KINDS.keys()):
        faults.append(f"unknown keys {', '.join(unknown)}; known are {', '.join(_KINDS)}")
    if faults:
        raise RecipeError(f"{path}: {'; '.join(faults)}")
    return values
