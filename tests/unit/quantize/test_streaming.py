"""The sweep over a model holds one step's statistics at a time, and adds them up in float32."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from toolchain.calibration.activations import collect_pairs, inputs_of, survey_inputs
from toolchain.calibration.gradients import LossStatistics
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize import checkpoint as quantizing
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.mgvq import sweep as drift_solver
from toolchain.values import groups_of
from toolchain.vq.drift import PairMoments
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)


@pytest.fixture
def alive(monkeypatch):
    """How many objects of a class that were made since it was first asked about are still there."""
    made: dict[type, list[weakref.ref]] = {}

    def watch(kind: type) -> None:
        plain, made[kind] = kind.__init__, []

        def noted(self, *arguments, **settings) -> None:
            plain(self, *arguments, **settings)
            made[kind].append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)

    def left(kind: type) -> list:
        if kind not in made:
            watch(kind)
        if any(one() is not None for one in made[kind]):
            gc.collect()  # what only a circle holds is as good as gone
        return [found for one in made[kind] if (found := one()) is not None]

    return left


def test_one_steps_moments_and_curvatures_are_resident(tiny_qwen2_vl, tiny_manifest, tmp_path, monkeypatch, alive):
    assert alive(PairMoments) == alive(LossStatistics) == []
    begun, steps, shifts = [], [], []
    collect, shift = drift_solver.collect_pairs, drift_solver.gated_shift

    def collected(model, full, inputs, asked, token_weights):
        begun.append((len(alive(PairMoments)), sum(len(one.rows) for one in alive(LossStatistics))))
        steps.append(len(groups_of(asked)))
        return collect(model, full, inputs, asked, token_weights)

    def shifted(*arguments):
        shifts.append((len(alive(PairMoments)), steps[-1]))
        return shift(*arguments)

    monkeypatch.setattr(drift_solver, "collect_pairs", collected)
    monkeypatch.setattr(drift_solver, "gated_shift", shifted)
    out, samples = tmp_path / "q", read_manifest(tiny_manifest)[:2]
    quantizing.quantize_checkpoint(
        tiny_qwen2_vl, samples, out, QuantizeSettings(method="mgvq-mix-overlap+fisher+descent", options=FAST)
    )
    assert len(begun) > 4
    assert set(begun) == {(0, 0)}, "the last step's are gone before the next one's are collected"
    assert shifts
    assert all(found <= expected for found, expected in shifts)


def test_baselines_hold_one_steps_moments(tiny_qwen2_vl, tiny_manifest, tmp_path, monkeypatch, alive):
    assert alive(quantizing.MomentSolver) == []
    resident = []
    taken = quantizing.layer_moments

    def watched(*arguments):
        resident.append([len(one.moments) for one in alive(quantizing.MomentSolver)])
        return taken(*arguments)

    monkeypatch.setattr(quantizing, "layer_moments", watched)
    quantizing.quantize_checkpoint(
        tiny_qwen2_vl, read_manifest(tiny_manifest)[:2], tmp_path / "q", QuantizeSettings(method="rtn")
    )
    assert len(resident) > 4
    assert all(held == [0] for held in resident)


def test_moments_of_a_16_bit_model_are_added_up_in_float32(tiny_qwen2_vl, tiny_manifest):
    """Against float64 sums of the very inputs: sums in bfloat16 would be wrong in the third digit."""
    model = load_model(tiny_qwen2_vl).to(torch.bfloat16)
    family = family_for(read_config(tiny_qwen2_vl))
    inputs = copy.deepcopy(calibration_inputs(family.load_processor(tiny_qwen2_vl), read_manifest(tiny_manifest)[:4]))
    for one in inputs:
        one.tensors.update({k: t.to(torch.bfloat16) for k, t in one.tensors.items() if t.is_floating_point()})
    asked = [s for s in family.layers(read_config(tiny_qwen2_vl)) if s.name.endswith("down_proj")]
    token_weights = survey_inputs(model, inputs, asked).token_weights
    pairs = collect_pairs(model, None, inputs, asked, token_weights)
    for group, members in groups_of(asked).items():
        rows = [inputs_of(model, one, {group: members[0]})[group].double() for one in inputs]
        expected = sum((x * w.double()[:, None]).T @ x for x, w in zip(rows, token_weights[group], strict=True))
        found = pairs[group].whole.moment
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        rounded = sum(
            ((x * w[:, None]).bfloat16().T @ x.bfloat16()).double() for x, w in zip(rows, token_weights[group])
        )
        assert float((rounded - expected).norm() / expected.norm()) > 1e-4, "the bound above would see it"
