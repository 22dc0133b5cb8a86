"""Plots as SVG, with nothing but text: bars with their range, and lines over a logarithmic axis.

A handful of shapes needs no plotting library, and the files stay small and readable in a diff.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#2166ac", "#7f7f7f", "#b2182b", "#1b7837", "#e08214", "#762a83", "#35978f", "#b35806")
_WIDTH = 860
_LEFT = 290
_RIGHT = 110
_STYLE = "font-family: system-ui, sans-serif; font-size: 13px"


@dataclass(frozen=True)
class Bar:
    """A bar with its range."""

    label: str
    value: float
    low: float
    high: float
    emphasis: bool = False


def bars(title: str, unit: str, found: Sequence[Bar]) -> str:
    """Horizontal bars, one below the other, with the range of each as a line."""
    largest = max((bar.high for bar in found), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / largest
    height = 46 + 26 * len(found)
    parts = [_head(height, title), _text(12, 22, f"{title} ({unit})", weight="bold")]
    for number, bar in enumerate(found):
        y = 40 + 26 * number
        colour = _COLOURS[0] if bar.emphasis else _COLOURS[1]
        parts.append(_text(_LEFT - 8, y + 14, bar.label, anchor="end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{bar.value * scale:.1f}" height="18" '
            f'fill="{colour}"/>'
        )
        low, high = _LEFT + bar.low * scale, _LEFT + bar.high * scale
        parts.append(
            f'<path d="M{low:.1f} {y + 9}H{high:.1f}M{low:.1f} {y + 5}v8M{high:.1f} {y + 5}v8" '
            'stroke="#222" fill="none"/>'
        )
        parts.append(_text(high + 6, y + 14, number_text(bar.value)))
    return "\n".join([*parts, "</svg>\n"])


def lines(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Lines through points; both axes logarithmic, so no value may be 0 or less: such are 0.01."""
    points = [(x, max(y, 0.01)) for line in series.values() for x, y in line]
    if not points:
        points = [(1.0, 1.0)]
    x_low, x_high = _decades([x for x, _ in points])
    y_low, y_high = _decades([y for _, y in points])
    left, top, width, height = 70, 40, 560, 300

    def px(x: float) -> float:
        return left + width * (math.log10(x) - x_low) / (x_high - x_low)

    def py(y: float) -> float:
        return top + height * (1 - (math.log10(max(y, 0.01)) - y_low) / (y_high - y_low))

    parts = [_head(top + height + 50, title), _text(12, 22, title, weight="bold")]
    for exponent in range(x_low, x_high + 1):
        x = px(10.0**exponent)
        parts.append(f'<path d="M{x:.1f} {top}v{height}" stroke="#ddd"/>')
        parts.append(_text(x, top + height + 18, number_text(10.0**exponent), anchor="middle"))
    for exponent in range(y_low, y_high + 1):
        y = py(10.0**exponent)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>')
        parts.append(_text(left - 6, y + 4, number_text(10.0**exponent), anchor="end"))
    parts.append(_text(left + width / 2, top + height + 38, x_label, anchor="middle"))
    parts.append(_text(left, top - 6, y_label))
    for number, (name, line) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [
            f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"/>' for x, y in line
        ]
        y = top + 14 + 20 * number
        parts.append(
            f'<rect x="{left + width + 16}" y="{y - 9}" width="12" height="12" fill="{colour}"/>'
        )
        parts.append(_text(left + width + 34, y + 2, name))
    return "\n".join([*parts, "</svg>\n"])


def number_text(value: float) -> str:
    """Three digits that matter, thousands set apart."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _decades(found: Sequence[float]) -> tuple[int, int]:
    low = math.floor(math.log10(min(found)))
    high = math.ceil(math.log10(max(found)))
    return low, max(high, low + 1)


def _head(height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" style="{_STYLE}" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
