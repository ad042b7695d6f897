"""The derivation of the method held against our functions: the numbered checks of mgvq-algorithm.md.

References are dense float64 algebra on problems small enough for it: the loss is
Q(Δ) = gᵀ vec(Δ) + ½ vec(Δ)ᵀ (S_o ⊗ S_i) vec(Δ), and what is free in it is solved for as one linear system.
Checks [9] and [11] are those of `vq.descent`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from layer_problems import random_layer
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.assign import nearest_entries
from toolchain.vq.codebook import Samples, train_table
from toolchain.vq.curvature import half_iteration, kronecker_scale, newton_shift, quadratic
from toolchain.vq.deal import deal_order
from toolchain.vq.drift import Pair, PairMoments, gated_shift, regression
from toolchain.vq.factor import Factors, factor_moment
from toolchain.vq.sensitivity import fisher_losses
from toolchain.vq.solve import quantize_group
from toolchain.vq.sweep import sweep
from toolchain.vq.weights import Options, decode_stacked

UNDAMPED = (0.0, 0.0)
INFINITE = 1e30  # a quantization error so large that the trust region never binds


def definite(size: int, power: float, generator: torch.Generator) -> Tensor:
    """float32[n, n]: eigenvalues j^−power in a random basis, mean diagonal 1."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power + 1e-2
    factor = (basis * values) @ basis.T
    return (factor * size / factor.trace()).float()


@dataclass(frozen=True)
class Case:
    """A layer, its loss, and a table for it: W, G float32[m, n], S_o [m, m], factors of S_i, table float16[K, V]."""

    weight: Tensor
    gradient: Tensor
    rows: Tensor
    factors: Factors
    table: Tensor

    @property
    def columns(self) -> Tensor:
        return self.factors.damped

    @property
    def shifted(self) -> Tensor:
        """W* = W − S_o⁻¹ G S_i⁻¹ (equation 8)."""
        return self.weight - newton_shift(self.gradient, self.rows, self.columns, UNDAMPED)

    def code(self, target: Tensor, factors: Factors | None = None) -> tuple[Tensor, Tensor]:
        """(Ŵ, fed-back targets T) of the sweep on `target`."""
        ones = torch.ones(len(target), dtype=torch.float16)
        indices, targets = sweep(target, factors or self.factors, self.table, ones, batch_columns=16)
        return decode_stacked(indices, self.table, ones), targets

    def loss(self, decoded: Tensor) -> float:
        """Q(Ŵ − W)."""
        difference = decoded - self.weight
        linear = float((self.gradient * difference).sum(dtype=torch.float64))
        return linear + quadratic(difference, self.rows, self.columns)


def plain_table(weight: Tensor, vector: int, entries: int) -> Tensor:
    """float16[K, V] by k-means on the weights, all errors alike."""
    vectors = weight.reshape(-1, vector)
    samples = Samples(vectors, torch.eye(vector).expand(len(vectors), -1, -1))
    return train_table(samples, entries, 8, torch.Generator().manual_seed(1))[0].half()


def case_of(seed: int, rows: int = 6, columns: int = 24, drift: float = 0.3, entries: int = 16) -> Case:
    """Gradients are those of a minimum that lies `drift` · randn away from W."""
    generator = torch.Generator().manual_seed(seed)
    row_factor, moment = definite(rows, 0.8, generator), definite(columns, 0.8, generator)
    weight = torch.randn(rows, columns, generator=generator)
    factors = factor_moment(moment, columns, 4, damping=0.01)
    gradient = row_factor @ (drift * torch.randn(rows, columns, generator=generator)) @ factors.damped
    return Case(weight, gradient, row_factor, factors, plain_table(weight, 4, entries))


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


def nearest(target: Tensor, metric: Tensor, table: Tensor) -> Tensor:
    """float64[m, V]: the slow nearest entries."""
    off = target[:, None] - table.double()
    return table.double()[torch.einsum("mkv,vw,mkw->mk", off, metric, off).argmin(dim=1)]


def coded_by_resolving(case: Case) -> tuple[Tensor, Tensor]:
    """(Ŵ, targets): every block's target is where the whole rest, gradient and all, is solved for again."""
    decoded, targets = torch.zeros(len(case.weight), 0, dtype=torch.float64), []
    for at in range(0, case.weight.shape[1], 4):
        metric = torch.linalg.inv(torch.linalg.inv(case.columns[at:, at:].double())[:4, :4])
        targets.append(best_rest(case, decoded)[:, :4])
        decoded = torch.cat([decoded, nearest(targets[-1], metric, case.table)], dim=1)
    return decoded, torch.cat(targets, dim=1)


def coded_by_inverse(case: Case, again: bool = False) -> Tensor:
    """Ŵ by the running update of OBS on W*; `again` subtracts the first-order term after every block."""
    current = case.shifted.double().clone()
    inverse = torch.linalg.inv(case.columns.double())
    decoded = torch.zeros_like(current)
    for at in range(0, current.shape[1], 4):
        block, rest = slice(at, at + 4), slice(at + 4, None)
        own, cross = inverse[:4, :4], inverse[:4, 4:]
        decoded[:, block] = nearest(current[:, block], torch.linalg.inv(own), case.table)
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
        mass = torch.full((128,), 1 / 256)
        pairs = PairMoments.merged([Pair.of(rows[k::2], full[k::2], mass) for k in (0, 1)])
        factors = factor_moment(moment, 48, 4, damping=1e-4)
        case = Case(weight, torch.zeros_like(weight), torch.eye(24), factors, plain_table(weight, 4, 64))
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
            case = Case(weight, torch.zeros_like(weight), torch.eye(32), factors, plain_table(weight, 4, 64))
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


