"""Groups of layers taken a layer batch at a time."""

from __future__ import annotations

import pytest

from toolchain.quantize.driver.sequence import layer_batches
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
    found = list(layer_batches(own, most, len))
    assert [list(dict.fromkeys(spec.group for spec in layer_batch)) for layer_batch in found] == expected
    assert [spec for layer_batch in found for spec in layer_batch] == own


def test_no_layers_no_batch():
    assert list(layer_batches([], 10, len)) == []
