from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from heard_progress import Stops
from quantized_tiny import groups_of, quantized_tiny

from toolchain.calibration.activations import collect_pairs, survey_inputs
from toolchain.calibration.gradients import collect_loss_statistics
from toolchain.calibration.held_out import refinement_split
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.calibration.moments import collect_moments
from toolchain.checkpoint.loading import load_model
from toolchain.checkpoint.modules import keep_decoded, vq_modules
from toolchain.errors import InputDataError
from toolchain.files.store import ObjectStore
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.refine.kl_gradients import divergence_of, kl_gradients, newton_step, teacher_scores
from toolchain.quantize.refine.round_moves import (
    RoundOptions,
    moved_group,
    solution_of,
    store_weights,
    stored_weights,
    trusted_move,
    windows_of,
)
from toolchain.quantize.refine.rounds import Statistics, jacobi_round
from toolchain.values import CODES, SILENT, LayerSpec
from toolchain.values import groups_of as grouped
from toolchain.vq.weights import stack_group


def prepare(folder, manifest, code):
    """A quantized tiny model, its teacher's answers, and the moments of its groups."""
    processor = family_for(read_config(folder)).load_processor(folder)
    inputs = calibration_inputs(processor, read_manifest(manifest))
    scores = teacher_scores(load_model(folder).requires_grad_(False), inputs)
    model, specs, plan = quantized_tiny(folder, code)
    members = groups_of(specs)
    asked = [layers[0] for layers in members.values() if layers[0].kind != "embedding"]
    moments = {s.group: collect_moments(model, inputs, [s])[s.name].second_moment for s in asked}
    for group, layers in members.items():
        moments.setdefault(group, torch.eye(layers[0].columns))
    names = [spec.name for layers in members.values() for spec in layers]
    return SimpleNamespace(
        model=model, specs=specs, plan=plan, inputs=inputs, scores=scores, moments=moments, names=names
    )


@pytest.fixture(scope="module", params=["4,8,8", "2,4,8"])
def prepared(request, tiny_qwen2_vl, tiny_manifest):
    return prepare(tiny_qwen2_vl, tiny_manifest, request.param)


@pytest.fixture
def setting(prepared):
    """The prepared model, as it was before every test."""
    before = stored_weights(prepared.model, prepared.names)
    yield prepared
    store_weights(prepared.model, before, prepared.plan)


@pytest.fixture
def pieces(tmp_path):
    return ObjectStore(tmp_path / "run", {}).under("during.round.0")


def turn(setting, pieces, options=None, row_factors=None, specs=None):
    s, factors = setting, row_factors or {}
    known = Statistics(lambda specs: s.moments, lambda specs: factors, 1 << 20)
    return jacobi_round(s.model, s.scores, s.inputs, known, specs or s.specs, s.plan, pieces, options, seed=0)


def held_out(setting):
    with keep_decoded(setting.model):
        return divergence_of(setting.model, setting.scores, setting.inputs, refinement_split(setting.inputs)[1])


def stored_bytes(setting):
    found = stored_weights(setting.model, setting.names)
    return [t.numpy().tobytes() for w in found.values() for t in (w.codes, w.codebook, w.scales)]


def test_a_group_as_a_solution_decodes_to_its_modules(setting):
    modules = vq_modules(setting.model)
    for layers in groups_of(setting.specs).values():
        own = [modules[spec.name] for spec in layers]
        problem = stack_group(
            [m.dense(torch.float32) for m in own], torch.eye(own[0].columns), own[0].code, searches_paths=True
        )
        decoded = solution_of(own, problem).decode()
        for module, part in zip(own, decoded.split(problem.held), strict=True):
            assert torch.equal(part[: module.rows, : module.columns], module.dense(torch.float32))
        assert windows_of(own[0]).shape == (
            own[0].code.padded_shape(own[0].rows, 1)[0],
            problem.weight.shape[1] // own[0].code.vector,
        )


def test_a_round_leaves_the_model_no_further_from_its_teacher(setting, pieces):
    before = held_out(setting)
    kept = setting.model.state_dict().keys()
    result = turn(setting, pieces, RoundOptions(steps=(0.2, 1.0)))
    assert result.divergences[0.0] == pytest.approx(before, rel=1e-6)
    assert held_out(setting) == pytest.approx(min(result.divergences.values()), rel=1e-6)
    assert result.step == min(result.divergences, key=result.divergences.get)
    assert setting.model.state_dict().keys() == kept
    assert set(result.seconds) == {"gradients", "statistics", "shifts", "descent", "held out"}


