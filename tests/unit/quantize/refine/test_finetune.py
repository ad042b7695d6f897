"""Fine-tuning of a tiny quantized model: it gets nearer, stores what it computed, and comes out the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch
from heard_progress import Heard

from toolchain.calibration.gradients import answer_scores
from toolchain.calibration.held_out import refinement_split
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_model, load_quantized
from toolchain.checkpoint.modules import vq_modules
from toolchain.checkpoint.writing import write_quantized
from toolchain.errors import InputDataError, NumericGateError, UsageError
from toolchain.files.store import ObjectStore
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.refine.finetune import fine_tune
from toolchain.quantize.refine.finetune_loss import teacher_target
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.quantize.refine.finetune_state import packed, unpacked
from toolchain.values import BitPlan
from toolchain.vq.divergence import token_divergences
from toolchain.vq.weights import Options

# The tiny model's weights are random, so that its answers say little and little data is enough: rates may be high.
FAST = FineTuneSettings(epochs=3, batch=2, codebook_rate=1e-2, scale_rate=1e-2, kept_rate=1e-2, save_every=1)


@pytest.fixture(scope="module")
def quantized(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    """Folder of the tiny model with codebooks of both kinds. Read only."""
    folder = tmp_path_factory.mktemp("tuned") / "quantized"
    overrides = [("*", "4,8,8"), ("*mlp*", "2,6,6")]
    options = Options(rounds=1, lloyd_rounds=2, samples=2_000)
    samples = read_manifest(tiny_manifest)[:2]
    # Plain rounding: nothing but the format matters here, and much is left to gain.
    quantize_checkpoint(
        tiny_qwen2_vl,
        samples,
        folder,
        QuantizeSettings(method="nearest", bits=None, overrides=overrides, options=options),
    )
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_qwen2_vl):
    return load_model(tiny_qwen2_vl)


@pytest.fixture(scope="module")
def inputs(tiny_qwen2_vl, tiny_manifest):
    """Twelve samples of six images."""
    processor = family_for(open_checkpoint(tiny_qwen2_vl).config).load_processor(tiny_qwen2_vl)
    return calibration_inputs(processor, read_manifest(tiny_manifest) * 2)


@pytest.fixture(scope="module")
def tuned(quantized, teacher, inputs):
    """(a tuned model, its result, the states it saved). Read only."""
    model, states = load_quantized(quantized), []
    result = fine_tune(model, teacher, inputs, FAST, save=states.append)
    return model, result, states


def bytes_of(model) -> dict[str, bytes]:
    return {name: x.cpu().numpy().tobytes() for name, x in model.state_dict().items()}


def divergence(model, teacher, inputs) -> float:
    with torch.no_grad():
        found = [token_divergences(answer_scores(teacher, one), answer_scores(model, one)) for one in inputs]
    return float(torch.cat(found).double().mean())


def test_it_gets_nearer_on_all_samples_and_on_those_held_out(quantized, teacher, inputs, tuned):
    model, result, _ = tuned
    assert result.improved
    assert result.loss_after < result.loss_before
    assert divergence(model, teacher, inputs) < 0.8 * divergence(load_quantized(quantized), teacher, inputs)


def test_what_is_reported_is_what_the_model_does(teacher, inputs, quantized, tuned):
    model, result, _ = tuned
    _, held, images = refinement_split(inputs)
    apart = [inputs[i] for i in held]
    assert (result.held_out_images, result.held_out_samples) == (images, len(held)) == (1, 2)
    assert result.after == pytest.approx(divergence(model, teacher, apart), rel=1e-3)
    assert result.before == pytest.approx(divergence(load_quantized(quantized), teacher, apart), rel=1e-3)
    assert (result.history[0], min(result.history)) == (result.loss_before, result.loss_after)
    assert result.best_step % 5 == 0  # ten samples, two a step: the held-out images are looked at every five


def test_codes_and_matrices_stay_and_all_that_is_continuous_moves(quantized, tuned):
    model, start = tuned[0], load_quantized(quantized).state_dict()
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, start[name])}
    assert not any(name.endswith(".codes") for name in moved)
    assert not any(start[name].ndim > 1 for name in moved if not name.startswith("mgvq_tables."))
    assert {name for name in start if name.startswith("mgvq_tables.")} <= moved
    assert any("norm" in name for name in moved)
    assert any(name.endswith("proj.bias") for name in moved)
    assert any(name.endswith(".scales") for name in moved)


def test_the_stored_model_says_the_same_bit_for_bit(tuned, quantized, tiny_qwen2_vl, inputs, tmp_path):
    model = tuned[0]
    plan = BitPlan.from_json(json.loads((quantized / "bitplan.json").read_text()))
    write_quantized(model, open_checkpoint(tiny_qwen2_vl), tmp_path, plan, method="mgvq", calibration={})
    stored = load_quantized(tmp_path)
    with torch.no_grad():
        for one in inputs[:3]:
            assert torch.equal(answer_scores(stored, one), answer_scores(model, one))
    kept = {i.dtype for name, i in open_checkpoint(tmp_path).tensors.items() if "norm" in name or "bias" in name}
    assert kept == {"F16"}
    for module in vq_modules(model).values():
        assert bool((module.scales >= 0).all())
        assert module._decoded is None


def test_the_same_run_gives_the_same_bytes(quantized, teacher, inputs, tuned):
    model = load_quantized(quantized)
    assert fine_tune(model, teacher, inputs, FAST) == tuned[1]
    assert bytes_of(model) == bytes_of(tuned[0])


def test_another_seed_gives_another_model(quantized, teacher, inputs, tuned):
    model = load_quantized(quantized)
    fine_tune(model, teacher, inputs, replace(FAST, seed=1))
    assert bytes_of(model) != bytes_of(tuned[0])


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_run_that_goes_on_ends_in_the_same_bytes(quantized, teacher, inputs, tuned, step, tmp_path):
    """From the middle of an epoch, from its end, and after the first best state; the state through the store."""
    store = ObjectStore.open(tmp_path / "run", {})
    store.put("state", *packed(tuned[2][step - 1]))
    model, heard = load_quantized(quantized), Heard()
    state = unpacked(*store.get("state"))
    result = fine_tune(model, teacher, inputs, FAST, resume=state, progress=heard)
    assert heard.steps[0][0] == step + 1
    assert result == tuned[1]
    assert bytes_of(model) == bytes_of(tuned[0])


def test_the_state_of_another_run_is_refused(quantized, teacher, inputs, tuned):
    model = load_quantized(quantized)
    before = bytes_of(model)
    for change in (
        {"settings": dataclasses.replace(FAST, seed=1)},
        {"settings": dataclasses.replace(FAST, batch=3)},
        {"inputs": inputs[:10]},
        {"inputs": [dataclasses.replace(one, answer_tokens=1) for one in inputs]},
    ):
        arguments = {"inputs": inputs, "settings": FAST} | change
        with pytest.raises(UsageError, match="resume: expected the state of a run with these settings"):
            fine_tune(model, teacher, **arguments, resume=tuned[2][3])
    assert bytes_of(model) == before


def test_where_nothing_is_better_nothing_changes(quantized, teacher, inputs):
    model = load_quantized(quantized)
    before, wanted = bytes_of(model), [p.requires_grad for p in model.parameters()]
    wild = dataclasses.replace(FAST, epochs=2, codebook_rate=0.3, scale_rate=0.3, kept_rate=0.3)
    result = fine_tune(model, teacher, inputs, wild)
    assert not result.improved
    assert (result.after, result.loss_after, result.best_step) == (result.before, result.loss_before, 0)
    assert bytes_of(model) == before
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_it_ends_when_nothing_gets_better(quantized, teacher, inputs):
    wild = dataclasses.replace(FAST, epochs=9, patience=1, codebook_rate=0.3, scale_rate=0.3, kept_rate=0.3)
    assert fine_tune(load_quantized(quantized), teacher, inputs, wild).steps == 5


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model(quantized, teacher, inputs):
    model = load_quantized(quantized)
    norm = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
    norm.data[0] = math.inf
    before = bytes_of(model)
    with pytest.raises(NumericGateError, match="step 1: expected a finite loss, found nan; lower codebook_rate"):
        fine_tune(model, teacher, inputs, FAST)
    assert bytes_of(model) == before


def test_a_teacher_that_says_no_numbers_is_refused(quantized, teacher, inputs):
    """KL skips what the teacher never says, and would take NaN for that."""
    broken = copy.deepcopy(inputs[0])
    broken.tensors["pixel_values"].fill_(math.inf)
    with pytest.raises(NumericGateError, match="expected numbers from the full-precision model, found NaN"):
        fine_tune(load_quantized(quantized), teacher, [broken], FAST)


def test_what_cannot_be_tuned_is_refused(quantized, teacher, inputs):
    with pytest.raises(InputDataError, match="expected calibration inputs, found none"):
        fine_tune(load_quantized(quantized), teacher, [], FAST)
    with pytest.raises(UsageError, match="no quantized layer"):
        fine_tune(teacher, teacher, inputs, FAST)
    with pytest.raises(UsageError, match="epochs: expected at least 1, found 0"):
        FineTuneSettings(epochs=0)
    with pytest.raises(UsageError, match="warm_up: expected a share from 0 to below 1"):
        FineTuneSettings(warm_up=1.0)


def test_without_an_answer_the_next_token_counts(quantized, teacher, inputs):
    bare = [dataclasses.replace(one, answer_tokens=0) for one in inputs]
    for settings in (FAST, dataclasses.replace(FAST, text_weight=0.0)):
        target = teacher_target(teacher, bare[0], settings)
        assert target.answer == 1
        torch.testing.assert_close(target.log_probabilities[-1:], answer_scores(teacher, bare[0]))
        result = fine_tune(load_quantized(quantized), teacher, bare, settings)
        assert result.before == pytest.approx(
            divergence(load_quantized(quantized), teacher, [bare[i] for i in refinement_split(bare)[1]]), rel=1e-3
        )
