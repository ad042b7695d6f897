from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import UsageError
from toolchain.quantize.baselines import nearest, rtn
from toolchain.quantize.methods import parse_method
from toolchain.values import CODES
from toolchain.vq.weights import Options


def test_every_vector_has_its_nearest_entry():
    weight, moment = random_layer(16, 16)
    layer = nearest.quantize_group([weight], moment, CODES["2,6,6"], Options(), torch.Generator()).layers[0]
    entries = layer.codebook.float() * layer.scales.float()[:, None, None]  # [rows, 64, 2]
    vectors = weight.reshape(16, 8, 1, 2)
    best = (vectors - entries[:, None]).square().sum(dim=-1).min(dim=-1).values.sum()
    found = (weight - layer.decode()).square().sum()
    torch.testing.assert_close(found, best)


def test_the_moment_changes_nothing_but_the_report():
    weight, moment = random_layer(16, 16)
    with_moment = nearest.quantize_group([weight], moment, CODES["4,8,8"], Options(), torch.Generator())
    plain = nearest.quantize_group([weight], torch.eye(16), CODES["4,8,8"], Options(), torch.Generator())
    assert torch.equal(with_moment.layers[0].codes, plain.layers[0].codes)
    assert with_moment.errors != plain.errors


def test_beats_rounding_in_weight_error():
    weight, _ = random_layer(128, 64)
    losses = [
        m.quantize_group([weight], torch.eye(64), CODES["4,8,8"], Options(), torch.Generator()).loss
        for m in (nearest, rtn)
    ]
    assert losses[0] < losses[1]


def test_methods_are_found_by_name():
    assert parse_method("nearest").fits_checkpoint
    with pytest.raises(UsageError, match="'awq' is not known; use one of mgvq, gptvq, gptq, nearest, rtn"):
        parse_method("awq")
