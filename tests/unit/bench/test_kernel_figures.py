"""Figures from seconds that are made up: medians, bytes, shares, and tables that say what they hold."""

from __future__ import annotations

import pytest

from toolchain.bench.kernel_figures import (
    COLUMNS,
    DECODER_COLUMNS,
    Roof,
    Spread,
    copies_for,
    decoder_cells,
    decoder_row,
    index_bytes_per_sm_clock,
    packed_bytes,
    row,
    spread,
    table_cells,
)
from toolchain.errors import UsageError
from toolchain.values import CODES

ROOF = Roof(read_bytes_per_s=4e12, multiprocessors=100, clock_hz=1.5e9)


def test_the_first_rounds_are_dropped_and_the_middle_is_kept():
    assert spread([9.0, 8.0, 1.0, 2.0, 3.0, 10.0, 2.0], 2) == Spread(2.0, 1.0)
    assert spread([5.0], 0) == Spread(5.0, 0.0)
    with pytest.raises(UsageError, match="expected more than the 2 that are dropped, found 2"):
        spread([1.0, 2.0], 2)


def test_packed_bytes_by_hand():
    # 256 x 32 at 2 bits: 2048 bytes of codes, 512 of scales, 1024 of table; 200 x 20 is padded to the same codes.
    assert packed_bytes(CODES["2,4,8"], 256, 32) == 2048 + 512 + 1024
    assert packed_bytes(CODES["2,4,8"], 200, 20) == 2048 + 400 + 1024


@pytest.mark.parametrize(("size", "l2", "copies"), [(100, 50, 2), (100, 51, 3), (1, 10, 40), (10**9, 10, 2)])
def test_copies_are_four_times_the_cache(size, l2, copies):
    assert copies_for(size, l2) == copies
    assert copies * size >= 4 * l2


def test_a_row_by_hand():
    code, shape = CODES["2,4,8"], (12800, 16000)
    found = row("7b o", shape, code, 1, Spread(20e-6, 1e-7), Spread(100e-6, 2e-7), ROOF)
    codes = 12800 * 16000 // 4
    assert found["packed_bytes"] == codes + 2 * 12800 + 1024
    assert found["speedup"] == pytest.approx(5)
    assert found["packed_bytes_per_s"] == pytest.approx((codes + 26624) / 20e-6)
    assert found["roof_share"] == pytest.approx((codes + 26624) / 80e6)
    assert found["index_bytes_per_sm_clock"] == pytest.approx(codes / (20e-6 * 1.5e9 * 100))
    cells = table_cells(found)
    assert list(cells) == COLUMNS
    assert (cells["us"], cells["+-"], cells["fp16 us"], cells["x fp16"]) == ("20.0", "0.1", "100.0", "5.00")
    assert (cells["GB/s"], cells["of roof"], cells["B/SM-clock"]) == ("2561", "64%", "17.1")


def test_an_unknown_clock_is_not_a_figure():
    dark = Roof(4e12, 100, None)
    assert index_bytes_per_sm_clock(1000, 1e-6, dark) is None
    found = row("x", (128, 16), CODES["4,8,8"], 1, Spread(1e-6, 0), Spread(1e-6, 0), dark)
    assert table_cells(found)["B/SM-clock"] == "-"


def test_tokens_a_second_are_one_over_a_step():
    found = decoder_row("7b", CODES["2,4,8"], 1024, Spread(0.002, 1e-5), Spread(0.008, 1e-5))
    assert found["tokens_per_s"] == pytest.approx(500)
    assert found["speedup"] == pytest.approx(4)
    cells = decoder_cells(found)
    assert list(cells) == DECODER_COLUMNS
    assert (cells["tokens/s"], cells["fp16 tokens/s"], cells["x fp16"]) == ("500.0", "125.0", "4.00")
