"""A GGUF as llama.cpp's users make one, in a process of its own, for benchmarks/export.py.

    python benchmarks/llama_cpp_gguf.py CHECKPOINT OUT q4_0|q4_k_m

Its converter to f16, then its quantizer.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path


def convert_and_quantize(model: Path, out: Path, quant: str) -> None:
    """Write the GGUF of llama.cpp's two tools."""
    import llama_cpp

    fetch = Path(__file__).parents[1] / "scripts" / "fetch_converter.py"
    found = subprocess.run([sys.executable, str(fetch)], check=True, capture_output=True, text=True)
    converter = Path(found.stdout.strip()) / "convert_hf_to_gguf.py"
    with tempfile.TemporaryDirectory() as folder:
        middle = Path(folder) / "f16.gguf"
        command = [sys.executable, str(converter), str(model), "--outfile", str(middle)]
        subprocess.run([*command, "--outtype", "f16"], check=True, stdout=subprocess.DEVNULL)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
        status = llama_cpp.llama_model_quantize(
            str(middle).encode(), str(out).encode(), ctypes.byref(params)
        )
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("quant")
    arguments = parser.parse_args()
    convert_and_quantize(arguments.model, arguments.out, arguments.quant)


if __name__ == "__main__":
    main()
