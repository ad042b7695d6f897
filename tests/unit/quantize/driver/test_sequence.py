"""Groups of layers taken a stretch at a time."""

from __future__ import annotations

import pytest

from toolchain.quantize.driver.sequence import stretches
from toolchain.values import LayerSpec


def specs(*groups):
    return [LayerSpec(f"{g}.{i}", "language", "linear", 8, 8, g, 0) for g, count in groups for i in range(count)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [["a"], ["b"], ["c"]]), (3, [["a"], ["b", "c"]]), (4, [["a", "b"], ["c"]]), (6, [["a", "b", "c"]])],
)
def test_whole_groups_as_many_as_fit_and_one_at_least(most, expected):
    """Groups of 3, 1 and 2 layers, a byte a layer."""
    own = specs(("a", 3), ("b", 1), ("c", 2))
    found = list(stretches(own, most, len))
    assert [list(dict.fromkeys(spec.group for spec in stretch)) for stretch in found] == expected
    assert [spec for stretch in found for spec in stretch] == own


def test_no_layers_no_stretch():
    assert list(stretches([], 10, len)) == []
