"""Run llama.cpp's converter over many checkpoints in one process; the imports cost the most.

Reads from standard input a JSON list of jobs, each with ``model``, ``out``, ``outtype`` and, where
the converter cannot know the tokenizer, ``pre``: it recognizes published ones by a hash of ids.
The folder of the converter is the only argument.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    script = importlib.import_module("convert_hf_to_gguf")
    text_model = importlib.import_module("conversion.base").TextModel
    by_hash = text_model.get_vocab_base_pre
    for job in json.loads(sys.stdin.read()):
        _name_splitter(text_model, by_hash, job.get("pre"))
        sys.argv = ["convert", job["model"], "--outfile", job["out"], "--outtype", job["outtype"]]
        script.main()


def _name_splitter(text_model: Any, by_hash: Any, name: str | None) -> None:
    text_model.get_vocab_base_pre = by_hash if name is None else lambda self, tokenizer: name


if __name__ == "__main__":
    main()
