"""Shapes to time: they are what the families and the published configs say, and limits keep whole groups."""

from __future__ import annotations

import json
from pathlib import Path

import published_models
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolchain.demo
from toolchain.bench.shapes import PUBLISHED, GroupShape, chosen_groups, decoder_shape
from toolchain.errors import UnsupportedError, UsageError


def test_a_blocks_groups_of_a_published_model():
    shape = decoder_shape("qwen2-vl-7b")
    assert shape.blocks == 28
    assert shape.groups == (
        GroupShape("qkv", (3584, 512, 512), 3584),
        GroupShape("o", (3584,), 3584),
        GroupShape("gate_up", (18944, 18944), 3584),
        GroupShape("down", (3584,), 18944),
    )


def test_blocks_hold_the_decoders_weights():
    shape = decoder_shape("qwen2-vl-2b")
    assert (
        shape.blocks * sum(group.weights for group in shape.groups) == published_models.qwen2_vl_2b().language_weights
    )


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2-vl-2b", published_models.QWEN2_VL_2B),
        (
            "demo",
            json.loads((Path(toolchain.demo.__file__).parent / "model" / "config.json").read_text())["text_config"],
        ),
    ],
)
def test_sizes_are_the_configs(name, config):
    assert PUBLISHED[name] == {key: config[key] for key in PUBLISHED[name]}


def test_an_unknown_model_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"one of demo, .*internvl2-8b, did you mean qwen2-vl-7b\?"):
        decoder_shape("qwen2-vl-7")


def test_groups_are_chosen_in_the_blocks_order():
    shape = decoder_shape("demo")
    assert [group.name for group in chosen_groups(shape, ("o", "qkv"))] == ["qkv", "o"]
    assert chosen_groups(shape, None) == shape.groups


@pytest.mark.parametrize("names", [(), ("qkv", "kv")])
def test_groups_that_are_not_there(names):
    with pytest.raises(UsageError, match="expected some of qkv,o,gate_up,down"):
        chosen_groups(decoder_shape("demo"), names)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=3),
    st.integers(1, 5000),
    st.floats(1e-3, 1),
    st.floats(1e-3, 1),
)
def test_limits_keep_whole_groups_and_never_grow(rows, columns, rows_share, columns_share):
    group = GroupShape("any", tuple(rows), columns)
    cut = group.limited(rows_share, columns_share)
    for before, after in zip((*rows, columns), (*cut.rows, cut.columns), strict=True):
        assert 1 <= after <= before
    assert all(after % 128 == 0 or after == before for before, after in zip(rows, cut.rows, strict=True))
    assert cut.columns % 16 == 0 or cut.columns == columns
    assert group.limited(1, 1) == group
