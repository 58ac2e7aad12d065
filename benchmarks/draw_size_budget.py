"""Draw the trade-off of size and quality from committed results.

    cd benchmarks; python draw_size_budget.py --results results --out ../docs/img/size_budget.svg

Points on a line are choices by cost; the others are one rule or method each.
"""

import argparse
import json
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 340, 60, 44, 16, 20
_BITS = (4.25, 7.25)
_BY_COST, _RULE, _GPTQ = "#2563eb", "#6b7280", "#dc2626"


def draw(budget: dict[str, dict[str, float]], calibrated: dict[str, dict[str, float]]) -> str:
    """Return the picture as SVG."""
    fixed = budget["fixed rule"]
    top = 1.05 * max(row["kl_nats"] for row in budget.values())
    by_cost = sorted(
        (row["bits_per_weight"], row["kl_nats"])
        for name, row in budget.items()
        if name != "fixed rule"
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (_place(*point, top) for point in by_cost))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_axes(top),
        f'<polyline points="{line}" fill="none" stroke="{_BY_COST}" stroke-width="1.5"/>',
    ]
    for index, point in enumerate(by_cost):
        parts += _mark(*point, top, _BY_COST, "bits by cost" if index == 0 else "")
    bits = fixed["bits_per_weight"]
    parts += _mark(bits, fixed["kl_nats"], top, _RULE, "head at 8 bits")
    gptq = calibrated["Q4_0 by GPTQ"]["kl_nats"]
    parts += _mark(bits, gptq, top, _GPTQ, "head at 8 bits, GPTQ", below=True)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(top: float) -> list[str]:
    parts = []
    for fifth in range(6):
        value = top * fifth / 5
        _, y = _place(_BITS[0], value, top)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for half in range(9, 15):
        x, _ = _place(half / 2, 0, top)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{half / 2}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">bits per weight</text>'
        f'<text x="12" y="{_HEIGHT / 2}" transform="rotate(-90 12 {_HEIGHT / 2})" '
        'text-anchor="middle">KL to the float weights, nats per token</text>'
    )
    return parts


def _mark(
    bits: float, kl_nats: float, top: float, colour: str, label: str, *, below: bool = False
) -> list[str]:
    x, y = _place(bits, kl_nats, top)
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
        f'<text x="{x + 8:.1f}" y="{y + (16 if below else -4):.1f}" fill="{colour}">{label}</text>',
    ]


def _place(bits: float, kl_nats: float, top: float) -> tuple[float, float]:
    x = _LEFT + (_WIDTH - _RIGHT - _LEFT) * (bits - _BITS[0]) / (_BITS[1] - _BITS[0])
    return x, _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * kl_nats / top


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    budget, calibrated = (
        json.loads((arguments.results / f"{name}.json").read_text("utf-8"))["rows"]
        for name in ("size_budget", "calibrated_q4_0")
    )
    arguments.out.write_text(draw(budget, calibrated), "utf-8")


if __name__ == "__main__":
    main()
