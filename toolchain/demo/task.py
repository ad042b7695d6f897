"""The demo's visual question task: pictures drawn here, questions about them, exact answers.

A picture is a grid of cells; a cell holds nothing, a coloured shape or a coloured digit drawn as strokes. Cells are
25 to 31 pixels wide, so the image processor has real resizing to do (one cell becomes one 28-pixel vision token).
Everything is a function of the generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 30),
    "purple": (140, 60, 180),
    "orange": (240, 125, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
ROW_RANGE = (2, 3)
COLUMN_RANGE = (2, 4)
CELL_RANGE = (25, 31)
SUPERSAMPLE = 3

# Strokes of each digit in a unit box, y down.
_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "0": [[(0.5, 0), (1, 0.25), (1, 0.75), (0.5, 1), (0, 0.75), (0, 0.25), (0.5, 0)]],
    "1": [[(0.15, 0.25), (0.5, 0), (0.5, 1)], [(0.15, 1), (0.85, 1)]],
    "2": [[(0, 0.2), (0.5, 0), (1, 0.25), (0.9, 0.5), (0, 1), (1, 1)]],
    "3": [[(0, 0), (1, 0), (0.45, 0.42), (1, 0.7), (0.5, 1), (0, 0.85)]],
    "4": [[(0.75, 1), (0.75, 0), (0, 0.65), (1, 0.65)]],
    "5": [[(1, 0), (0.1, 0), (0.05, 0.45), (0.6, 0.4), (1, 0.7), (0.5, 1), (0, 0.9)]],
    "6": [[(0.85, 0), (0.2, 0.4), (0, 0.75), (0.5, 1), (1, 0.75), (0.55, 0.5), (0.05, 0.7)]],
    "7": [[(0, 0), (1, 0), (0.35, 1)]],
    "8": [[(0.5, 0.48), (0.1, 0.22), (0.5, 0), (0.9, 0.22), (0.5, 0.48), (0, 0.76), (0.5, 1), (1, 0.76), (0.5, 0.48)]],
    "9": [[(0.95, 0.35), (0.45, 0.5), (0, 0.25), (0.5, 0), (1, 0.2), (0.85, 0.7), (0.3, 1)]],
}


@dataclass(frozen=True)
class Thing:
    """What one cell holds: a shape's name or a digit, and its colour."""

    kind: str
    color: str

    def __str__(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A grid of things. `cells[row][column]` is None where the cell is empty."""

    cells: tuple[tuple[Thing | None, ...], ...]

    @property
    def rows(self) -> int:
        return len(self.cells)

    @property
    def columns(self) -> int:
        return len(self.cells[0])

    def things(self) -> list[tuple[int, int, Thing]]:
        """Every (row, column, thing), in reading order, counted from 0."""
        return [(r, c, t) for r, row in enumerate(self.cells) for c, t in enumerate(row) if t]


def random_scene(rng: np.random.Generator, rows: int | None = None, columns: int | None = None) -> Scene:
    """A scene with few colours and kinds in it, so that counts and look-alikes are common."""
    rows = rows or int(rng.integers(ROW_RANGE[0], ROW_RANGE[1] + 1))
    columns = columns or int(rng.integers(COLUMN_RANGE[0], COLUMN_RANGE[1] + 1))
    colors = rng.choice(list(COLORS), size=int(rng.integers(2, 6)), replace=False)
    kinds = rng.choice(SHAPES + DIGITS, size=int(rng.integers(3, 10)), replace=False)
    empty = rng.uniform(0.1, 0.45)

    def cell() -> Thing | None:
        return None if rng.random() < empty else Thing(str(rng.choice(kinds)), str(rng.choice(colors)))

    grid = [[cell() for _ in range(columns)] for _ in range(rows)]
    if not any(thing for row in grid for thing in row):
        grid[0][0] = Thing(str(kinds[0]), str(colors[0]))
    return Scene(tuple(tuple(row) for row in grid))


def draw(scene: Scene, rng: np.random.Generator, cell_pixels: int | None = None) -> Image.Image:
    """The scene as an RGB picture of (columns * cell, rows * cell) pixels, with jitter, tint and noise."""
    cell = cell_pixels or int(rng.integers(CELL_RANGE[0], CELL_RANGE[1] + 1))
    size = (scene.columns * cell, scene.rows * cell)
    shade = rng.integers(0, 50) if rng.random() < 0.4 else rng.integers(195, 256)
    background = tuple(int(np.clip(shade + d, 0, 255)) for d in rng.integers(-8, 9, size=3))
    big = Image.new("RGB", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), background)
    pen = ImageDraw.Draw(big)
    step = cell * SUPERSAMPLE
    for row, column, thing in scene.things():
        radius = step * rng.uniform(0.30, 0.42)
        slack = step * 0.5 - radius
        x = column * step + step / 2 + rng.uniform(-slack, slack)
        y = row * step + step / 2 + rng.uniform(-slack, slack)
        ink = tuple(int(np.clip(v + d, 0, 255)) for v, d in zip(COLORS[thing.color], rng.integers(-14, 15, size=3)))
        _draw_thing(pen, thing.kind, x, y, radius, ink, rng)
    pixels = np.asarray(big.reduce(SUPERSAMPLE), dtype=np.float32)
    pixels = pixels + rng.normal(0, rng.uniform(0, 6), size=pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_thing(pen, kind, x, y, radius, ink, rng) -> None:
    if kind in _STROKES:
        width, height, weight = radius * 1.15, radius * 1.8, max(2, round(radius * rng.uniform(0.22, 0.34)))
        for stroke in _STROKES[kind]:
            points = [(x + (u - 0.5) * width, y + (v - 0.5) * height) for u, v in stroke]
            pen.line(points, fill=ink, width=weight, joint="curve")
        return
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        pen.ellipse(box, fill=ink)
    elif kind == "ring":
        pen.ellipse(box, outline=ink, width=max(2, round(radius * 0.36)))
    elif kind == "square":
        inset = radius * 0.12
        pen.rectangle((x - radius + inset, y - radius + inset, x + radius - inset, y + radius - inset), fill=ink)
    elif kind == "triangle":
        pen.polygon([(x, y - radius), (x + radius, y + radius * 0.8), (x - radius, y + radius * 0.8)], fill=ink)
    elif kind == "cross":
        arm = radius * 0.34
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=ink)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=ink)
    elif kind == "star":
        spokes = [(radius if i % 2 == 0 else radius * 0.42, math.pi * (i / 5 - 0.5)) for i in range(10)]
        pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in spokes], fill=ink)
    else:
        raise ValueError(f"no drawing for kind {kind!r}; known: {SHAPES + DIGITS}")


# ---------------------------------------------------------------------------------------------------------- questions

Asker = Callable[[Scene, np.random.Generator], "tuple[str, str] | None"]


def _name(thing: Thing | None) -> str:
    return str(thing) if thing else "nothing"


def _pick(items: list, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))] if items else None


def _unique(scene: Scene, key: Callable[[Thing], object]) -> list[tuple[int, int, Thing]]:
    things = scene.things()
    seen = [key(t) for _, _, t in things]
    return [item for item, k in zip(things, seen) if seen.count(k) == 1]


def _plural(kind: str) -> str:
    return {"cross": "crosses"}.get(kind, kind + "s")


def read_all(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """The whole picture in reading order: the dense supervision of the first training phase."""
    return "Read the picture.", " / ".join(", ".join(_name(t) for t in row) for row in scene.cells)


def read_row(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    row = int(rng.integers(scene.rows))
    return f"Read row {row + 1}.", ", ".join(_name(t) for t in scene.cells[row])


def read_cell(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    row, column = int(rng.integers(scene.rows)), int(rng.integers(scene.columns))
    return f"What is in row {row + 1}, column {column + 1}?", _name(scene.cells[row][column])


def color_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = _pick(_unique(scene, lambda t: t.kind), rng)
    return found and (f"What color is the {found[2].kind}?", found[2].color)


def kind_of(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = _pick(_unique(scene, lambda t: t.color), rng)
    return found and (f"What is the {found[2].color} thing?", found[2].kind)


def where(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    found = _pick(_unique(scene, lambda t: t), rng)
    return found and (f"Where is the {found[2]}?", f"row {found[0] + 1}, column {found[1] + 1}")


def exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Yes or no, evenly; a 'no' prefers a pair whose colour and kind are both in the picture."""
    present = {t for _, _, t in scene.things()}
    if rng.random() < 0.5:
        thing, answer = _pick(sorted(present, key=str), rng), "yes"
    else:
        near = [Thing(k, c) for k in sorted({t.kind for t in present}) for c in sorted({t.color for t in present})]
        near = [t for t in near if t not in present]
        far = [t for t in (Thing(k, c) for k in SHAPES + DIGITS for c in COLORS) if t not in present]
        thing, answer = _pick(near if near and rng.random() < 0.8 else far, rng), "no"
    article = "an" if thing.color[0] in "aeiou" else "a"
    return f"Is there {article} {thing}?", answer


def count_color(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    colors = [t.color for _, _, t in scene.things()]
    color = _pick(sorted(set(colors)), rng) if rng.random() < 0.85 else _pick(list(COLORS), rng)
    return f"How many {color} things are there?", str(colors.count(color))


def count_kind(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kinds = [t.kind for _, _, t in scene.things()]
    kind = _pick(sorted(set(kinds)), rng) if rng.random() < 0.85 else _pick(list(SHAPES + DIGITS), rng)
    return f"How many {_plural(kind)} are there?", str(kinds.count(kind))


def beside(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    row_step, column_step, words = _pick(
        [(0, -1, "left of"), (0, 1, "right of"), (-1, 0, "above"), (1, 0, "below")], rng
    )
    inside = [
        (r + row_step, c + column_step, t)
        for r, c, t in _unique(scene, lambda t: t)
        if 0 <= r + row_step < scene.rows and 0 <= c + column_step < scene.columns
    ]
    found = _pick(inside, rng)
    return found and (f"What is {words} the {found[2]}?", _name(scene.cells[found[0]][found[1]]))


QUESTIONS: dict[str, Asker] = {
    "read_row": read_row,
    "cell": read_cell,
    "color": color_of,
    "kind": kind_of,
    "where": where,
    "exists": exists,
    "count_color": count_color,
    "count_kind": count_kind,
    "beside": beside,
}


def ask(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> tuple[str, str, str]:
    """(kind, question, answer). A kind that this scene cannot carry is drawn again, unless it was asked for."""
    if kind is not None:
        asked = QUESTIONS[kind](scene, rng)
        if asked is None:
            raise ValueError(f"the scene has no unambiguous question of kind {kind!r}")
        return kind, *asked
    while True:
        name = _pick(list(QUESTIONS), rng)
        asked = QUESTIONS[name](scene, rng)
        if asked is not None:
            return name, *asked
