"""KL divergence against real bits as one SVG picture that needs no script, no font and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 30, 55
# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
TEXT = 'font-family="system-ui, sans-serif" font-size="12"'


def plot_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG text: a point with its interval for every quantized row of `compare.compare_methods`, a line a method.

    The vertical axis is logarithmic. A row whose divergence is zero, full precision among them, has no place on it.
    """
    shown = [row for row in rows if row["kl"] > 0]
    if not shown:
        return _svg([_text(WIDTH / 2, HEIGHT / 2, "no row has a divergence above zero", "middle")])
    lowest = min(_low(row) for row in shown)
    decades = (math.floor(math.log10(lowest)), math.ceil(math.log10(max(row["kl_high"] for row in shown))))
    decades = (decades[0], max(decades[1], decades[0] + 1))
    bits = [row["bits"] for row in shown]
    start, stop = math.floor(4 * min(bits) - 0.4) / 4, math.ceil(4 * max(bits) + 0.4) / 4

    def across(value: float) -> float:
        return LEFT + (value - start) / (stop - start) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        share = (math.log10(value) - decades[0]) / (decades[1] - decades[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = _axes(decades, (start, stop), across, down)
    for number, method in enumerate(dict.fromkeys(row["method"] for row in shown)):
        colour = COLOURS[number % len(COLOURS)]
        points = sorted((row for row in shown if row["method"] == method), key=lambda row: row["bits"])
        path = " ".join(f"{across(row['bits']):.1f},{down(row['kl']):.1f}" for row in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for row in points:
            x = across(row["bits"])
            parts.append(_line(x, down(_low(row)), x, down(row["kl_high"]), colour))
            parts.append(f'<circle cx="{x:.1f}" cy="{down(row["kl"]):.1f}" r="4" fill="{colour}"/>')
        y = TOP + 18 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 25}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 37, y + 4, method))
    return _svg(parts)


def _low(row: Mapping[str, Any]) -> float:
    """The interval's lower end; an end at or below zero is drawn a decade below the point."""
    return row["kl_low"] if row["kl_low"] > 0 else row["kl"] / 10


def _axes(decades: tuple[int, int], bits: tuple[float, float], across, down) -> list[str]:
    parts = []
    for exponent in range(decades[0], decades[1] + 1):
        y = down(10.0**exponent)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"), _text(LEFT - 8, y + 4, f"{10.0**exponent:g}", "end")]
    step = 0.25 if bits[1] - bits[0] <= 2 else 0.5
    for count in range(round((bits[1] - bits[0]) / step) + 1):
        x = across(bits[0] + step * count)
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{bits[0] + step * count:g}", "middle"))
        parts.append(_line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 4, "#888"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#888"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "real bits a weight, whole model", "middle"))
    parts.append(_text(LEFT - 55, TOP - 12, "KL to full precision, nats per answer token (95 % over pictures)"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333" {TEXT}>{escape(text)}</text>'


def _svg(parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>", ""])
