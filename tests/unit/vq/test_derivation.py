"""The derivation of the method held against our functions: the numbered checks of mgvq-algorithm.md.

References are dense float64 algebra on problems small enough for it: the loss is
Q(Δ) = gᵀ vec(Δ) + ½ vec(Δ)ᵀ (S_o ⊗ S_i) vec(Δ), and what is free in it is solved for as one linear system.
Here [1] to [5]; [6] to [8] are in `test_derivation_drift`, [10] and [12] in `test_derivation_fits`, [9] and [11] in
`test_descent`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from derivation_problems import UNDAMPED, Case, case_of
from torch import Tensor

from toolchain.vq.curvature import newton_shift, quadratic
from toolchain.vq.factor import Factors


def vectorised(case: Case) -> tuple[Tensor, Tensor]:
    """(g float64[m n], S_o ⊗ S_i float64[m n, m n])."""
    return case.gradient.double().flatten(), torch.kron(case.rows.double(), case.columns.double())


def best_rest(case: Case, decoded: Tensor) -> Tensor:
    """float64[m, n − q]: the weights that minimise Q over all columns after the q that `decoded` fixes."""
    gradient, curvature = vectorised(case)
    places = torch.arange(case.weight.numel()).reshape(case.weight.shape)
    fixed, free = places[:, : decoded.shape[1]].flatten(), places[:, decoded.shape[1] :].flatten()
    moved = (decoded - case.weight[:, : decoded.shape[1]]).double().flatten()
    right = -(gradient[free] + curvature[free][:, fixed] @ moved)
    rest = torch.linalg.solve(curvature[free][:, free], right)
    return case.weight[:, decoded.shape[1] :].double() + rest.reshape(len(case.weight), -1)


def compensated(case: Case, decoded: Tensor) -> Tensor:
    """float32[m, n − q]: the same by our factors: W* fed with the errors so far, E U being zero on the free columns."""
    at = decoded.shape[1]
    unit, shifted = case.factors.unit, case.shifted
    fed = (shifted[:, :at] - decoded) @ unit[:at, at:]
    return shifted[:, at:] + torch.linalg.solve_triangular(unit[at:, at:], fed, upper=True, left=False)


def gradient_at(case: Case, weight: Tensor) -> Tensor:
    """∂Q/∂Ŵ float64[m, n] by autograd on the vectorised form."""
    gradient, curvature = vectorised(case)
    moved = (weight.double() - case.weight.double()).flatten().requires_grad_(True)
    (gradient @ moved + 0.5 * moved @ curvature @ moved).backward()
    assert moved.grad is not None
    return moved.grad.reshape(weight.shape)


class TestQuadraticForm:
    """[1] and equation 8."""

    def test_trace_form_is_the_vectorised_form(self):
        case = case_of(0)
        moved = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
        gradient, curvature = vectorised(case)
        flat = moved.double().flatten()
        expected = float(gradient @ flat + 0.5 * flat @ curvature @ flat)
        assert case.loss(case.weight + moved) == pytest.approx(expected, rel=1e-5)

    def test_the_shift_completes_the_square(self):
        """Q(Ŵ − W) = ½ tr(S_o (Ŵ − W*) S_i (Ŵ − W*)ᵀ) − ½ ⟨G, N⟩ for any Ŵ: no gradient is left in it."""
        case = case_of(1)
        apart = 0.5 * float((case.gradient * (case.weight - case.shifted)).sum())
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            decoded = case.weight + torch.randn(6, 24, generator=generator)
            squared = quadratic(decoded - case.shifted, case.rows, case.columns)
            assert case.loss(decoded) == pytest.approx(squared - apart, rel=1e-4)


class TestClosedForm:
    """[2] equation 7, [5] what is left of the gradient after it."""

    @pytest.mark.parametrize("fixed", [0, 4, 8, 16, 20])
    def test_shift_and_feedback_minimise_over_what_is_free(self, fixed):
        case = case_of(fixed)
        decoded = case.code(case.shifted)[0][:, :fixed]
        torch.testing.assert_close(compensated(case, decoded).double(), best_rest(case, decoded), rtol=1e-3, atol=1e-4)

    def test_no_gradient_is_left_on_the_free_columns(self):
        case = case_of(3)
        decoded = case.code(case.shifted)[0][:, :12]
        before = gradient_at(case, torch.cat([decoded, case.weight[:, 12:]], dim=1))[:, 12:]
        after = gradient_at(case, torch.cat([decoded, compensated(case, decoded)], dim=1))[:, 12:]
        assert float(after.abs().max()) < 1e-5 * float(before.abs().max())

    def test_what_is_left_moves_nothing(self):
        """A second first-order step inside a layer is none: the Newton step of the gradient left on F is zero."""
        case = case_of(4)
        decoded = case.code(case.shifted)[0][:, :12]
        rest = compensated(case, decoded)
        left = gradient_at(case, torch.cat([decoded, rest], dim=1))[:, 12:].float()
        step = newton_shift(left, case.rows, case.columns[12:, 12:], UNDAMPED)
        assert float(step.abs().max()) < 1e-4 * float((rest - case.weight[:, 12:]).abs().max())

    def test_the_gradient_of_the_displacement_alone_only_undoes_the_compensation(self):
        """FOEM's surrogate drops what the fixed columns pull; its Newton step is the displacement, taken back."""
        case = replace(case_of(5), gradient=torch.zeros(6, 24))
        decoded = case.code(case.weight)[0][:, :12]
        moved = compensated(case, decoded) - case.weight[:, 12:]
        surrogate = case.rows @ moved @ case.columns[12:, 12:]
        assert float(surrogate.abs().max()) > 0.1
        step = newton_shift(surrogate, case.rows, case.columns[12:, 12:], UNDAMPED)
        torch.testing.assert_close(step, moved, rtol=1e-3, atol=1e-4)


