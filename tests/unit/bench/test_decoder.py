"""The decoder that is timed: the same model whichever linears it has, and its step needs no new memory of the cache."""

from __future__ import annotations

import torch
from torch import nn

from toolchain.bench.decoder import Decoder, coded_maker, dense_maker
from toolchain.bench.shapes import VOCABULARIES, decoder_shape
from toolchain.checkpoint.modules import VQLinear, vq_modules
from toolchain.values import CODES

OPTIONS = {"dtype": torch.float32, "device": "cpu"}


def test_coded_and_dense_linears_make_the_same_decoder():
    torch.manual_seed(0)
    coded = Decoder("demo", coded_maker(CODES["2,4,8"], OPTIONS), 16, OPTIONS, blocks=2)
    dense = Decoder("demo", dense_maker(OPTIONS), 16, OPTIONS, blocks=2)
    dense.load_state_dict({k: v for k, v in coded.state_dict().items() if "keys" in k or "values" in k}, strict=False)
    for name, module in vq_modules(coded).items():
        dense.get_submodule(name).weight.copy_(module.weight)
    x = torch.randn(1, 256)
    y = coded(x)
    assert y.shape == (1, VOCABULARIES["demo"])
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)


def test_it_has_the_published_linears_and_no_others():
    kinds = []

    def make(rows: int, columns: int) -> nn.Module:
        kinds.append((rows, columns))
        return nn.Identity()

    Decoder("qwen2-vl-2b", make, 1, OPTIONS)
    groups = [(sum(g.rows), g.columns) for g in decoder_shape("qwen2-vl-2b").groups]
    assert kinds == groups * 28 + [(151936, 1536)]


def test_weights_are_of_a_trained_decoders_size():
    torch.manual_seed(0)
    for code in ("2,4,8", "4,8,9"):
        layer = coded_maker(CODES[code], OPTIONS)(256, 256)
        assert isinstance(layer, VQLinear)
        assert 0.018 < layer.weight.std() < 0.022


def test_the_newest_position_enters_the_attention():
    torch.manual_seed(0)
    decoder = Decoder("demo", dense_maker(OPTIONS), 4, OPTIONS, blocks=1)
    block = decoder.blocks[0]
    old = block.keys.clone()
    decoder(torch.randn(1, 256))
    assert torch.equal(block.keys[:, :, :-1], old[:, :, :-1])
    assert not torch.equal(block.keys[:, :, -1], old[:, :, -1])
