"""How much memory a process of ``edgekd distill`` takes for its text, per token.

    python benchmarks/text_memory.py --out benchmarks/results/text_memory.json

Documents of random ids, cut and packed as a run does it. Every process of a run holds all of it,
so this bounds how much text a node can train on. Counted by tracemalloc: what Python's objects
take, not what the allocator keeps beside them.
"""

import argparse
import random
import tracemalloc
from pathlib import Path

from record import record

from edgekd.distill.data import Document
from edgekd.distill.packing import cut, pack

N_DOCUMENTS, DOCUMENT_TOKENS, VOCAB_SIZE = 40, 5000, 128_256


def measure(row_tokens: int) -> dict[str, float]:
    """Return bytes per token while documents are cut, and afterwards, with samples and rows."""
    choose = random.Random(0)
    tracemalloc.start()
    documents = [
        Document(
            [choose.randrange(VOCAB_SIZE) for _ in range(DOCUMENT_TOKENS)],
            [True] * DOCUMENT_TOKENS,
        )
        for _ in range(N_DOCUMENTS)
    ]
    samples = cut(documents, row_tokens)
    del documents
    rows = pack(samples, row_tokens)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_tokens = sum(len(sample.ids) for sample in samples)
    return {
        "tokens": n_tokens,
        "rows": len(rows),
        "bytes_per_token": held / n_tokens,
        "peak_bytes_per_token": peak / n_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record({"row_tokens": arguments.row_tokens} | measure(arguments.row_tokens), arguments.out)


if __name__ == "__main__":
    main()