def test_codes_change_no_more_than_the_cap_allows(setting, pieces):
    before = {name: windows_of(module) for name, module in vq_modules(setting.model).items()}
    result = turn(setting, pieces, RoundOptions(steps=(1.0,), cap=0.02))
    changed = [windows_of(module) != before[name] for name, module in vq_modules(setting.model).items()]
    assert result.changed <= 0.02
    assert sum(int(c.sum()) for c in changed) <= 0.02 * sum(c.numel() for c in changed)


def test_a_step_that_is_no_better_leaves_every_byte(setting, pieces, monkeypatch):
    """The judge is made to say so: whether a wild step is worse is for rounding to decide on so small a model."""
    before, said = stored_bytes(setting), iter([0.5, 0.7])
    monkeypatch.setattr("toolchain.quantize.refine.rounds.divergence_of", lambda *_: next(said))
    result = turn(setting, pieces, RoundOptions(steps=(1.0,), cap=1.0))
    assert result.divergences == {0.0: 0.5, 1.0: 0.7}
    assert (result.step, result.changed) == (0.0, 0.0)
    assert stored_bytes(setting) == before


def test_twice_the_same_bytes(tiny_qwen2_vl, tiny_manifest, tmp_path):
    found = []
    for number in range(2):
        own = prepare(tiny_qwen2_vl, tiny_manifest, "4,8,8")
        factors = {name: torch.eye(module.rows) + 0.2 for name, module in vq_modules(own.model).items()}
        pieces = ObjectStore(tmp_path / str(number), {}).under("round")
        turn(own, pieces, RoundOptions(steps=(0.4,)), factors)
        found.append(stored_bytes(own))
    assert found[0] == found[1]


def test_too_few_images_to_hold_one_out_are_refused(setting, pieces):
    few = SimpleNamespace(**{**vars(setting), "inputs": setting.inputs[:3] * 2})
    with pytest.raises(InputDataError, match="at least 4 different images, found 3; add images, or leave rounds"):
        turn(few, pieces)


def test_a_group_that_is_not_asked_is_left_alone(setting, pieces):
    left = setting.specs[-1].group
    mine = [s.name for s in setting.specs if s.group == left and not s.tied_to]
    before = {name: weights.codes.clone() for name, weights in stored_weights(setting.model, mine).items()}
    others = [spec for spec in setting.specs if spec.group != left]
    turn(setting, pieces, RoundOptions(steps=(0.2,)), specs=others)
    for name, weights in stored_weights(setting.model, mine).items():
        assert torch.equal(weights.codes, before[name])


def measured(setting, teacher):
    """Statistics collected when they are asked for, as a run collects them."""
    own, linears = setting, [spec for spec in setting.specs if spec.kind != "embedding" and not spec.tied_to]
    linears = [spec for spec in linears if spec.group != own.specs[0].group]
    token_weights = survey_inputs(teacher, own.inputs, linears).token_weights

    def moments(specs):
        pairs = collect_pairs(own.model, None, own.inputs, specs, token_weights)
        return {group: pair.whole.moment for group, pair in pairs.items()}

    def factors(specs):
        return collect_loss_statistics(teacher, own.inputs, specs, rows_up_to=128, seed=3).rows

    return Statistics(moments, factors, 128), linears


@pytest.fixture(scope="module")
def teacher(tiny_qwen2_vl):
    return load_model(tiny_qwen2_vl).requires_grad_(False)


def test_the_bytes_of_a_groups_statistics_are_counted():
    """Two layers of 3 and 5 outputs and 7 inputs, S_o of the first alone: 12 · 8 · 7 + 12 · 49 + 4 · 9."""
    members = [LayerSpec(f"layer{m}", "language", "linear", m, 7, "group", 0) for m in (3, 5)]
    assert Statistics(lambda specs: {}, lambda specs: {}, 4).held_bytes(members) == 672 + 588 + 36


@pytest.mark.parametrize("prepared", ["4,8,8"], indirect=True)
def test_layer_batches_change_no_bit(prepared, teacher, tmp_path):
    """All groups at once, several, and one at a time: the same codes, codebooks, scales and divergences."""
    found = []
    before = stored_weights(prepared.model, prepared.names)
    for size in (1 << 40, 1 << 20, 1):
        statistics, linears = measured(prepared, teacher)
        pieces = ObjectStore(tmp_path / str(size), {}).under("round")
        options = RoundOptions(steps=(0.4,), batch_bytes=size)
        own = prepared
        result = jacobi_round(own.model, own.scores, own.inputs, statistics, linears, own.plan, pieces, options, seed=0)
        found.append((stored_bytes(own), result.divergences, result.step, result.changed))
        store_weights(own.model, before, own.plan)
    assert found[0] == found[1] == found[2]
    assert found[0][2] > 0, "no step was taken: the test says little"


