"""Which lengths a device calls the decoder with."""

from __future__ import annotations

import pytest

from toolchain.device.generation.answer import CachePlan
from toolchain.errors import UsageError
from toolchain.models.family import decoder_lengths, limited_settings


def test_the_smallest_bucket_that_holds_what_is_filled():
    plan = CachePlan((256, 512, 1000))
    assert [plan.past_length(n) for n in (0, 1, 256, 257, 1000)] == [256, 256, 256, 512, 1000]


def test_without_buckets_the_length_is_exact():
    assert [CachePlan().past_length(n) for n in (0, 17)] == [0, 17]


def test_more_than_the_longest_bucket_is_refused():
    with pytest.raises(UsageError, match="1001 tokens of context exceed the longest the engines are built for, 1000"):
        CachePlan((256, 1000)).past_length(1001)


def test_settings_of_an_older_bundle_give_exact_lengths():
    assert CachePlan.from_settings({"max_context": 4096}) == CachePlan()
    assert CachePlan.from_settings({"past_buckets": [256], "prefill_chunk": 64}) == CachePlan((256,), 64)


@pytest.mark.parametrize(
    ("context", "expected"), [(4096, [256, 512, 1024, 2048, 4096]), (1000, [256, 512, 1000]), (100, [100])]
)
def test_buckets_double_up_to_the_context(context, expected):
    lengths = decoder_lengths(context)
    assert lengths["past_buckets"] == expected
    assert lengths["prefill_chunk"] == min(context, 1024)


def test_a_context_beyond_what_engines_are_built_for_has_buckets_up_to_that():
    assert decoder_lengths(131_072) == {
        "max_context": 131_072,
        "past_buckets": [256, 512, 1024, 2048, 4096],
        "prefill_chunk": 1024,
    }


def test_a_targets_limits_make_images_and_contexts_smaller_and_never_larger():
    decoder = {"hidden": 64} | decoder_lengths(4096)
    settings = {"family": "x", "image": {"min_pixels": 100, "max_pixels": 5000, "patch": 14}, "decoder": decoder}
    small = limited_settings(settings, max_pixels=700, context=300)
    assert small["image"] == {"min_pixels": 100, "max_pixels": 700, "patch": 14}
    assert small["decoder"] == {"hidden": 64, "max_context": 300, "past_buckets": [256, 300], "prefill_chunk": 300}
    assert limited_settings(settings, max_pixels=10**9, context=10**9) == settings
    assert limited_settings(settings, max_pixels=1, context=300)["image"]["max_pixels"] == 100
    tiles = {"image": {"tile": 448, "max_tiles": 12}, "decoder": decoder}
    assert limited_settings(tiles, max_pixels=1, context=4096) == tiles
