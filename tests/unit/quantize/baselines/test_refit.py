from __future__ import annotations

import torch
from layer_problems import random_layer

from toolchain.quantize.baselines.refit import refit_codebook, sum_by_index


def lookup(indices, rows):
    return lambda codebook: codebook[indices].reshape(rows, -1)


def problem(entries=6, rows=20, columns=12):
    weight, moment = random_layer(rows, columns)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(entries, (rows * columns // 2,), generator=generator)
    return weight, moment, indices, torch.randn(entries, 2, generator=generator) * 0.03


def gather_for(indices, entries):
    return lambda gradient: sum_by_index(gradient.reshape(-1, 2), indices, entries)


def test_sums_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert sum_by_index(values, torch.tensor([2, 0, 2]), 3).tolist() == [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]]


def test_summing_is_the_transpose_of_looking_up():
    weight, _, indices, codebook = problem()
    decoded, gathered = lookup(indices, 20)(codebook), gather_for(indices, 6)(weight)
    torch.testing.assert_close((decoded * weight).sum(), (codebook * gathered).sum())


def test_it_finds_the_least_squares_codebook():
    """Against the normal equations written out, one row of the design a weight."""
    weight, moment, indices, codebook = problem()
    found = refit_codebook(weight, moment, codebook, lookup(indices, 20), gather_for(indices, 6), 40)
    design = torch.stack([lookup(indices, 20)(unit.reshape(6, 2)).flatten() for unit in torch.eye(12)], dim=1).double()
    metric = torch.block_diag(*[moment.double()] * 20)
    best = torch.linalg.solve(design.T @ metric @ design, design.T @ metric @ weight.double().flatten())
    torch.testing.assert_close(found.double(), best.reshape(6, 2), rtol=2e-3, atol=1e-5)


def test_an_entry_no_code_names_stays():
    weight, moment, indices, codebook = problem()
    indices[indices == 3] = 2
    found = refit_codebook(weight, moment, codebook, lookup(indices, 20), gather_for(indices, 6), 20)
    assert torch.equal(found[3], codebook[3])
    assert not torch.equal(found[2], codebook[2])


def test_a_perfect_codebook_stays():
    _, moment, indices, codebook = problem()
    weight = lookup(indices, 20)(codebook)
    assert torch.equal(
        refit_codebook(weight, moment, codebook, lookup(indices, 20), gather_for(indices, 6), 20), codebook
    )
