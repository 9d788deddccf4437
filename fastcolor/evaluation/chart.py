"""Line charts as inline SVG: no library, sharp at any size, and coloured by the page's own style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 14, 44


@dataclass
class Line:
    """One line of a chart; its colour is that of the page's class `c<color>`, k is the page's text colour."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int | str
    dashed: bool = False
    marks: Sequence[str] = ()  # a word beside each point; points are dotted where there are any


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers from low to high, `count` or so."""
    raw = (high - low) / count
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    percent: tuple[bool, bool] = (False, False),
) -> str:
    """An <svg> element with axes, grid and legend; ranges are those of the points, with some room, where not given."""

    def spread(axis: int) -> tuple[float, float]:
        values = [p[axis] for line in lines for p in line.points if math.isfinite(p[axis])] or [0.0, 1.0]
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 1.0
        return low - room, high + room

    (x0, x1), (y0, y1) = x_range or spread(0), y_range or spread(1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), _TOP + down * (HEIGHT - _TOP - _BOTTOM)

    def number(value: float, as_percent: bool, step: float) -> str:
        if as_percent:
            return f"{value * 100:.{max(0, -math.floor(math.log10(step * 100) + 1e-9))}f} %"
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for axis, (low, high) in enumerate(((x0, x1), (y0, y1))):
        marks = ticks(low, high)
        step = marks[1] - marks[0] if len(marks) > 1 else 1.0
        for value in marks:
            x, y = place(value, y0) if axis == 0 else place(x0, value)
            text = number(value, percent[axis], step)
            if axis == 0:
                parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>')
            else:
                parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
                parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turn = f'transform="rotate(-90 12 {HEIGHT / 2:.0f})" x="12" y="{HEIGHT / 2:.0f}" text-anchor="middle"'
    parts.append(f"<text {turn}>{escape(y_label)}</text>")
    for line in lines:
        drawn = [place(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        dashes = " dashed" if line.dashed else ""
        if len(drawn) > 1:
            parts.append(f'<path class="line c{line.color}{dashes}" d="{path}"/>')
        if line.marks or len(drawn) == 1:
            for (x, y), word in zip(drawn, line.marks or ("",), strict=False):
                parts.append(f'<circle class="dot c{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
                if word:
                    parts.append(f'<text class="mark" x="{x + 6:.1f}" y="{y - 6:.1f}">{escape(word)}</text>')
    parts.append("</svg>")
    # words outside the picture wrap, and never lie upon a line
    keys = "".join(
        f'<li><svg viewBox="0 0 22 8"><path class="line c{line.color}{" dashed" if line.dashed else ""}" d="M0 4H22"/>'
        f"</svg>{escape(line.name)}</li>"
        for line in lines
    )
    return "".join(parts) + f'<ul class="legend">{keys}</ul>'
