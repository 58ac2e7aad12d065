"""What every benchmark does with its result: add machine, versions and date, print and keep it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekd.devices.detect import detect
from edgekd.files import write_text_atomic
from edgekd.manifest import tool_versions


def record(result: dict[str, Any], out: Path | None) -> None:
    """Print ``result`` with where and when it was measured; write it to ``out`` too if given."""
    provenance = {
        "machine": detect().as_dict(),
        "tools": tool_versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(result | provenance, indent=2)
    if out:
        write_text_atomic(out, text + "\n")
    print(text)
