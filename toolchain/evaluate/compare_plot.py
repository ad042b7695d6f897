"""KL divergence against real bits as one SVG image that needs no script, no font and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, LEAST_HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 34, 55
LABEL_GAP = 15  # of two labels one above the other, so that 12-point text does not touch
DODGE, WIDEST_DODGE = 8.0, 80.0  # between methods at equal bits, and of all of them together, in pixels
# Okabe and Ito's colours, told apart with any colour vision; with as many dashes there are 28 looks.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("", "6 3", "2 3", "9 3 2 3")
TEXT = 'font-family="system-ui, sans-serif" font-size="12"'

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Scale:
    """Where values stand in the image: real bits rightwards, the divergence's logarithm upwards."""

    bits: tuple[float, float]
    kl: tuple[float, float]
    height: float

    @property
    def floor(self) -> float:
        return self.height - BOTTOM

    def across(self, value: float) -> float:
        return LEFT + (value - self.bits[0]) / (self.bits[1] - self.bits[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        share = math.log(value / self.kl[0]) / math.log(self.kl[1] / self.kl[0])
        return self.floor - share * (self.floor - TOP)


def plot_rows(rows: Sequence[Row]) -> str:
    """SVG text: a point with its interval for every quantized row of `compare.compare_methods`, a line a method.

    The vertical axis is logarithmic. A row whose divergence is zero, full precision among them, has no place on it.
    Every line's name stands beside its last point, moved up or down until no two names touch, with a thin line to it.
    Points at the same bits would hide one another: they are drawn a few pixels apart, in the order of the methods.
    """
    shown = [row for row in rows if row["kl"] > 0]
    if not shown:
        return _svg([_text(WIDTH / 2, LEAST_HEIGHT / 2, "no row has a divergence above zero", "middle")], LEAST_HEIGHT)
    methods = list(dict.fromkeys(row["method"] for row in shown))
    scale = _scale_of(shown, len(methods))
    shift = _dodges(shown, methods)
    parts, ends = _axes(scale, any(shift.values())), []
    for number, method in enumerate(methods):
        points = sorted((row for row in shown if row["method"] == method), key=lambda row: row["bits"])
        places = [(scale.across(row["bits"]) + shift[method], scale.down(row["kl"])) for row in points]
        parts += _series(points, places, scale, COLOURS[number % len(COLOURS)], _dash(number))
        ends.append(places[-1])
    return _svg(parts + _labels(methods, ends, scale), scale.height)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of `wanted`, each near its own, at least `gap` apart and within low … high where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    least = low
    for i in order:
        places[i] = max(wanted[i], least)
        least = places[i] + gap
    most = high
    for i in reversed(order):
        places[i] = min(places[i], most)
        most = places[i] - gap
    return places


def _scale_of(shown: Sequence[Row], labels: int) -> _Scale:
    bits = [row["bits"] for row in shown]
    start, stop = math.floor(4 * min(bits) - 0.4) / 4, math.ceil(4 * max(bits) + 0.4) / 4
    kl = (_step_below(min(_low(row) for row in shown)), _step_above(max(row["kl_high"] for row in shown)))
    return _Scale((start, stop), kl, max(LEAST_HEIGHT, TOP + BOTTOM + LABEL_GAP * labels))


def _step_below(value: float) -> float:
    """The largest of …, 0.1, 0.2, 0.5, 1, … below `value`."""
    decade = 10.0 ** math.floor(math.log10(value))
    return max(step * decade for step in (0.5, 1, 2, 5) if step * decade < value * (1 - 1e-9))


def _step_above(value: float) -> float:
    """The smallest of …, 0.1, 0.2, 0.5, 1, … above `value`."""
    decade = 10.0 ** math.floor(math.log10(value))
    return min(step * decade for step in (1, 2, 5, 10, 20) if step * decade > value * (1 + 1e-9))


def _low(row: Row) -> float:
    """The interval's lower end; an end at or below zero is drawn a decade below the point."""
    return row["kl_low"] if row["kl_low"] > 0 else row["kl"] / 10


def _dash(number: int) -> str:
    pattern = DASHES[number // len(COLOURS) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _dodges(shown: Sequence[Row], methods: Sequence[str]) -> dict[str, float]:
    """Method → pixels to the right; none where no two methods are close enough in bits to hide one another."""
    close = any(
        abs(one["bits"] - other["bits"]) < 0.05 and one["method"] != other["method"] for one in shown for other in shown
    )
    step = min(DODGE, WIDEST_DODGE / len(methods)) if close else 0.0
    return {method: step * (number - (len(methods) - 1) / 2) for number, method in enumerate(methods)}


def _series(
    points: Sequence[Row], places: Sequence[tuple[float, float]], scale: _Scale, colour: str, dash: str
) -> list[str]:
    """One method: its line, its intervals, its points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>']
    for row, (x, y) in zip(points, places):
        parts.append(_line(x, scale.down(_low(row)), x, scale.down(row["kl_high"]), colour))
        interval = f"KL {row['kl']:.4f} ({row['kl_low']:.4f} – {row['kl_high']:.4f})"
        title = f"<title>{escape(row['method'])}: {row['bits']:.3f} bits, {interval}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{title}</circle>')
    return parts


def _labels(methods: Sequence[str], ends: Sequence[tuple[float, float]], scale: _Scale) -> list[str]:
    """A name for every line, right of the image, joined to the line's last point."""
    column = WIDTH - RIGHT + 34
    parts = []
    for number, (method, (x, y), place) in enumerate(
        zip(methods, ends, spread([y for _, y in ends], LABEL_GAP, TOP, scale.floor))
    ):
        colour = COLOURS[number % len(COLOURS)]
        leader = f"{x + 5:.1f},{y:.1f} {column - 26:.1f},{place:.1f}"
        parts.append(f'<path d="M {leader}" fill="none" stroke="{colour}" stroke-opacity="0.35"/>')
        parts.append(
            f'<path d="M {column - 26:.1f},{place:.1f} {column - 4:.1f},{place:.1f}" stroke="{colour}" '
            f'stroke-width="1.5"{_dash(number)}/>'
        )
        parts.append(_text(column, place + 4, method))
    return parts


def _axes(scale: _Scale, is_dodged: bool) -> list[str]:
    parts = []
    for value in _ticks(*scale.kl):
        y = scale.down(value)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"), _text(LEFT - 8, y + 4, f"{value:g}", "end")]
    first, last = scale.bits
    step = 0.25 if last - first <= 2 else 0.5
    for count in range(round((last - first) / step) + 1):
        x = scale.across(first + step * count)
        parts.append(_text(x, scale.floor + 18, f"{first + step * count:g}", "middle"))
        parts.append(_line(x, scale.floor, x, scale.floor + 4, "#888"))
    parts.append(_line(LEFT, scale.floor, WIDTH - RIGHT, scale.floor, "#888"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    note = "; points at nearly equal bits are drawn apart" if is_dodged else ""
    parts.append(_text(middle, scale.height - 12, f"real bits a weight, whole model{note}", "middle"))
    parts.append(_text(LEFT - 55, TOP - 14, "KL to full precision, nats per answer token (95 % over images)"))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade in low … high; whole decades alone where there are more than three."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) <= 3 else (1,)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333" {TEXT}>{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>', *parts, "</svg>", ""])
