"""Attention written out: the library's numbers, over pieces of keys that are never joined."""

from __future__ import annotations

import pytest
import torch

from toolchain.models.wrappers import attention, causal_mask, image_rank, written_out_attention


def random_attention(heads: int, kv_heads: int, new: int = 5, past: int = 7):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, new, 8, generator=generator)
    keys, values = (torch.randn(2, kv_heads, past + new, 8, generator=generator) for _ in range(2))
    return query, keys, values


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_pieces_give_what_the_library_gives_on_the_whole(heads, kv_heads):
    query, keys, values = random_attention(heads, kv_heads)
    mask = causal_mask(torch.ones(2, 12, dtype=torch.int64), 5, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=0.3, enable_gqa=True)
    cut = [(x[:, :, :7], x[:, :, 7:]) for x in (keys, values)]
    for pieces in (cut, [(keys,), (values,)]):
        found = attention(query, *pieces, mask, 0.3)
        torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


def test_places_behind_the_mask_have_no_effect():
    """A bucket's unfilled tail: whatever it holds, no output bit changes."""
    query, keys, values = random_attention(4, 2)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[:, 4:7] = 0
    additive = causal_mask(mask, 5, torch.float32)
    answers = []
    for filler in (0.0, 1e4):
        keys[:, :, 4:7] = values[:, :, 4:7] = filler
        answers.append(
            attention(query, (keys[:, :, :7], keys[:, :, 7:]), (values[:, :, :7], values[:, :, 7:]), additive, 0.3)
        )
    assert torch.equal(*answers)


def test_an_empty_past_is_no_past():
    query, keys, values = random_attention(4, 2, past=0)
    empty = keys[:, :, :0]
    mask = causal_mask(torch.ones(2, 5, dtype=torch.int64), 5, torch.float32)
    found = attention(query, (empty, keys), (empty, values), mask, 0.3)
    assert torch.equal(found, attention(query, (keys,), (values,), mask, 0.3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 17), (5, 1)])
def test_image_tokens_are_counted_in_reading_order(shape):
    is_image = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = torch.cumsum(is_image.reshape(-1).to(torch.int64), 0).reshape(shape)
    assert torch.equal(image_rank(is_image), expected)


def test_the_implementation_is_put_back_after_a_failure():
    from transformers import Qwen2Config

    config = Qwen2Config()
    config._attn_implementation = "sdpa"

    def fail() -> None:
        with written_out_attention(config):
            assert config._attn_implementation == "mgvq"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert config._attn_implementation == "sdpa"
