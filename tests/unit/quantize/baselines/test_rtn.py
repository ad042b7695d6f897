from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import UnsupportedError
from toolchain.quantize.baselines import rtn
from toolchain.values import CODES, PLAIN_CODE_NAMES, VQCode
from toolchain.vq.weights import Options


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_the_codebook_holds_every_combination_of_levels(code):
    codebook = rtn.level_codebook(CODES[code]).float()
    levels = rtn.level_count(CODES[code])
    assert codebook.shape == (levels ** CODES[code].vector, CODES[code].vector)
    assert sorted(set(codebook.flatten().tolist())) == list(range(1 - levels, levels, 2))
    assert len(codebook.unique(dim=0)) == len(codebook)


def test_decodes_to_exact_rounding_by_hand():
    # Scale 1 wins: levels −3, −1, 1, 3 reproduce the row.
    row = torch.tensor([[-3.0, -1.0, 1.0, 3.0, 3.0, -1.0, -1.0, 1.0]])
    group = rtn.quantize_group([row], torch.eye(8), CODES["4,8,8"], Options(), torch.Generator())
    assert torch.equal(group.layers[0].decode(), row)
    assert group.loss == 0


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_decodes_to_exact_rounding(code):
    weight, moment = random_layer(130, 24)
    layer = rtn.quantize_group([weight], moment, CODES[code], Options(), torch.Generator()).layers[0]
    levels = rtn.level_count(CODES[code])
    scales = layer.scales.float()[:, None]
    grid = torch.arange(1 - levels, levels, 2).float()
    nearest = grid[(weight[..., None] - grid * scales[..., None]).abs().argmin(dim=-1)]
    assert torch.equal(layer.decode(), nearest * scales)


def test_the_clip_is_the_best_of_the_grid():
    weight, _ = random_layer(20, 64)
    found = rtn.search_scales(weight, 4)

    def errors(scales):
        rounded = (2 * rtn.round_rows(weight, scales.float(), 4) - 3) * scales.float()[:, None]
        return (weight - rounded).square().sum(dim=1)

    for ratio in rtn.CLIP_RATIOS:
        other = (ratio * weight.abs().amax(dim=1) / 3).half()
        assert bool((errors(found) <= errors(other) * (1 + 1e-6)).all())


@pytest.mark.parametrize("code", [VQCode(2, 5, 5), VQCode(2, 4, 8)], ids=str)
def test_codes_that_do_not_divide_are_refused(code):
    with pytest.raises(UnsupportedError, match="rounding to levels needs L = k"):
        rtn.level_count(code)
