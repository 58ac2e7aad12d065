"""Exports two checkpoints in turns to one place for ever, in a fork for every line of input.

Imports take seconds and a fork none, so a test can kill many exports while they write. A line on
stdout says which process it is, and one more that an export has ended.
"""

import os
import sys
from pathlib import Path

import llama_cpp  # noqa: F401  what an export imports on its way is imported before the fork
import onnxruntime  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

from edgekd.export.export_model import Format, export_model


def main() -> None:
    first, second, name, out = sys.argv[1:]
    output_format: Format = "gguf" if name == "gguf" else "onnx"
    for _ in sys.stdin:
        if pid := os.fork():
            os.waitpid(pid, 0)
            continue
        print(os.getpid(), flush=True)
        while True:
            for model in (first, second):
                export_model(model, output_format, Path(out), quant="q4_0")
                print("ended", flush=True)


if __name__ == "__main__":
    main()
