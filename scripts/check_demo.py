"""Check what the demo claims: distilling beats hard labels, the grid beats rounding.

Reads the JSON document that ``edgekd demo --json`` prints last, from the file named.
"""

import json
import sys
from pathlib import Path
from typing import Any


def faults(document: dict[str, Any]) -> list[str]:
    """Return every claim that does not hold."""
    quality = {row["row"]: row["quality"] for row in document["rows"]}
    kl = {row: figures["kl_nats"] for row, figures in quality.items()}
    top1 = {row: figures["top1_agreement"] for row, figures in quality.items()}
    pruned = document["pruned_quality"]["kl_nats"]
    claims = {
        "distilled KL < baseline KL": kl["student distilled"] < kl["student baseline"],
        "distilled KL < 70 % of pruned KL": kl["student distilled"] < 0.7 * pruned,
        "int4 KL < quantized baseline KL": kl["distilled + int4"] < kl["student quantized"],
        "int4 top-1 > quantized baseline": top1["distilled + int4"] > top1["student quantized"],
    }
    print(f"KL to the teacher: pruned {pruned:.4f}, {kl}\ntop-1: {top1}")
    return [claim for claim, holds in claims.items() if not holds]


if __name__ == "__main__":
    last_line = Path(sys.argv[1]).read_text("utf-8").splitlines()[-1]
    if failed := faults(json.loads(last_line)):
        sys.exit(f"the demo does not show: {'; '.join(failed)}")