@pytest.mark.parametrize("prepared", ["4,8,8"], indirect=True)
def test_a_damaged_shift_is_made_again(prepared, teacher, tmp_path):
    """A round stopped while groups move, one of its shifts damaged since: the same bytes as one that was not."""
    own, before = prepared, stored_weights(prepared.model, prepared.names)
    statistics, linears = measured(own, teacher)
    options, found = RoundOptions(steps=(0.4,), batch_bytes=1 << 20), []

    def turned(folder, progress=SILENT):
        pieces = ObjectStore(tmp_path / folder, {}).under("round")
        arguments = (own.model, own.scores, own.inputs, statistics, linears, own.plan, pieces, options)
        return jacobi_round(*arguments, seed=0, progress=progress)

    turned("whole")
    found.append(stored_bytes(own))
    store_weights(own.model, before, own.plan)
    with pytest.raises(KeyboardInterrupt):
        turned("again", Stops(at=(2, "round: groups")))
    shift = next((tmp_path / "again").glob("round.shift.*.safetensors"))
    shift.write_bytes(shift.read_bytes()[:-1] + b"?")
    turned("again")
    found.append(stored_bytes(own))
    store_weights(own.model, before, own.plan)
    assert found[0] == found[1]


@pytest.mark.parametrize("prepared", ["4,8,8"], indirect=True)
def test_one_batchs_statistics_are_resident(prepared, teacher, tmp_path, monkeypatch):
    """No gradient, moment, curvature or shift of one group lives when the next one's are collected or it moves."""
    own, before = prepared, stored_weights(prepared.model, prepared.names)
    plain, linears = measured(own, teacher)
    seen, alive, moving = [], [], []

    def watched(found):
        seen.extend(weakref.ref(tensor) for tensor in found)
        return found

    def left():
        if any(one() is not None for one in seen):
            gc.collect()
        return sum(one() is not None for one in seen)

    def moments(specs):
        alive.append((len({spec.group for spec in specs}), left() - len(specs)))  # this layer batch's own G a layer
        found = plain.moments(specs)
        watched(found.values())
        return found

    def factors(specs):
        found = plain.row_factors(specs)
        watched(found.values())
        return found

    def gradients(*arguments):
        alive.append((1, left()))
        found = kl_gradients(*arguments)
        watched(found.means.values())
        return found

    def step(*arguments):
        return watched([newton_step(*arguments)])[0]

    def moved(*arguments, **others):
        moving.append(left())
        return moved_group(*arguments, **others)

    for name, function in (("kl_gradients", gradients), ("newton_step", step), ("moved_group", moved)):
        monkeypatch.setattr(f"toolchain.quantize.refine.rounds.{name}", function)
    pieces = ObjectStore(tmp_path / "run", {}).under("round")
    options = RoundOptions(steps=(0.4,), batch_bytes=1)
    statistics = Statistics(moments, factors, 128)
    jacobi_round(own.model, own.scores, own.inputs, statistics, linears, own.plan, pieces, options, seed=0)
    store_weights(own.model, before, own.plan)
    groups = len(grouped(linears))
    assert alive == [(1, 0)] * (2 * groups), "one group a layer_batch, and nothing of the one before"
    assert moving == [0] * groups, "what moves comes from its piece"
    assert len(seen) >= 3 * groups
    assert not list((tmp_path / "run").glob("round.shift.*")), "shifts go as their groups have moved"


def test_what_is_stored_is_what_the_model_computes_with(setting):
    before = stored_weights(setting.model, setting.names)
    moved = {
        name: type(w)(w.code, w.rows, w.columns, w.codes.roll(7), w.codebook, w.scales) for name, w in before.items()
    }
    first = held_out(setting)
    store_weights(setting.model, moved, setting.plan)
    second = held_out(setting)
    store_weights(setting.model, before, setting.plan)
    assert held_out(setting) == first != second


def test_a_move_is_no_longer_than_it_is_trusted_worked_by_hand():
    """tr(Ŵ S Ŵᵀ) = 4 · 2 · 9 = 72; of (2,4,8) 0.0823 is lost, and 0.3² of that may be moved: 0.533304."""
    weight, moment = torch.full((4, 2), 3.0), torch.eye(2)
    long, short = torch.full((4, 2), 1.0), torch.full((4, 2), 0.25)
    kept = trusted_move(weight, long, moment, CODES["2,4,8"])
    assert float(kept.square().sum()) == pytest.approx(0.0823 * 0.09 * 72)
    torch.testing.assert_close(kept / kept[0, 0], long)
    assert trusted_move(weight, short, moment, CODES["2,4,8"]) is short
