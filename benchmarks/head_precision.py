"""What bf16 heads do to the gradient, as student and teacher come closer.

    python benchmarks/head_precision.py --teacher T --student S --text F --out \
        benchmarks/results/head_precision.json

The student's hidden states and head are moved from the student towards the teacher's own, so that
the KL falls; at each place the gradient of the forward KL with bf16 products is compared with
that of float32 ones. Models of equal hidden size only. Not measured: GPUs, which return float32
from bf16 products.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from record import record

from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import OnlineTarget, distillation_loss
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm

N_POSITIONS = 512
STEPS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


def measure(teacher: Path, student: Path, text: str) -> list[dict[str, float]]:
    """Return KL and relative gradient error at each place."""
    ids = torch.tensor([FileTokenizer(student).encode(text)[:N_POSITIONS]])
    hidden, heads = [], []
    for folder in (student, teacher):
        model = load_causal_lm(folder, torch.float32).eval()
        with torch.no_grad():
            hidden.append(model.get_decoder()(input_ids=ids).last_hidden_state[0])
        heads.append(model.get_output_embeddings().weight.detach())
    n = ids.shape[1]
    labels, weights = torch.zeros(n, dtype=torch.int64), torch.ones(n)

    def run(place: float, precision: Any) -> tuple[float, torch.Tensor]:
        moved = ((1 - place) * hidden[0] + place * hidden[1]).requires_grad_()
        head = (1 - place) * heads[0] + place * heads[1]
        target = OnlineTarget(hidden[1], heads[1])
        options = LossOptions(head_precision=precision)
        parts = distillation_loss(moved, head, target, labels, weights, options)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        assert moved.grad is not None
        return float(parts.divergence_nats) / n, moved.grad

    rows = []
    for place in STEPS:
        kl_nats, exact = run(place, "fp32")
        _, rounded = run(place, "bf16")
        error = float((rounded - exact).norm() / exact.norm())
        rows.append({"kl_nats": kl_nats, "gradient_error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8")[:20_000]
    record({"rows": measure(arguments.teacher, arguments.student, text)}, arguments.out)


if __name__ == "__main__":
    main()
