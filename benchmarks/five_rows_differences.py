"""What distillation bought, in benchmarks/five_rows.py: differences of rows on the same text."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edgekd.runtime.compare_quality import MeasuredQuality, compare_quality

Json = dict[str, Any]

PAIRS = (("student distilled", "student baseline"), ("distilled + int4", "student quantized"))


def differences(evaluated: Callable[[str], Json]) -> list[Json]:
    """Return how the rows of each pair differ, paired window by window.

    ``evaluated`` returns the document of ``edgekd eval`` on the text for a row.
    """
    found = []
    for new, base in PAIRS:
        pair = (_measured(row, evaluated(row)) for row in (base, new))
        found += [asdict(difference) for difference in compare_quality(*pair)]
    return found


def _measured(row: str, document: Json) -> MeasuredQuality:
    (model,) = document["models"]
    reference = ("teacher", document["reference"]["weights_sha256"])
    return MeasuredQuality(row, model["windows_sha256"], model["text"]["by_window"], reference)
