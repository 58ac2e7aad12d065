"""What every benchmark does with its result: add machine, versions and date, print and keep it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgekd.devices.detect import detect
from edgekd.files import write_text_atomic
from edgekd.manifest import tool_versions


def record(result: dict[str, Any], out: Path | None, peers: Sequence[str] = ()) -> None:
    """Print ``result`` with where and when it was measured; write it to ``out`` too if given.

    ``peers`` are the packages beside which edgekd was measured: their versions are kept.
    """
    provenance = {
        "machine": detect().as_dict(),
        "tools": tool_versions(),
        **({"peers": {name: _version(name) for name in peers}} if peers else {}),
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(result | provenance, indent=2)
    if out:
        write_text_atomic(out, text + "\n")
    print(text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
