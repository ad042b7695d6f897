"""The derivation held against our functions: checks [6] to [8] of mgvq-algorithm.md, drift and how far to follow it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from derivation_problems import INFINITE, UNDAMPED, Case, definite, plain_codebook
from torch import Tensor

from toolchain.vq.curvature import newton_shift, quadratic
from toolchain.vq.drift import Pair, PairMoments, gated_shift, regression
from toolchain.vq.factor import Factors, factor_moment


class TestAsymmetricCalibration:
    """[6] equation 13: half ‖W X_f − (W + Δ) X_q‖² is Q with G = W (S_q − C), S_o = I."""

    def problem(self) -> tuple[Tensor, Tensor, Tensor, Pair]:
        generator = torch.Generator().manual_seed(0)
        weight, rows = torch.randn(6, 10, generator=generator), torch.randn(400, 10, generator=generator)
        full = rows + 0.3 * torch.randn(400, 10, generator=generator)
        return weight, rows, full, Pair.of(rows, full, torch.ones(400))

    def test_its_loss_is_the_quadratic(self):
        weight, rows, full, pair = self.problem()
        moved = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))

        def squared(change: Tensor) -> float:
            return 0.5 * float((full @ weight.T - rows @ (weight + change).T).square().sum(dtype=torch.float64))

        linear = float((weight @ (pair.moment - pair.cross) * moved).sum(dtype=torch.float64))
        found = linear + quadratic(moved, None, pair.moment)
        assert found == pytest.approx(squared(moved) - squared(torch.zeros_like(moved)), rel=1e-5)

    def test_its_newton_shift_is_the_least_squares_map(self):
        weight, _, _, pair = self.problem()
        shift = newton_shift(weight @ (pair.moment - pair.cross), torch.eye(6), pair.moment, UNDAMPED)
        torch.testing.assert_close(-shift, weight @ regression(pair, 0.0), rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Gains:
    """Mean over seeds of what a shift adds to E‖W x_f − Ŵ x_q‖², and the mean step of the gate."""

    full: float
    gated: float
    step: float


def drift_gains(noise: float, seeds: range = range(5)) -> Gains:
    """x_f = A x_q + noise: A is what a shift may follow, noise over 256 tokens what it must not; losses are exact."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        moment, weight = definite(48, 0.8, generator), torch.randn(24, 48, generator=generator)
        mix = torch.eye(48) + 0.2 * torch.randn(48, 48, generator=generator) / 48**0.5
        rows = torch.randn(256, 48, generator=generator) @ torch.linalg.cholesky(moment).T
        full = rows @ mix.T + noise * torch.randn(256, 48, generator=generator)
        token_weight = torch.full((128,), 1 / 256)
        pairs = PairMoments.merged([Pair.of(rows[k::2], full[k::2], token_weight) for k in (0, 1)])
        factors = factor_moment(moment, 48, 4, damping=1e-4)
        case = Case(weight, torch.zeros_like(weight), torch.eye(24), factors, plain_codebook(weight, 4, 64))
        gate = gated_shift(weight, pairs, INFINITE)
        whole = weight @ regression(pairs.whole, 1e-3)
        losses = [
            2 * quadratic(case.code(weight + shift)[0] - weight @ mix, None, moment)
            for shift in (torch.zeros_like(weight), whole, gate.value)
        ]
        found.append((losses[1] - losses[0], losses[2] - losses[0], gate.step))
    return Gains(*torch.tensor(found).mean(dim=0).tolist())


class TestHeldOutStep:
    """[7] equation 14: a step is worth what the other half of the samples says."""

    def test_a_clean_drift_is_followed_and_noise_is_not(self):
        clean, some, much, all_noise = (drift_gains(noise) for noise in (0.0, 0.3, 1.0, 3.0))
        assert clean.full < 0
        assert clean.gated == pytest.approx(clean.full, rel=0.05)
        assert clean.step > 0.95
        assert some.gated < 0
        assert some.gated < some.full
        assert much.full > 0, "the whole step loses"
        assert much.gated < 0
        assert all_noise.full > 10 * abs(clean.full)
        assert all_noise.gated < 0.3 * abs(clean.full), "what is left to lose is a part of what there was to gain"
        steps = [gains.step for gains in (clean, some, much, all_noise)]
        assert steps == sorted(steps, reverse=True)


def shrunk(factors: Factors, share: float) -> Factors:
    """Feedback times 1 − share, metrics as they are."""
    identity = torch.eye(len(factors.unit))
    return replace(factors, unit=identity + (1 - share) * (factors.unit - identity))


class TestUnderSampledMoments:
    """[8] compensation by a moment of few tokens goes too far; by one of many it does not."""

    def losses(self, tokens_per_column: float) -> list[float]:
        """True loss by share of the compensation left out, 0, 0.2, 0.4, mean over seeds."""
        found = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(900 + seed)
            truth, weight = definite(64, 0.8, generator), torch.randn(32, 64, generator=generator)
            count = int(64 * tokens_per_column)
            rows = torch.randn(count, 64, generator=generator) @ torch.linalg.cholesky(truth).T
            factors = factor_moment(rows.T @ rows / count, 64, 4, damping=0.01)
            case = Case(weight, torch.zeros_like(weight), torch.eye(32), factors, plain_codebook(weight, 4, 64))
            coded = [case.code(weight, shrunk(factors, share))[0] for share in (0.0, 0.2, 0.4)]
            found.append([quadratic(one - weight, None, truth) for one in coded])
        return torch.tensor(found).mean(dim=0).tolist()

    def test_shrinking_pays_where_tokens_are_few(self):
        none, some, more = self.losses(1.2)
        assert more < some < none
        assert more < 0.85 * none

    def test_shrinking_costs_where_they_are_many(self):
        none, some, more = self.losses(16)
        assert none < some < more
