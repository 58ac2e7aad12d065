"""Exports two checkpoints to one place for ever, in a fork for every line of input.

Imports take seconds and a fork none, so a test can kill many exports while they write.
"""

import os
import sys
from pathlib import Path

from edgekd.export.export_model import Format, export_model


def main() -> None:
    first, second, name, out = sys.argv[1:]
    output_format: Format = "gguf" if name == "gguf" else "onnx"
    for _ in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            os.waitpid(pid, 0)
            continue
        while True:
            for model in (first, second):
                export_model(model, output_format, Path(out), quant="q4_0")


if __name__ == "__main__":
    main()
