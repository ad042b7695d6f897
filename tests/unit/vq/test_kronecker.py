from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer

from toolchain.errors import ShapeError
from toolchain.values import CODES
from toolchain.vq import kronecker
from toolchain.vq.factor import factor_moment
from toolchain.vq.kronecker import Objective, best_of
from toolchain.vq.weights import stack_group


def spd(size, seed, ridge=0.1):
    basis = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    found = basis @ basis.T / size + ridge * torch.eye(size)
    return found / found.diagonal().mean()


def problem_of(rows, columns=24, code="2,4,8"):
    weight, moment = random_layer(sum(rows), columns)
    problem = stack_group(list(weight.split(rows)), moment, CODES[code], searches_paths=True)
    return problem, factor_moment(problem.moment, columns, 2, 0.01).damped


def test_loss_is_the_layers_own_quadratic_forms_summed():
    rows = [40, 24]
    problem, damped = problem_of(rows)
    factors = [spd(m, seed) for seed, m in enumerate(rows)]
    decoded = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(2))
    decoded[[i for i in range(len(decoded)) if i % 128 >= 40 - 16 * (i // 128)]] = 0  # padding decodes to nothing
    error = (decoded - problem.weight).double()
    parts = zip(factors, error.split(problem.held), rows, strict=True)
    wanted = sum((s.double() @ e[:m] @ damped.double() * e[:m]).sum() for s, e, m in parts)
    assert Objective.of(problem, damped, factors).loss(decoded) == pytest.approx(float(wanted), rel=1e-5)


def test_without_row_factors_rows_count_by_their_weights():
    weight, moment = random_layer(20, 16)
    counts = torch.rand(20, generator=torch.Generator().manual_seed(0))
    problem = stack_group([weight], moment, CODES["4,8,8"], row_weights=[counts])
    found = Objective.of(problem, problem.moment).loss(torch.zeros_like(weight))
    assert found == pytest.approx(float((counts * ((weight @ moment) * weight).sum(dim=1)).sum()), rel=1e-5)


def test_layers_taken_one_by_one_come_to_the_same(monkeypatch):
    rows = [40, 24]
    problem, damped = problem_of(rows)
    factors = [spd(m, seed) for seed, m in enumerate(rows)]
    together = Objective.of(problem, damped, factors)
    monkeypatch.setattr(kronecker, "MERGED_ROWS", 64)
    apart = Objective.of(problem, damped, factors)
    assert [len(together.blocks), len(apart.blocks)] == [1, 2]
    torch.testing.assert_close(together.pulled(problem.weight), apart.pulled(problem.weight))
    torch.testing.assert_close(together.counts, apart.counts)


def test_a_layer_without_a_factor_counts_its_rows_apart():
    rows = [40, 24]
    problem, damped = problem_of(rows)
    factor = spd(24, 1)
    found = Objective.of(problem, damped, [None, factor])
    assert [(block.first, block.last, block.factor is None) for block in found.blocks] == [
        (0, problem.held[0], True),
        (problem.held[0], sum(problem.held), False),
    ]
    wanted = Objective.of(problem, damped, [torch.eye(40), factor])
    torch.testing.assert_close(found.pulled(problem.weight), wanted.pulled(problem.weight))
    none = Objective.of(problem, damped, [None, None])
    torch.testing.assert_close(none.pulled(problem.weight), Objective.of(problem, damped).pulled(problem.weight))


def test_refuses_factors_that_are_not_the_layers():
    problem, damped = problem_of([40, 24])
    with pytest.raises(ShapeError, match=r"\[40, 24\] rows, found \[\(64, 64\)\]"):
        Objective.of(problem, damped, [torch.eye(64)])
    with pytest.raises(ShapeError, match=r"found \[None, \(23, 23\)\]"):
        Objective.of(problem, damped, [None, torch.eye(23)])


def test_best_of_keeps_the_first_of_equals():
    assert best_of(["a", "bb", "c"], len) == ("a", 1)
