from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from quantized_tiny import groups_of, quantized_tiny

from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.refine.kl_gradients import (
    KLGradients,
    decoded_leaves,
    divergence_of,
    inner_product,
    kl_gradients,
    newton_step,
    step_unit,
    teacher_scores,
)


@pytest.fixture(scope="module")
def tried(tiny_qwen2_vl, tiny_manifest):
    """A quantized tiny model with its teacher's answers and the gradients of all its layers."""
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    inputs = calibration_inputs(processor, read_manifest(tiny_manifest))
    model, specs, plan = quantized_tiny(tiny_qwen2_vl, "2,4,8")
    teacher = load_model(tiny_qwen2_vl).requires_grad_(False)
    scores = teacher_scores(teacher, inputs)
    names = [spec.name for layers in groups_of(specs).values() for spec in layers]
    gradients = kl_gradients(model, scores, inputs, range(6), names, torch.Generator().manual_seed(0))
    return SimpleNamespace(
        model=model, specs=specs, plan=plan, inputs=inputs, scores=scores, names=names, gradients=gradients
    )


def test_the_gradient_is_the_slope_of_the_divergence(tried):
    with keep_decoded(tried.model):
        assert tried.gradients.divergence == pytest.approx(
            divergence_of(tried.model, tried.scores, tried.inputs, range(6)), rel=1e-5
        )
    # The embedding, tied to the head, and the steepest of the others: float32 tells no slope of a layer that hardly
    # any loss reaches.
    steepest = sorted(tried.names[1:], key=lambda name: -float(tried.gradients.means[name].norm()))[:2]
    for name in (tried.names[0], *steepest):
        slope = tried.gradients.means[name]
        ends = []
        for sign in (1, -1):
            with decoded_leaves(tried.model, [name]) as leaves:
                length = 1e-2 * leaves[name].detach().norm() / slope.norm()
                with torch.no_grad():
                    leaves[name] += sign * length * slope
                ends.append(divergence_of(tried.model, tried.scores, tried.inputs, range(6)))
        measured = (ends[0] - ends[1]) / (2 * float(length))
        assert measured == pytest.approx(float(slope.square().sum()), rel=0.2)  # float32, of a divergence of 2e-3


def test_every_layer_gets_a_gradient_and_a_trace(tried):
    assert set(tried.gradients.means) == set(tried.names)
    assert all(float(tried.gradients.means[name].abs().max()) > 0 for name in tried.names)
    assert all(tried.gradients.traces[name] > 0 for name in tried.names)


def test_the_leaves_are_gone_afterwards(tried):
    with decoded_leaves(tried.model, tried.names[:1]):
        pass
    assert all(module._decoded is None for module in vq_modules(tried.model).values())


def test_a_model_that_is_its_teacher_has_no_gradient(tried):
    with keep_decoded(tried.model):
        own = teacher_scores(tried.model, tried.inputs)
    found = kl_gradients(tried.model, own, tried.inputs, range(3), tried.names[:4], torch.Generator().manual_seed(0))
    assert abs(found.divergence) < 1e-6
    sizes = [(float(found.means[n].norm()), float(tried.gradients.means[n].norm())) for n in tried.names[:4]]
    assert all(own_size < 1e-3 * size for own_size, size in sizes)


def newton_shifts(gradients, members, moments, factors, dampings):
    """Layer → its step, shortened with all the others."""
    steps = {
        spec.name: newton_step(gradients, spec, moments[group], factors.get(spec.name), dampings)
        for group, layers in members.items()
        for spec in layers
    }
    unit = step_unit(gradients.divergence, [inner_product(gradients.means[n], step) for n, step in steps.items()])
    return {name: unit * step for name, step in steps.items()}


def test_layers_taken_apart_get_the_gradients_they_get_together(tried):
    for names in (tried.names[:3], tried.names[3:9], tried.names[9:]):
        found = kl_gradients(tried.model, tried.scores, tried.inputs, range(6), names, torch.Generator().manual_seed(0))
        assert found.divergence == tried.gradients.divergence
        assert found.traces == {name: tried.gradients.traces[name] for name in names}
        assert all(torch.equal(found.means[name], tried.gradients.means[name]) for name in names)


@pytest.mark.parametrize("is_coupled", [True, False])
def test_shifts_go_down_and_promise_no_more_than_there_is(tried, is_coupled):
    members = groups_of(tried.specs)
    moments = {group: torch.eye(layers[0].columns) for group, layers in members.items()}
    factors = {s.name: torch.eye(s.rows) + 0.1 for layers in members.values() for s in layers} if is_coupled else {}
    shifts = newton_shifts(tried.gradients, members, moments, factors, (0.1, 0.1))
    inner = {name: float((tried.gradients.means[name] * shift).sum()) for name, shift in shifts.items()}
    assert all(value < 0 for value in inner.values())
    assert -0.5 * sum(inner.values()) <= tried.gradients.divergence * (1 + 1e-4)


def test_a_short_newton_step_is_taken_whole():
    spec = SimpleNamespace(name="layer", rows=3)
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gradients = KLGradients({"layer": gradient}, {"layer": 24.0}, divergence=1e9)
    shifts = newton_shifts(gradients, {"group": [spec]}, {"group": torch.eye(4)}, {}, (0.0, 0.0))
    torch.testing.assert_close(shifts["layer"], -gradient / 2)  # a trace of 24 over 12 weights: curvature 2


def test_a_layer_no_loss_reaches_stays():
    spec = SimpleNamespace(name="layer", rows=3)
    gradients = KLGradients({"layer": torch.zeros(3, 4)}, {"layer": 0.0}, divergence=0.5)
    shifts = newton_shifts(gradients, {"group": [spec]}, {"group": torch.eye(4)}, {}, (0.1, 0.1))
    assert torch.equal(shifts["layer"], torch.zeros(3, 4))
