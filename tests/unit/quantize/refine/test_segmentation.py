"""Candidate segmentations: against a search through all, on cases by hand, and none where mixing does not pay."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR
from toolchain.quantize.refine.segmentation import (
    LEAST_GAIN,
    energy_spread,
    segment_units,
    segmented_losses,
    unit_widths,
)
from toolchain.values import CODES, VQCode, parse_format

LADDER = ("2,3,8", "2,4,8", "2,6,8", "2,8,9")


def bits_of(text: str, columns: int) -> float:
    return sum(s.columns * s.code.index_bits for s in parse_format(text, columns)) / columns


def loss_of(text: str, columns: int, units: list[float]) -> float:
    return sum(GAUSSIAN_ERROR[str(code)] * units[unit] for code, own in segment_units(text, columns) for unit in own)


def offered(columns: int, units: list[float], interleaved: float = 1.0) -> dict[str, float]:
    """Losses of units in proportion to the codes' errors; a single code's is `interleaved` of their sum."""
    single = {code: interleaved * GAUSSIAN_ERROR[code] * sum(units) for code in LADDER}
    return segmented_losses(columns, LADDER, lambda code, unit: GAUSSIAN_ERROR[code] * units[unit], single)


@pytest.mark.parametrize(
    ("columns", "widths"),
    [(384, [64] * 6), (100, [64, 36]), (64, [64]), (18_944, [256] * 74), (2_048, [256] * 8), (2_100, [256] * 8 + [52])],
)
def test_units_are_64_columns_or_256_where_the_layer_is_wide(columns, widths):
    assert unit_widths(columns) == widths


def test_spread_by_hand():
    assert energy_spread([32.0] * 64 + [4.0] * 64 + [2.0] * 64) == 16.0
    assert energy_spread([1.0] * 64) == 1.0
    assert energy_spread([1.0] * 64 + [0.0] * 64) == float("inf")


def test_units_of_segments_by_hand():
    found = segment_units("2,6,8@128+2,4,8@64+2,3,8", 300)
    assert found == [(VQCode(2, 6, 8), range(0, 2)), (VQCode(2, 4, 8), range(2, 3)), (VQCode(2, 3, 8), range(3, 5))]


def test_even_columns_are_not_cut():
    """Equal units lie on the line between single codes or above it; a hull that bends offers nothing."""
    assert offered(384, [1.0] * 6) == {}


def test_uneven_columns_are():
    found = offered(384, [100.0, 20.0, 5.0, 2.0, 1.0, 0.5])
    assert found
    for text, loss in found.items():
        rates = [segment.code.index_bits for segment in parse_format(text, 384)]
        assert rates == sorted(rates, reverse=True)
        assert len(set(rates)) == len(rates)
        assert loss == pytest.approx(loss_of(text, 384, [100.0, 20.0, 5.0, 2.0, 1.0, 0.5]))


def test_what_dealing_gains_is_not_paid_again():
    """Where one interleaved code has already what cutting would give, nothing is offered."""
    units = [100.0, 20.0, 5.0, 2.0, 1.0, 0.5]
    assert offered(384, units, interleaved=0.2) == {}


losses = st.lists(st.floats(0.01, 100.0), min_size=3, max_size=5)


@settings(max_examples=40, deadline=None)
@given(losses)
def test_no_segmentation_at_the_same_bits_loses_less(values):
    """Against every cut into two or three segments, in every order of rates that falls."""
    units = sorted(values, reverse=True)
    columns = 64 * len(units)
    found = offered(columns, units)
    for count in (2, 3):
        for codes in itertools.combinations(reversed(LADDER), count):
            for ends in itertools.combinations(range(1, len(units)), count - 1):
                widths = [64 * (b - a) for a, b in zip((0, *ends), ends)]
                text = "+".join([*(f"{c}@{w}" for c, w in zip(codes, widths)), codes[-1]])
                bits, loss = bits_of(text, columns), loss_of(text, columns, units)
                assert all(
                    loss >= one * (1 - 1e-9) or bits > bits_of(other, columns) - 1e-9 for other, one in found.items()
                )


@settings(max_examples=40, deadline=None)
@given(losses)
def test_everything_offered_gains_on_single_codes(values):
    units = sorted(values, reverse=True)
    columns = 64 * len(units)
    single = {CODES[code].index_bits: GAUSSIAN_ERROR[code] * sum(units) for code in LADDER}
    for text, loss in offered(columns, units).items():
        bits = bits_of(text, columns)
        below, above = (max(b for b in single if b <= bits), min(b for b in single if b >= bits))
        share = (bits - below) / (above - below) if above > below else 0.0
        line = single[below] + share * (single[above] - single[below])
        assert loss <= (1 - LEAST_GAIN) * line * (1 + 1e-9)
