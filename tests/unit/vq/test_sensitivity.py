"""Sensitivity of units: cases by hand, sums over units, what must not matter, and λ at its ends."""

from __future__ import annotations

import pytest
import torch
from layer_problems import random_layer, random_moment

from toolchain.errors import NumericGateError, ShapeError, UsageError
from toolchain.vq.factor import factor_moment
from toolchain.vq.sensitivity import (
    average_modality,
    combine,
    feedback_losses,
    fisher_losses,
    kronecker_losses,
    local_losses,
    local_losses_from_error,
    worst_modality,
)

ROWS, COLUMNS, VECTOR = 6, 16, 4
WIDTHS = (4, 8, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layer():
    """(W, E, factors of S at vector length 4, S_o)."""
    weight, moment = random_layer(ROWS, COLUMNS)
    factors = factor_moment(moment, COLUMNS, VECTOR, 0.01)
    error = 0.1 * torch.randn(ROWS, COLUMNS, generator=generator(1)) * weight.std()
    return weight, error, factors, random_moment(ROWS, generator(2))


def energy(matrix, moment):
    return torch.trace(matrix @ moment @ matrix.T)


def test_feedback_by_hand():
    # Two blocks of two columns, two rows; D_1 = diag(1, 2), D_2 = [[2, 1], [1, 2]].
    feedback = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 1.0, -1.0]])
    pivots = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 1.0], [1.0, 2.0]]])
    torch.testing.assert_close(feedback_losses(feedback, pivots, (2, 2)), torch.tensor([11.0, 4.0]))
    torch.testing.assert_close(local_losses(feedback, pivots, 30.0, (2, 2)), torch.tensor([11 / 30, 4 / 30]))
    # With S_o = [[1, 1], [1, 2]] the cross terms of the rows come in: 3 + 2·8 + 2·4 and 2 + 2·2 + 2·1.
    output = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    torch.testing.assert_close(feedback_losses(feedback, pivots, (2, 2), output), torch.tensor([27.0, 8.0]))


@pytest.mark.parametrize("widths", [WIDTHS, (COLUMNS,), (VECTOR,) * 4])
def test_units_add_up_to_the_layer(layer, widths):
    weight, error, factors, output = layer
    feedback = error @ factors.unit
    reference = float(energy(weight, factors.damped))
    local = local_losses(feedback, factors.pivots, reference, widths)
    assert len(local) == len(widths)
    torch.testing.assert_close(local_losses_from_error(error, factors, weight, widths), local)
    torch.testing.assert_close(local.sum(), energy(error, factors.damped) / reference)
    both = feedback_losses(feedback, factors.pivots, widths, output)
    torch.testing.assert_close(both.sum(), torch.trace(output @ error @ factors.damped @ error.T))


def test_a_wider_unit_is_the_sum_of_its_parts(layer):
    _, error, factors, _ = layer
    feedback = error @ factors.unit
    fine, coarse = (feedback_losses(feedback, factors.pivots, widths) for widths in ((4, 4, 4, 4), WIDTHS))
    torch.testing.assert_close(coarse, torch.stack([fine[0], fine[1] + fine[2], fine[3]]))


def test_local_losses_have_no_scale(layer):
    weight, error, factors, _ = layer

    def local(weight_scale: float, moment_scale: float):
        feedback, reference = weight_scale * error @ factors.unit, energy(weight_scale * weight, factors.damped)
        return local_losses(feedback, moment_scale * factors.pivots, float(moment_scale * reference), WIDTHS)

    torch.testing.assert_close(local(3.0, 0.01), local(1.0, 1.0))


def test_kronecker_is_its_vector_form():
    error = torch.randn(3, 4, generator=generator(3)).double()
    output, inputs = (random_moment(size, generator(size)).double() for size in (3, 4))
    expected = error.flatten() @ torch.kron(output, inputs) @ error.flatten() / 2
    torch.testing.assert_close(kronecker_losses(error, output, inputs, (4,)), expected[None])
    alone = torch.cat([error[:, :1], torch.zeros(3, 3)], dim=1).double().flatten()
    expected = alone @ torch.kron(output, inputs) @ alone / 2
    torch.testing.assert_close(kronecker_losses(error, output, inputs, (1, 3))[0], expected)


def test_kronecker_units_add_up_where_they_do_not_meet():
    error, output = torch.randn(3, 8, generator=generator(4)), random_moment(3, generator(5))
    inputs = torch.block_diag(*(random_moment(4, generator(seed)) for seed in (6, 7)))
    units, whole = (kronecker_losses(error, output, inputs, widths) for widths in ((4, 4), (8,)))
    torch.testing.assert_close(units.sum(), whole[0])


def test_the_whole_layer_by_kronecker_and_by_feedback(layer):
    _, error, factors, output = layer
    whole = kronecker_losses(error, output, factors.damped, (COLUMNS,))
    torch.testing.assert_close(
        whole, feedback_losses(error @ factors.unit, factors.pivots, (COLUMNS,), output) / 2, rtol=1e-4, atol=0
    )


def test_fisher_is_its_vector_form():
    error = torch.randn(3, 4, generator=generator(8)).double()
    gradients = torch.randn(7, 3, 4, generator=generator(9)).double()
    fisher = torch.einsum("bi,bj->ij", gradients.flatten(1), gradients.flatten(1)) / 7
    expected = error.flatten() @ fisher @ error.flatten() / 2
    torch.testing.assert_close(fisher_losses(error, gradients, (4,)), expected[None])


