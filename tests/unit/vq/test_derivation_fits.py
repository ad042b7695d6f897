"""The derivation held against our functions: checks [10] and [12] of mgvq-algorithm.md, layout, codebooks,
curvature.
"""

from __future__ import annotations

import pytest
import torch
from derivation_problems import definite, plain_codebook
from layer_problems import random_layer
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.assign import nearest_entries
from toolchain.vq.curvature import half_iteration, kronecker_scale, quadratic
from toolchain.vq.factor import factor_moment
from toolchain.vq.interleave import interleaved_permutation
from toolchain.vq.sensitivity import fisher_losses
from toolchain.vq.solve import quantize_group
from toolchain.vq.sweep import sweep
from toolchain.vq.weights import Options, decode_stacked


def relative_loss(weight: Tensor, moment: Tensor, order: Tensor) -> float:
    """What `quantize_group` in two bits leaves of the outputs with columns in this order; one sweep, no scales."""
    options = Options(rounds=1, lloyd_rounds=6, samples=4096)
    generator = torch.Generator().manual_seed(0)
    group = quantize_group([weight[:, order]], moment[order][:, order], VQCode(4, 8, 8), options, generator)
    return group.loss / sum(group.references)


class TestLayout:
    """[10] the block's exact metric, and high-energy columns interleaved over all vectors."""

    def metric_losses(self, seed: int) -> list[float]:
        """tr(E S Eᵀ) of a sweep whose search sees D_k, its diagonal, or neither."""
        weight, moment = random_layer(96, 48, seed)
        factors = factor_moment(moment, 48, 4, damping=0.01)
        scales = weight.square().mean(dim=1).sqrt().half()
        codebook = plain_codebook(weight / scales.float()[:, None], 4, 64)
        metrics = (lambda exact: exact, lambda exact: exact.diagonal().diag(), lambda exact: torch.eye(4))

        def search_by(metric):
            return lambda targets, exact, *rest: nearest_entries(targets, metric(exact), *rest)

        coded = [sweep(weight, factors, codebook, scales, 16, search_by(metric))[0] for metric in metrics]
        return [quadratic(decode_stacked(one, codebook, scales) - weight, None, factors.damped) for one in coded]

    @pytest.mark.parametrize("seed", range(4))
    def test_the_exact_metric_beats_its_diagonal_beats_none(self, seed):
        exact, diagonal, euclidean = self.metric_losses(seed)
        assert exact < diagonal < euclidean
        assert exact < 0.8 * euclidean

    @pytest.mark.parametrize("seed", range(2))
    def test_interleaved_columns_beat_natural_beat_sorted(self, seed):
        weight, moment = random_layer(256, 96, seed)
        orders = {
            "interleaved": interleaved_permutation(moment.diagonal(), 4),
            "natural": torch.arange(96),
            "sorted": moment.diagonal().argsort(descending=True),
        }
        losses = {name: relative_loss(weight, moment, order) for name, order in orders.items()}
        assert losses["interleaved"] < losses["natural"] < losses["sorted"]


class TestTables:
    """The distortion of plain codebooks, against that measured for the note's section 4.1."""

    @pytest.mark.parametrize(("vector", "entries", "expected"), [(4, 256, 0.0978), (2, 16, 0.1082)])
    def test_gaussian_error_on_vectors_not_trained_on(self, vector, entries, expected):
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(80_000, vector, generator=generator)
        codebook = plain_codebook(drawn[:60_000], vector, entries).float()
        error = torch.cdist(drawn[60_000:], codebook).min(dim=1).values.square().mean() / vector
        assert float(error) == pytest.approx(expected, rel=0.03)


class TestKroneckerFit:
    """[12] equation 6: the scale of S_o ⊗ S_i is that of the projection, and half an iteration fits."""

    def gradients(self, count: int = 3000) -> Tensor:
        """float32[B, 6, 8]: Kronecker noise, some sequences louder than others."""
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.cholesky(definite(size, 1.5, generator)) for size in (6, 8))
        row_importance = torch.exp(0.5 * torch.randn(count, generator=generator))[:, None, None]
        return row_importance * (left @ torch.randn(count, 6, 8, generator=generator) @ right.T)

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