def nearest(target: Tensor, metric: Tensor, codebook: Tensor) -> Tensor:
    """float64[m, V]: the slow nearest entries."""
    off = target[:, None] - codebook.double()
    return codebook.double()[torch.einsum("mkv,vw,mkw->mk", off, metric, off).argmin(dim=1)]


def coded_by_resolving(case: Case) -> tuple[Tensor, Tensor]:
    """(Ŵ, targets): every block's target is where the whole rest, gradient and all, is solved for again."""
    decoded, targets = torch.zeros(len(case.weight), 0, dtype=torch.float64), []
    for at in range(0, case.weight.shape[1], 4):
        metric = torch.linalg.inv(torch.linalg.inv(case.columns[at:, at:].double())[:4, :4])
        targets.append(best_rest(case, decoded)[:, :4])
        decoded = torch.cat([decoded, nearest(targets[-1], metric, case.codebook)], dim=1)
    return decoded, torch.cat(targets, dim=1)


def coded_by_inverse(case: Case, again: bool = False) -> Tensor:
    """Ŵ by the running update of OBS on W*; `again` subtracts the first-order term after every block."""
    current = case.shifted.double().clone()
    inverse = torch.linalg.inv(case.columns.double())
    decoded = torch.zeros_like(current)
    for at in range(0, current.shape[1], 4):
        block, rest = slice(at, at + 4), slice(at + 4, None)
        own, cross = inverse[:4, :4], inverse[:4, 4:]
        decoded[:, block] = nearest(current[:, block], torch.linalg.inv(own), case.codebook)
        pull = torch.linalg.solve(own, cross)
        current[:, rest] -= (current[:, block] - decoded[:, block]) @ pull
        inverse = inverse[4:, 4:] - cross.T @ pull
        if again:
            current[:, rest] -= torch.linalg.solve(case.rows.double(), case.gradient[:, rest].double() @ inverse)
    return decoded


class TestSequence:
    """[3] one sweep on W* is the gradient-aware sweep; [4] the gradient enters once."""

    @pytest.mark.parametrize("seed", range(6))
    def test_shift_and_sweep_resolve_exactly(self, seed):
        """The targets too: had the gradient been added to any of them again, they would not be the best rest."""
        case = case_of(seed)
        decoded, targets = case.code(case.shifted)
        expected, resolved = coded_by_resolving(case)
        assert torch.equal(decoded.double(), expected)
        torch.testing.assert_close(targets.double(), resolved, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("seed", range(6))
    def test_shift_and_sweep_are_shift_and_the_inverse_update(self, seed):
        case = case_of(seed, rows=16, columns=64, entries=64)
        assert torch.equal(case.code(case.shifted)[0].double(), coded_by_inverse(case))

    def test_the_shift_helps_and_more_where_there_is_more_drift(self):
        """Drift 0.1 takes 6 % off on average, at worst 1 % onto a layer: a sweep is greedy; 0.3 always helps."""
        gains = {}
        for drift in (0.1, 0.3):
            cases = [case_of(100 + seed, 32, 64, drift, 64) for seed in range(10)]
            losses = [(case.loss(case.code(case.weight)[0]), case.loss(case.code(case.shifted)[0])) for case in cases]
            gains[drift] = 1 - torch.tensor([after / before for before, after in losses])
        assert float(gains[0.1].mean()) > 0.04
        assert float(gains[0.1].min()) > -0.01
        assert float(gains[0.3].min()) > 0.3

    def test_a_gradient_added_again_after_every_block_ruins_the_layer(self):
        for seed in range(100, 103):
            case = case_of(seed, 32, 64, 0.1, 64)
            without = case.loss(case.code(case.weight)[0])
            assert case.loss(coded_by_inverse(case, again=True).float()) > 2 * without

    def test_a_gradient_that_waits_for_the_first_block_costs_little(self):
        """The first block is coded as if there were none; compensation of the rest then takes all of it in."""
        losses = []
        for seed in range(100, 106):
            case = case_of(seed, 32, 64, 0.3, 64)
            first = case.code(case.weight)[0][:, :4]
            factors = case.factors
            later = Factors(factors.unit[4:, 4:], factors.pivots[1:], factors.damped[4:, 4:], factors.damping)
            late = torch.cat([first, case.code(compensated(case, first), later)[0]], dim=1)
            losses.append([case.loss(one) for one in (case.code(case.weight)[0], late, case.code(case.shifted)[0])])
        without, late, once = torch.tensor(losses).mean(dim=0).tolist()
        assert once < late < without - 0.8 * (without - once)
