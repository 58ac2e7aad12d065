"""A model on a Hexagon NPU, by QNN's compiler and its emulator: sizes, cost, placement, fidelity.

    python benchmarks/npu.py MODEL --soc sm8650 --out benchmarks/results/npu_sm8650.json

With --calibrate-activations TEXT it is the W4A16 variant (npu_sm8650_w4a16.json): the KL to the
CPU's run of the same graph is to_onnx_cpu. With --max-binary-bytes the model is cut into parts
(npu_sm8650_parts.json).

The same Q4_0 blocks as in the GGUF are compiled and run in the emulator on one piece of a prompt
and two single tokens, teacher-forced, against torch on the rounded weights and against ONNX
Runtime's CPU. NOT measured: speed. The emulator's time says nothing about a chip, and no chip was
at hand. Runs about three minutes on two cores for a model of 135M; one chip at a time.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.npu_parts import MAX_BINARY_BYTES
from edgekd.export.plan import make_plan, parse_quant
from edgekd.export.to_npu import HOST_DATA_FILE, WEIGHTS_FILE, NpuOptions, write_npu
from edgekd.export.verify import check_blocks
from edgekd.export.verify_npu import verify_on_npu
from edgekd.progress import make_progress
from edgekd.runtime.static_model import GRAPHS, read_static
from edgekd.units import format_bytes

_Q4_0_BITS = 4.5
"""Of a weight: 4, and an fp16 scale for each 32."""
_MAX_SIZE_RATIO = 1.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="Of the model in the result, if not its folder's.")
    parser.add_argument("--soc", default="sm8650")
    parser.add_argument("--ctx", type=int, default=1024)
    parser.add_argument("--prefill", type=int, default=64)
    parser.add_argument(
        "--calibrate-activations", type=Path, help="Text: 16-bit integer activations (W4A16)."
    )
    parser.add_argument("--max-binary-bytes", type=int, default=MAX_BINARY_BYTES)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = NpuOptions(
        soc=arguments.soc,
        context_tokens=arguments.ctx,
        prefill_tokens=arguments.prefill,
        activations_text=arguments.calibrate_activations,
        max_binary_bytes=arguments.max_binary_bytes,
    )
    with tempfile.TemporaryDirectory(prefix="edgekd-npu-") as folder:
        result = measure(open_checkpoint(arguments.model), options, Path(folder))
    record({"model": arguments.name or arguments.model.name, **result}, arguments.out)


def measure(checkpoint: Checkpoint, options: NpuOptions, folder: Path) -> dict[str, Any]:
    progress = make_progress(False)
    plan = make_plan(checkpoint, parse_quant("q4_0"), "q4_0")
    report = write_npu(checkpoint, plan, folder, options, progress)
    progress.say("reading the weights back")
    n_equal = check_blocks(folder, checkpoint, plan)
    progress.say("running the emulator")
    seen = verify_on_npu(folder, checkpoint, plan)["on_npu"]
    sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS_FILE, HOST_DATA_FILE)}
    # A tied head is multiplied by on the NPU, so every weight is in the binary.
    wanted_bytes = checkpoint.n_parameters * _Q4_0_BITS / 8
    binaries: dict[str, int] = report["compiled"]["binaries"]
    model = read_static(folder)
    ratios = {
        graph: sum(binaries[f"{part}_ctx_qnn.bin"] for part in model.parts(graph)) / wanted_bytes
        for graph in GRAPHS
    }
    assert max(ratios.values()) <= _MAX_SIZE_RATIO, ratios
    return {
        "context_tokens": options.context_tokens,
        "prefill_tokens": options.prefill_tokens,
        "parameters": checkpoint.n_parameters,
        "equal_matrices": n_equal,
        "graph_bytes": sizes,
        "size_over_q4_0": ratios,
        "peak_memory": {
            graph: format_bytes(int(cost["peak_memory_bytes"]))
            for graph, cost in report["costs"].items()
        },
        **report,
        **seen,
    }


if __name__ == "__main__":
    main()
