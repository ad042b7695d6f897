from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_problems import random_layer

from toolchain.values import CODES, VQCode
from toolchain.vq.factor import factor_moment
from toolchain.vq.kronecker import Objective
from toolchain.vq.refit_cg import entry_weights, refine, refit, refit_codebook_cg, refit_scales_coupled
from toolchain.vq.scales import refit_scales
from toolchain.vq.solve import solve_problem
from toolchain.vq.weights import Options, decode_stacked, stack_group

FAST = Options(rounds=1, lloyd_rounds=3, samples=2_000)


def coupling(size, seed):
    basis = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed))
    return basis @ basis.T / (2 * size) + 0.1 * torch.eye(size)


def setting(rows, columns, code, seed=0):
    weight, moment = random_layer(sum(rows), columns, seed)
    problem = stack_group(list(weight.split(rows)), moment, code, searches_paths=True)
    start = solve_problem(problem, code, FAST, torch.Generator().manual_seed(seed))
    damped = factor_moment(problem.moment, columns, code.vector, FAST.damping).damped
    factors = [coupling(m, seed + i) for i, m in enumerate(rows)]
    return problem, start, damped, factors


def normal_equations(objective, indices, scales, entries, vector):
    """(A, b) of vec(T), from the design matrix of vec(Ŵ) and S_o ⊗ S written out in float64."""
    rows, blocks = indices.shape
    design = np.zeros((rows, blocks, vector, entries, vector))
    for row in range(rows):
        for block in range(blocks):
            for place in range(vector):
                design[row, block, place, int(indices[row, block]), place] = float(scales[row])
    design = design.reshape(rows * blocks * vector, entries * vector)
    (block_of_rows,) = objective.blocks
    curvature = np.kron(block_of_rows.factor.double().numpy(), objective.moment.double().numpy())
    return design.T @ curvature @ design, design.T @ curvature @ objective.weight.double().numpy().reshape(-1)


def test_conjugate_gradients_reach_the_normal_equations():
    # Check 11 of the derivation: the gradient at the solution of the normal equations is nothing.
    code = VQCode(2, 3, 3)
    problem, start, damped, factors = setting([24], 16, code)
    objective = Objective.of(problem, damped, factors)
    normal, right = normal_equations(objective, start.indices, start.scales, code.entries, 2)
    wanted = torch.from_numpy(np.linalg.lstsq(normal, right, rcond=None)[0].reshape(-1, 2)).float()
    found = refit_codebook_cg(objective, start.indices, start.scales, start.codebook.float(), iterations=60)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    losses = [objective.loss(decode_stacked(start.indices, t, start.scales)) for t in (found, wanted, start.codebook)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < losses[2]


def test_entry_weights_are_the_diagonal_blocks_of_uncoupled_places():
    code = VQCode(2, 3, 3)
    problem, start, damped, _ = setting([24], 16, code)
    one_place = torch.zeros(24, 8, dtype=torch.uint8)
    one_place[3, 5] = 1
    objective = Objective.of(problem, damped, [coupling(24, 0)])
    found = entry_weights(objective, one_place, start.scales.float(), 8)
    wanted = coupling(24, 0)[3, 3] * start.scales[3].float() ** 2 * damped[10:12, 10:12]
    torch.testing.assert_close(found[1], wanted)
    assert float(found[2:].abs().max()) == 0


def test_entries_without_a_code_stay():
    code = VQCode(2, 6, 6)
    problem, start, damped, factors = setting([8], 16, code)
    codebook = start.codebook.float()
    found = refit_codebook_cg(Objective.of(problem, damped, factors), start.indices % 32, start.scales, codebook)
    assert torch.equal(found[32:], codebook[32:])
    assert not torch.equal(found[:32], codebook[:32])


def test_coupled_scales_are_the_least_squares_ones():
    code = VQCode(4, 8, 8)
    problem, start, damped, factors = setting([20, 12], 32, code)
    objective = Objective.of(problem, damped, factors)
    unit = decode_stacked(start.indices, start.codebook, torch.ones_like(start.scales))
    found = refit_scales_coupled(objective, unit, start.scales.float())
    q, w, s = (x.double().numpy() for x in (unit, problem.weight, damped))
    rows_factor = torch.block_diag(*factors).double().numpy()
    wanted = np.linalg.solve(rows_factor * (q @ s @ q.T), np.diag(rows_factor @ w @ s @ q.T))
    ratio = wanted / start.scales.double().numpy()
    assert ratio.min() > 0.5
    assert ratio.max() < 2
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3)


def test_uncoupled_scales_are_those_of_each_row():
    code = VQCode(4, 8, 8)
    problem, start, damped, _ = setting([20], 32, code)
    unit = decode_stacked(start.indices, start.codebook, torch.ones_like(start.scales))
    scales = start.scales.float()
    wanted = refit_scales(problem.weight, unit, damped, scales)
    assert torch.equal(refit_scales_coupled(Objective.of(problem, damped), unit, scales), wanted)
    identity = Objective.of(problem, damped, [torch.eye(20)])
    torch.testing.assert_close(refit_scales_coupled(identity, unit, scales), wanted, rtol=1e-4, atol=0)


def test_a_row_of_scale_zero_keeps_it():
    code = VQCode(4, 8, 8)
    problem, start, damped, factors = setting([20], 32, code)
    unit = decode_stacked(start.indices, start.codebook, torch.ones_like(start.scales))
    scales = start.scales.float()
    scales[4] = 0
    found = refit_scales_coupled(Objective.of(problem, damped, factors), unit, scales)
    assert float(found[4]) == 0
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", ["4,8,8", "2,4,8", "4,8,9"])
@pytest.mark.parametrize("is_coupled", [True, False])
def test_a_refit_is_stored_and_loses_less(name, is_coupled):
    code = CODES[name]
    problem, start, damped, factors = setting([150, 40], 40, code)
    objective = Objective.of(problem, damped, factors if is_coupled else None)
    found = refit(problem, start, code, objective)
    assert objective.loss(found.decode()) < objective.loss(start.decode())
    assert torch.equal(found.indices, start.indices)
    assert (found.codebook.dtype, found.scales.dtype) == (start.codebook.dtype, torch.float16)
    assert torch.isfinite(found.decode()).all()


def test_a_start_that_cannot_be_bettered_is_kept():
    code = VQCode(4, 8, 8)
    problem, start, damped, factors = setting([40], 32, code)
    settled = replace(problem, weight=start.decode())
    found = refit(settled, start, code, Objective.of(settled, damped, factors))
    assert torch.equal(found.codebook, start.codebook)
    assert torch.equal(found.scales, start.scales)
    assert found.loss == 0


def test_further_rounds_never_lose():
    code = VQCode(4, 8, 9)
    problem, start, damped, factors = setting([128], 32, code)
    objective = Objective.of(problem, damped, factors)
    losses = [objective.loss(refine(problem, start, code, damped, factors, rounds=n).decode()) for n in (0, 1, 2)]
    assert losses[0] > losses[1] > losses[2]
