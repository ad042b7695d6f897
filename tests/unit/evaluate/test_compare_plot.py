"""The image of a comparison: every method is in it, lower is better, and no two names touch."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.evaluate.compare_plot import LABEL_GAP, plot_rows, spread

PARTS = ["overlap", "mix", "interleave", "fisher", "drift", "descent", "rounds", "bias"]
METHODS = ["rtn", "gptq", "gptq-rotated", "gptvq", "vptq", "nearest", "mgvq", *(f"mgvq-{part}" for part in PARTS)]


def row(method, bits, kl):
    return {"method": method, "bits": bits, "kl": kl, "kl_low": 0.8 * kl, "kl_high": 1.25 * kl}


def grid(methods, averages=(2.2, 2.7, 3.2)):
    """Rows whose divergences nearly coincide for all of ours."""
    rows = [row("fp", 16, 0.0)]
    for bits in averages:
        rows += [
            row(name, bits, (0.5 if i < 6 else 0.05 + 0.0001 * i) * 0.1 ** (bits - 2)) for i, name in enumerate(methods)
        ]
    return rows


def elements(svg, name):
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}" + name)]


def labels(svg, methods):
    """Name → baseline of its text."""
    return {e.text: float(e.get("y")) for e in elements(svg, "text") if e.text in methods}


def test_every_method_is_a_line_with_all_its_averages():
    svg = plot_rows(grid(METHODS))
    assert [len(e.get("points").split()) for e in elements(svg, "polyline")] == [3] * len(METHODS)
    assert len(elements(svg, "circle")) == 3 * len(METHODS)
    assert list(labels(svg, METHODS)) == METHODS
    assert "fp" not in labels(svg, ["fp"])


@pytest.mark.parametrize("count", [1, 7, len(METHODS), 40])
def test_no_two_names_touch_and_all_are_inside(count):
    methods = [*METHODS, *(f"m{i}" for i in range(40))][:count]
    svg = plot_rows(grid(methods))
    heights = sorted(labels(svg, methods).values())
    assert all(b - a >= LABEL_GAP - 0.2 for a, b in pairwise(heights))
    assert heights[0] > 0
    assert heights[-1] < float(ElementTree.fromstring(svg).get("height"))


def test_lines_look_different():
    lines = elements(plot_rows(grid(METHODS)), "polyline")
    assert len({(e.get("stroke"), e.get("stroke-dasharray")) for e in lines}) == len(METHODS)


def test_points_at_the_same_bits_do_not_hide_one_another():
    dodged = plot_rows(grid(METHODS, averages=(2.2,)))
    assert "drawn apart" in dodged
    assert "drawn apart" not in plot_rows([row("a", 2.0, 0.1), row("b", 3.0, 0.1)])
    circles = elements(dodged, "circle")
    places = sorted(float(e.get("cx")) for e in circles)
    assert all(b - a >= 4 for a, b in pairwise(places))
    alone = elements(plot_rows([row("a", 2.0, 0.1), row("b", 3.0, 0.1)]), "circle")
    centre = elements(plot_rows([row("a", 2.0, 0.1), row("a", 3.0, 0.1)]), "circle")
    assert [e.get("cx") for e in alone] == [e.get("cx") for e in centre]


def test_lower_divergence_is_lower_and_names_are_escaped():
    rows = [row("<a>", 2.2, 0.5) | {"kl_low": 0.0}, row("b", 2.2, 0.01)]
    svg = plot_rows(rows)
    heights = [float(e.get("cy")) for e in elements(svg, "circle")]
    assert heights[0] < heights[1]
    assert labels(svg, ["<a>", "b"])["<a>"] < labels(svg, ["b"])["b"]
    assert "&lt;a&gt;" in svg


def test_intervals_stay_inside():
    svg = plot_rows(grid(METHODS))
    bottom = float(ElementTree.fromstring(svg).get("height"))
    for line in elements(svg, "line"):
        assert all(0 <= float(line.get(end)) <= bottom for end in ("y1", "y2"))


def test_a_plot_of_nothing_says_so():
    svg = plot_rows([row("fp", 16, 0.0)])
    assert "no row has a divergence" in svg
    assert elements(svg, "polyline") == []


def test_spread_by_hand():
    assert spread([50, 10], 15, 0, 100) == [50, 10]
    assert spread([10, 12, 11], 15, 0, 100) == [10, 40, 25]
    assert spread([99, 98], 15, 0, 100) == [100, 85]


@given(st.lists(st.floats(0, 600), max_size=40))
def test_spread_keeps_order_gap_and_bounds(wanted):
    found = spread(wanted, 15, 0, 600)
    assert all(-1e-9 <= place <= 600 for place in found)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(found[b] - found[a] >= 15 - 1e-9 for a, b in pairwise(order))
