"""The training curve as a picture: a small SVG that any browser and model hub shows."""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from edgekd.distill.training_log import Log

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 320, 60, 40, 28
_TRAINED, _HELD_OUT = "#2563eb", "#dc2626"

_Point = tuple[float, float]


def write_curve(path: Path, log: Log) -> None:
    """Draw loss per step, and held-out KL where it was measured, from the training log."""
    trained = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["eval_kl_nats"]) for entry in log if "eval_kl_nats" in entry]
    path.write_text(_draw([("loss", _TRAINED, trained), ("held-out KL", _HELD_OUT, held_out)]))


def _draw(curves: Sequence[tuple[str, str, list[_Point]]]) -> str:
    points = [point for _, _, curve in curves for point in curve]
    last_step = max((step for step, _ in points), default=1)
    top = max((value for _, value in points), default=1.0) * 1.05 or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_axes(last_step, top),
    ]
    for index, (name, colour, curve) in enumerate(curves):
        placed = [_place(point, last_step, top) for point in curve]
        if not placed:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        if len(placed) < 30:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed
            ]
        x = _LEFT + 10 + 110 * index
        parts.append(f'<text x="{x}" y="18" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(last_step: float, top: float) -> list[str]:
    parts = []
    for tenth in range(0, 11, 2):
        _, y = _place((0, top * tenth / 10), last_step, top)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * tenth / 10:.3g}</text>'
        )
        x, _ = _place((last_step * tenth / 10, 0), last_step, top)
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
            f"{last_step * tenth / 10:.0f}</text>"
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">optimizer step</text>'
        f'<text x="12" y="{_HEIGHT / 2}" transform="rotate(-90 12 {_HEIGHT / 2})" '
        'text-anchor="middle">nats per token</text>'
    )
    return parts


def _place(point: _Point, last_step: float, top: float) -> _Point:
    step, value = point
    x = _LEFT + (_WIDTH - 10 - _LEFT) * step / last_step
    return x, _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * value / top
