"""Formats of layers in K-segments: their text, what they are stored as, and what is no format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import UnsupportedError
from toolchain.values import CODE_NAMES, BitPlan, LayerPlan, VQCode, format_text, parse_format

codes = st.sampled_from(CODE_NAMES)
LAYER = LayerPlan("m.down", "language", "linear", 300, 400, "m.down", "2,6,8@64+2,4,8@128+2,3,8", "t7")


@given(st.lists(codes, min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 500))
def test_a_format_comes_back_from_its_text(names, steps, left):
    segments = [(64 * steps, name) for name in names[:-1]] + [(left, names[-1])]
    found = parse_format(format_text(segments), sum(width for width, _ in segments))
    assert [(one.columns, str(one.code)) for one in found] == segments
    assert [one.first for one in found] == [64 * steps * place for place in range(len(names))]


def test_one_code_is_one_segment():
    assert [(s.first, s.columns, s.code) for s in parse_format("4,8,9", 50)] == [(0, 50, VQCode(4, 8, 9))]


@pytest.mark.parametrize(
    "text",
    ["2,4,8@64", "2,4,8@60+2,4,8", "2,4,8@0+2,4,8", "2,4,8@-64+2,4,8", "2,4,8+2,4,8", "2,4,8@128+2,4,8",
     "2,4,8@64+2,4,8@64+2,4,8", "2,4,8@64+2,4,8@64+2,4,8@64+2,4,8", "@64+2,4,8", "2,4,8@64+", "2,4@64+2,4,8", ""],
)  # fmt: skip
def test_what_is_no_format_of_128_columns_is_refused(text):
    with pytest.raises(UnsupportedError, match=r"expected (a code V,k,L|three integers V,k,L)"):
        parse_format(text, 128)


def test_a_layer_in_segments_is_stored_as_its_pieces():
    names = ["m.down.segments.0", "m.down.segments.1", "m.down.segments.2"]
    assert [(p.name, p.columns, p.code, p.table) for p in LAYER.pieces] == [
        (names[0], 64, "2,6,8", "t7_0"),
        (names[1], 128, "2,4,8", "t7_1"),
        (names[2], 208, "2,3,8", "t7_2"),
    ]
    assert LAYER.index_bits == pytest.approx((64 * 3 + 128 * 2 + 208 * 1.5) / 400)
    assert LAYER.codes_bytes == 384 * (64 * 3 + 128 * 2 + 208 * 1.5) / 8
    assert LAYER.scales_bytes == 3 * 2 * 300


def test_a_layer_in_one_code_is_its_own_piece():
    one = LayerPlan("m.up", "language", "linear", 300, 400, "m.up", "2,4,8", "t1")
    assert one.segments == ()
    assert one.pieces == (one,)


def test_a_plan_finds_layers_and_segments_and_all_their_tables():
    plan = BitPlan((LAYER,))
    assert plan.layer("m.down") is LAYER
    assert plan.layer("m.down.segments.1").table == "t7_1"
    assert plan.codebooks() == {"t7_0": VQCode(2, 6, 8), "t7_1": VQCode(2, 4, 8), "t7_2": VQCode(2, 3, 8)}
    assert plan.index_bits() == pytest.approx(LAYER.index_bits)
    assert BitPlan.from_json(plan.to_json()) == plan


def test_who_asks_a_segmented_layer_for_its_one_code_is_refused():
    with pytest.raises(UnsupportedError, match="expected three integers V,k,L"):
        assert LAYER.vq_code
