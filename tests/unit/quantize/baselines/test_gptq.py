from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.quantize.baselines import gptq, rtn
from toolchain.values import PLAIN_CODE_NAMES, VQCode
from toolchain.vq.factor import factor_moment
from toolchain.vq.scales import rms_scales
from toolchain.vq.weights import Options, stack_group

CODE = VQCode.parse("4,8,8")


def run(method, weights, moment, code=CODE, **options):
    return method.quantize_group(weights, moment, code, Options(**options), torch.Generator())


def obvious_gptq(weight, moment, scales, damping):
    """Optimal brain surgeon, one column after the other, from a fresh inverse each time; numbers of 4 levels."""
    damped = (moment + damping * moment.diagonal().mean() * torch.eye(len(moment))).double()
    left, numbers = weight.double().clone(), []
    grid = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(damped[column:, column:])
        target = left[:, column]
        numbers.append((target[:, None] - grid * scales[:, None].double()).abs().argmin(dim=1))
        error = target - grid[numbers[-1]] * scales.double()
        left[:, column:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return torch.stack(numbers, dim=1)


def test_feedback_is_that_of_optimal_brain_surgeon():
    weight, moment = random_layer(20, 16)
    problem = stack_group([weight], moment, CODE)
    factors = factor_moment(problem.moment, 16, 1, 0.01)
    scales = gptq.weighted_scales(problem, factors.pivots.flatten(), 4)
    layer = run(gptq, [weight], moment, rounds=1).layers[0]
    found = (layer.decode() / layer.scales.float()[:, None]).round()
    assert torch.equal(found, 2.0 * obvious_gptq(weight, moment, scales.float(), 0.01) - 3)


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_weights_are_levels_of_their_row(code):
    weight, moment = random_layer(130, 24)
    layer = run(gptq, [weight], moment, VQCode.parse(code)).layers[0]
    levels = rtn.level_count(VQCode.parse(code))
    assert torch.equal(layer.codebook, rtn.level_codebook(VQCode.parse(code)))
    numbers = layer.decode() / layer.scales.float()[:, None]
    assert set(numbers.round().flatten().tolist()) <= set(range(1 - levels, levels, 2))


@pytest.mark.parametrize("code", PLAIN_CODE_NAMES)
def test_feedback_beats_rounding(code):
    weight, moment = random_layer(64, 96)
    losses = [run(method, [weight], moment, VQCode.parse(code)).loss for method in (gptq, rtn)]
    assert losses[0] < 0.9 * losses[1]


def test_without_correlation_a_round_rounds():
    """With H = I nothing is fed back, so that a weight's level is the nearest one."""
    weight, _ = random_layer(32, 32)
    layer = run(gptq, [weight], torch.eye(32), rounds=1).layers[0]
    problem = stack_group([weight], torch.eye(32), CODE)
    scales = gptq.weighted_scales(problem, torch.ones(32), 4).float()
    numbers = 2 * rtn.round_rows(weight, scales, 4) - 3
    assert torch.equal((layer.decode() / layer.scales.float()[:, None]).round().long(), numbers)


def test_a_scale_is_searched_where_it_costs():
    """One far weight in a column that counts draws the step to it; in a column that does not, it is clipped."""
    weight, _ = random_layer(1, 64)
    weight[0, 5] = 20 * float(rms_scales(weight, 64))
    problem = stack_group([weight], torch.eye(64), CODE)
    importance = torch.ones(64)
    quiet, loud = importance.clone(), importance.clone()
    quiet[5], loud[5] = 0, 1_000
    scales = [float(gptq.weighted_scales(problem, weights, 4)) for weights in (quiet, loud)]
    assert scales[0] < 0.3 * scales[1]
    assert 3 * scales[1] > 0.8 * float(weight[0, 5])


def test_further_rounds_never_lose():
    weight, moment = random_layer(64, 64)
    losses = [run(gptq, [weight], moment, rounds=rounds).loss for rounds in (1, 2, 3)]
    assert losses[0] >= losses[1] >= losses[2]
