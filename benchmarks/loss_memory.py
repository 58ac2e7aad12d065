"""Peak memory of the chunked loss against the dense one, each in a process of its own.

    python benchmarks/loss_memory.py --out benchmarks/results/loss_memory.json

Measured is what forward and backward add to the peak resident memory of a process that already
holds inputs and heads (hidden 576, SmolLM2's). Not measured: time, and the models themselves.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from edgekd.devices.detect import detect
from edgekd.devices.memory import peak_rss_bytes
from edgekd.files import write_text_atomic
from edgekd.manifest import tool_versions

N_TOKENS, VOCAB_SIZE, HIDDEN = 1024, 49_152, 576


def measure(kind: str) -> int:
    """Return the bytes that one forward and backward of the loss adds to the peak."""
    import torch
    import torch.nn.functional as F

    from edgekd.distill.losses import LossOptions, distillation_loss

    torch.manual_seed(0)
    hidden = torch.randn(N_TOKENS, HIDDEN, requires_grad=True)
    head = torch.randn(VOCAB_SIZE, HIDDEN).mul_(0.05).requires_grad_()
    teacher_hidden, teacher_head = torch.randn(N_TOKENS, HIDDEN), torch.randn(VOCAB_SIZE, HIDDEN)
    labels = torch.randint(0, VOCAB_SIZE, (N_TOKENS,))
    (hidden[:8] @ head[:8].T).sum().backward()  # type: ignore[no-untyped-call]  # warm the libraries
    before_bytes = peak_rss_bytes()
    if kind == "chunked":
        parts = distillation_loss(
            hidden, head, teacher_hidden, teacher_head, labels, torch.ones(N_TOKENS), LossOptions()
        )
        parts.loss.backward()  # type: ignore[no-untyped-call]
    else:
        student_log = F.log_softmax(hidden @ head.T, -1)
        teacher_log = F.log_softmax(teacher_hidden @ teacher_head.T, -1)
        loss = F.kl_div(student_log, teacher_log, log_target=True, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
    return peak_rss_bytes() - before_bytes


def run(kind: str) -> int:
    """Return the measurement of a fresh process."""
    command = [sys.executable, __file__, "--worker", kind]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", choices=["chunked", "dense"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        print(measure(arguments.worker))
        return
    samples = {kind: [run(kind) for _ in range(3)] for kind in ("chunked", "dense")}
    ratio = max(samples["chunked"]) / min(samples["dense"])
    result = {
        "tokens": N_TOKENS,
        "vocabulary": VOCAB_SIZE,
        "added_peak_bytes": samples,
        "largest_chunked_over_smallest_dense": ratio,
        "machine": detect().as_dict(),
        "tools": tool_versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        write_text_atomic(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
