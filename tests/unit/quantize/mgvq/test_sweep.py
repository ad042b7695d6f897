"""What the solver gives to the gate of descent: no gradient of an image that something was fitted to."""

from __future__ import annotations

import pytest
import torch

from toolchain.calibration.held_out import gate_samples
from toolchain.calibration.manifest import read_manifest
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.mgvq import sweep as drift_solver
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)


class _SeenEnoughError(Exception):
    pass


@pytest.fixture
def seen(monkeypatch):
    """Calls of what the solver collects, and what it gave to the gate of the first group."""
    found = {"pairs": [], "held_out": [], "gates": []}
    collect, statistics = drift_solver.collect_pairs, drift_solver.collect_loss_statistics

    def pairs(model, full, inputs, asked, token_weights):
        result = collect(model, full, inputs, asked, token_weights)
        found["pairs"].append((inputs, result))
        return result

    def gradients(model, inputs, asked, **settings):
        found["held_out"].append((inputs, settings["held_out"]))
        return statistics(model, inputs, asked, **settings)

    def gated(targets, fit, gate, *rest):
        found["gates"].append((fit, gate))
        raise _SeenEnoughError

    for name, call in (("collect_pairs", pairs), ("collect_loss_statistics", gradients), ("gated_group", gated)):
        monkeypatch.setattr(drift_solver, name, call)
    return found


@pytest.mark.parametrize("count", [6, 3])
def test_images_that_gate_descent_are_in_nothing_it_is_fitted_to(tiny_qwen2_vl, tiny_manifest, tmp_path, seen, count):
    """Two questions an image. With three images there is nothing to hold out: all samples serve for all."""
    samples = [one for one in read_manifest(tiny_manifest)[:count] for _ in range(2)]
    with pytest.raises(_SeenEnoughError):
        quantize_checkpoint(
            tiny_qwen2_vl,
            samples,
            tmp_path / "q",
            QuantizeSettings(method="mgvq-mix-drift-overlap+fisher+descent", options=FAST),
        )
    ((fit, gate),) = seen["gates"]
    inputs, held = seen["held_out"][-1]
    assert list(held) == gate_samples(inputs)
    assert all(len(own) == 2 * len(held) for own in gate.gradient_samples), "two drawn answers a held-out sample"
    whole_inputs, whole = seen["pairs"][-1]
    assert len(whole_inputs) == 2 * count
    group = next(g for g, pair in whole.items() if torch.equal(pair.whole.moment / pair.whole.token_weight, fit.moment))
    if count < 4:
        assert len(held) == 2 * count
        assert torch.equal(fit.fitted, fit.moment)
        assert not fit.is_coupled, "no sample is left for an output curvature"
        return
    fitted_inputs, fitted = seen["pairs"][-2]
    apart = {inputs[number].image_digest for number in held}
    assert len(apart) == 2
    assert {one.image_digest for one in fitted_inputs} == {one.image_digest for one in inputs} - apart
    assert torch.equal(fit.fitted, fitted[group].whole.moment / fitted[group].whole.token_weight)
    assert not torch.equal(fit.fitted, fit.moment)
    assert fit.is_coupled