def test_fisher_by_hand():
    error = torch.tensor([[1.0, 2.0]])
    gradients = torch.tensor([[[1.0, 1.0]], [[3.0, -1.0]]])
    torch.testing.assert_close(fisher_losses(error, gradients, (1, 1)), torch.tensor([(1 + 9) / 4, (4 + 4) / 4]))
    torch.testing.assert_close(fisher_losses(error, gradients, (2,)), torch.tensor([(9 + 1) / 4]))


def test_losses_are_quadratic_in_the_error(layer):
    _, error, factors, output = layer
    gradients = torch.randn(5, ROWS, COLUMNS, generator=generator(10))
    for loss in (
        lambda e: kronecker_losses(e, output, factors.damped, WIDTHS),
        lambda e: fisher_losses(e, gradients, WIDTHS),
        lambda e: feedback_losses(e @ factors.unit, factors.pivots, WIDTHS),
    ):
        torch.testing.assert_close(loss(-2 * error), 4 * loss(error))


def test_fisher_of_many_independent_gradients_is_kronecker():
    # G = A^½ Z B^½ with white Z has the second moment A ⊗ B.
    error = torch.randn(2, 3, generator=generator(11)).double()
    output, inputs = (random_moment(size, generator(size)).double() for size in (2, 3))
    white = torch.randn(40_000, 2, 3, generator=generator(12)).double()
    gradients = torch.linalg.cholesky(output) @ white @ torch.linalg.cholesky(inputs).T
    torch.testing.assert_close(
        fisher_losses(error, gradients, (3,)), kronecker_losses(error, output, inputs, (3,)), rtol=0.03, atol=0
    )


def test_combination_by_hand_and_at_both_ends():
    by_loss, by_output = torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.2])
    torch.testing.assert_close(combine(by_loss, by_output, 8.0, 1.0), torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(combine(by_loss, by_output, 8.0, 0.0), torch.tensor([4.0, 4.0]))
    root = 3**0.5
    torch.testing.assert_close(combine(by_loss, by_output, 8.0), 8 * torch.tensor([1.0, root]) / (1 + root))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_combination_keeps_the_total_and_forgets_scales(weight):
    by_loss, by_output = (torch.rand(5, 4, generator=generator(seed)) for seed in (13, 14))
    total = torch.rand(5, generator=generator(15))
    found = combine(by_loss, by_output, total, weight)
    torch.testing.assert_close(found.sum(dim=-1), total)
    torch.testing.assert_close(combine(7 * by_loss, 0.01 * by_output, total, weight), found)
    torch.testing.assert_close(combine(by_loss[2], by_output[2], total[2], weight), found[2])


def test_a_unit_without_loss_in_one_metric_counts_only_where_that_metric_has_no_say():
    by_loss, by_output = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(combine(by_loss, by_output, 1.0, 0.5), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(combine(by_loss, by_output, 1.0, 0.0), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(combine(torch.zeros(2), torch.zeros(2), 0.0), torch.zeros(2))


def test_the_worst_modality_by_hand():
    losses = {"text": torch.tensor([1.0, 3.0]), "image": torch.tensor([30.0, 10.0])}
    torch.testing.assert_close(worst_modality(losses), torch.tensor([1.5, 1.5]))
    torch.testing.assert_close(worst_modality({"text": losses["text"]}), torch.tensor([0.5, 1.5]))
    louder = losses | {"image": 100 * losses["image"]}
    torch.testing.assert_close(worst_modality(louder), worst_modality(losses))
    silent = losses | {"sound": torch.zeros(2)}
    torch.testing.assert_close(worst_modality(silent), worst_modality(losses))


def test_the_average_modality_by_hand():
    losses = {"text": torch.tensor([1.0, 3.0]), "image": torch.tensor([30.0, 10.0])}
    torch.testing.assert_close(average_modality(losses, {"image": 1.0, "text": 3.0}), torch.tensor([8.25, 4.75]))
    torch.testing.assert_close(average_modality(losses, {"image": 0.0, "text": 0.2}), losses["text"])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fisher_losses(torch.ones(2, 4), torch.ones(1, 2, 4), (2, 1)), ShapeError, "add up to 4"),
        (lambda: fisher_losses(torch.ones(2, 4), torch.ones(0, 2, 4), (4,)), ShapeError, r"\[B, 2, 4\]"),
        (lambda: feedback_losses(torch.ones(2, 8), torch.ones(2, 4, 4), (2, 6)), ShapeError, "multiple of the vector"),
        (lambda: feedback_losses(torch.ones(2, 8), torch.ones(3, 4, 4), (8,)), ShapeError, "expected 3 pivots"),
        (lambda: local_losses(torch.ones(2, 4), torch.ones(1, 4, 4), 0.0, (4,)), NumericGateError, "positive number"),
        (lambda: combine(torch.ones(2), torch.ones(2), 1.0, 1.5), UsageError, "0 to 1, found 1.5"),
        (lambda: combine(torch.ones(2), torch.ones(3), 1.0), ShapeError, "one shape"),
        (lambda: combine(-torch.ones(2), torch.ones(2), 1.0), NumericGateError, "global losses"),
        (lambda: combine(torch.tensor([0.0, 1]), torch.tensor([1.0, 0]), 1.0), NumericGateError, "share in both"),
        (lambda: worst_modality({}), UsageError, "found none"),
        (lambda: worst_modality({"a": torch.ones(2), "b": torch.ones(3)}), ShapeError, "one shape"),
        (lambda: average_modality({"a": torch.ones(2)}, {"b": 1.0}), UsageError, "expected one for each of"),
        (lambda: average_modality({"a": torch.ones(2)}, {"a": 0.0}), UsageError, "positive sum"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