def relative_loss(weight: Tensor, moment: Tensor, order: Tensor) -> float:
    """What `quantize_group` in two bits leaves of the outputs with columns in this order; one sweep, no scales."""
    options = Options(rounds=1, lloyd_rounds=6, samples=4096)
    generator = torch.Generator().manual_seed(0)
    group = quantize_group([weight[:, order]], moment[order][:, order], VQCode(4, 8, 8), options, generator)
    return group.loss / sum(group.references)


class TestLayout:
    """[10] the block's exact metric, and loud columns dealt over all vectors."""

    def metric_losses(self, seed: int) -> list[float]:
        """tr(E S Eᵀ) of a sweep whose search sees D_k, its diagonal, or neither."""
        weight, moment = random_layer(96, 48, seed)
        factors = factor_moment(moment, 48, 4, damping=0.01)
        scales = weight.square().mean(dim=1).sqrt().half()
        table = plain_table(weight / scales.float()[:, None], 4, 64)
        metrics = (lambda exact: exact, lambda exact: exact.diagonal().diag(), lambda exact: torch.eye(4))

        def search_by(metric):
            return lambda targets, exact, *rest: nearest_entries(targets, metric(exact), *rest)

        coded = [sweep(weight, factors, table, scales, 16, search_by(metric))[0] for metric in metrics]
        return [quadratic(decode_stacked(one, table, scales) - weight, None, factors.damped) for one in coded]

    @pytest.mark.parametrize("seed", range(4))
    def test_the_exact_metric_beats_its_diagonal_beats_none(self, seed):
        exact, diagonal, euclidean = self.metric_losses(seed)
        assert exact < diagonal < euclidean
        assert exact < 0.8 * euclidean

    @pytest.mark.parametrize("seed", range(2))
    def test_dealt_columns_beat_natural_beat_sorted(self, seed):
        weight, moment = random_layer(256, 96, seed)
        orders = {
            "dealt": deal_order(moment.diagonal(), 4),
            "natural": torch.arange(96),
            "sorted": moment.diagonal().argsort(descending=True),
        }
        losses = {name: relative_loss(weight, moment, order) for name, order in orders.items()}
        assert losses["dealt"] < losses["natural"] < losses["sorted"]


class TestTables:
    """The distortion of plain tables, against that measured for the note's section 4.1."""

    @pytest.mark.parametrize(("vector", "entries", "expected"), [(4, 256, 0.0978), (2, 16, 0.1082)])
    def test_gaussian_error_on_vectors_not_trained_on(self, vector, entries, expected):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(80_000, vector, generator=generator)
        table = plain_table(drawn[:60_000], vector, entries).float()
        error = torch.cdist(drawn[60_000:], table).min(dim=1).values.square().mean() / vector
        assert float(error) == pytest.approx(expected, rel=0.03)


class TestKroneckerFit:
    """[12] equation 6: the scale of S_o ⊗ S_i is that of the projection, and half an iteration fits."""

    def gradients(self, count: int = 3000) -> Tensor:
        """float32[B, 6, 8]: Kronecker noise, some sequences louder than others."""
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.cholesky(definite(size, 1.5, generator)) for size in (6, 8))
        loudness = torch.exp(0.5 * torch.randn(count, generator=generator))[:, None, None]
        return loudness * (left @ torch.randn(count, 6, 8, generator=generator) @ right.T)

    def fit(self, rows: Tensor, columns: Tensor) -> tuple[float, float, float]:
        """(our scale, that of the projection of the dense Fisher, relative misfit at our scale)."""
        gradients = self.gradients()
        flat = gradients.double().flatten(1)
        fisher = flat.T @ flat / len(flat)
        product = torch.kron(rows.double(), columns.double())
        scale = kronecker_scale(gradients, rows, columns)
        misfit = float((fisher - scale * product).norm() / fisher.norm())
        return scale, float((fisher * product).sum() / product.square().sum()), misfit

    def test_the_scale_is_the_projection(self):
        for rows, columns in ((torch.eye(6), torch.eye(8)), half_iteration(self.gradients())):
            found, expected, _ = self.fit(rows, columns)
            assert found == pytest.approx(expected, rel=1e-4)

    def test_half_an_iteration_fits(self):
        *_, unit = self.fit(torch.eye(6), torch.eye(8))
        *_, halfway = self.fit(*half_iteration(self.gradients()))
        assert unit > 0.8
        assert halfway < 0.15

    def test_the_fitted_quadratic_is_the_fisher_loss(self):
        """Equation 16 by factors, against ½ E⟨G_b, E⟩² sequence by sequence."""
        gradients = self.gradients()
        rows, columns = half_iteration(gradients)
        scale = kronecker_scale(gradients, rows, columns)
        errors = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(1))
        fitted = sum(scale * quadratic(error, rows, columns) for error in errors)
        exact = sum(float(fisher_losses(error, gradients, [8])) for error in errors)
        assert fitted == pytest.approx(exact, rel=0.1)
