"""Moments of layer inputs along the quantized prefix and beside full precision, against sums written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from toolchain.calibration.activations import collect_pairs, inputs_of, survey_inputs
from toolchain.calibration.gradients import collect_loss_statistics
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.calibration.moments import collect_moments
from toolchain.checkpoint.loading import load_model
from toolchain.errors import InputDataError
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.values import LayerSpec


class Case:
    """A tiny model, a twin whose weights are off by 10 %, its layers, three answered images and token weights."""

    def __init__(self, folder, manifest) -> None:
        config = read_config(folder)
        family = family_for(config)
        self.specs = [spec for spec in family.layers(config) if spec.kind != "embedding"]
        self.full = load_model(folder).requires_grad_(False)
        self.twin = copy.deepcopy(self.full)
        torch.manual_seed(0)
        for spec in self.specs:
            weight = self.twin.get_parameter(f"{spec.name}.weight")
            weight.add_(0.1 * weight.std() * torch.randn_like(weight))
        self.inputs = calibration_inputs(family.load_processor(folder), read_manifest(manifest)[:3])
        self.survey = survey_inputs(self.full, self.inputs, self.specs)
        self.asked = collect_loss_statistics(self.full, self.inputs, self.specs).token_weights

    def spec(self, ending) -> LayerSpec:
        return next(spec for spec in self.specs if spec.name.endswith(ending))

    def seen(self, model, spec) -> list[Tensor]:
        """float32[t, n] of every sample: the inputs of a linear layer that sees every position."""
        found = []
        handle = model.get_submodule(spec.name).register_forward_pre_hook(lambda _, x: found.append(x[0][0]))
        with torch.no_grad():
            for one in self.inputs:
                model(**one.tensors, use_cache=False)
        handle.remove()
        return found


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_internvl"])
def case(request, tiny_manifest):
    return Case(request.getfixturevalue(request.param), tiny_manifest)


@pytest.fixture(scope="module")
def drifted(case):
    """Of every group, the twin's inputs against full precision's."""
    return collect_pairs(case.twin, case.full, case.inputs, case.specs, case.asked)


def close(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Within `share` of the expected's largest entry."""
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def test_every_group_is_there_with_mass_1_in_two_halves(case, drifted):
    assert set(drifted) == {spec.group for spec in case.specs}
    for group, pairs in drifted.items():
        even, odd = pairs.halves
        assert pairs.whole.token_weight == pytest.approx(1, abs=1e-5), group
        assert even.token_weight == pytest.approx(
            sum(float(token_weight.sum()) for token_weight in case.asked[group][::2]), abs=1e-5
        )
        assert odd.token_weight == pytest.approx(float(case.asked[group][1].sum()), abs=1e-5)
        close(even.cross + odd.cross, pairs.whole.cross)


def test_questions_about_one_image_are_in_one_half(case):
    """Samples 0, 1, 0 again: two images, the second sample's alone in its half."""
    spec = case.spec("layers.0.mlp.down_proj")
    inputs, token_weight = [case.inputs[i] for i in (0, 0, 1)], case.asked[spec.group]
    token_weights = {spec.group: [token_weight[0], token_weight[0], token_weight[1]]}
    [pairs] = collect_pairs(case.full, None, inputs, [spec], token_weights).values()
    assert [half.token_weight for half in pairs.halves] == pytest.approx(
        [2 * float(token_weight[0].sum()), float(token_weight[1].sum())]
    )


@pytest.mark.parametrize("ending", ["layers.1.self_attn.v_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj"])
def test_sums_are_over_the_tokens_of_both_models(case, drifted, ending):
    """x_q from the model as it stands, x_f from full precision, token by token."""
    spec = next(one for one in case.specs if one.name.endswith(ending) and one.part == "language")
    rows, full = (torch.cat(case.seen(model, spec)) for model in (case.twin, case.full))
    token_weight = torch.cat(case.asked[spec.group])[:, None]
    whole = drifted[spec.group].whole
    close(whole.moment, rows.T @ (token_weight * rows))
    close(whole.cross, full.T @ (token_weight * rows))
    close(whole.mean, (token_weight * rows).sum(dim=0))
    close(whole.full_mean, (token_weight * full).sum(dim=0))
    assert float((whole.cross - whole.moment).norm() / whole.moment.norm()) > 1e-3, "the twin drifts"


def test_without_full_precision_there_is_no_drift(case):
    for pairs in collect_pairs(case.twin, None, case.inputs, case.specs, case.asked).values():
        for pair in (pairs.whole, *pairs.halves):
            assert torch.equal(pair.cross, pair.moment)
            assert torch.equal(pair.full_mean, pair.mean)


def test_a_copy_of_full_precision_has_no_drift(case):
    found = collect_pairs(copy.deepcopy(case.full), case.full, case.inputs, case.specs, case.asked)
    for pairs in found.values():
        close(pairs.whole.cross, pairs.whole.moment, 1e-6)
        close(pairs.whole.full_mean, pairs.whole.mean, 1e-6)


def test_what_comes_first_has_not_drifted(case, drifted):
    """Images reach the tower's first layer as they are, whatever was quantized."""
    first = next(spec for spec in case.specs if spec.part == "vision")
    close(drifted[first.group].whole.cross, drifted[first.group].whole.moment, 1e-6)


def test_one_sample_alone_has_no_second_half(case):
    spec = case.spec("layers.0.mlp.down_proj")
    [pairs] = collect_pairs(case.full, None, case.inputs[:1], [spec], case.asked).values()
    assert pairs.halves is None


def test_masses_of_other_samples_are_refused(case):
    spec = case.spec("layers.0.mlp.down_proj")
    wrong = {
        spec.group: [
            token_weight[:-1] if number == 1 else token_weight
            for number, token_weight in enumerate(case.asked[spec.group])
        ]
    }
    count = len(case.inputs[1].is_image)
    message = (
        rf"layer {spec.name}: sample 1 gave {count} inputs, its token weights are of {count - 1}; .* the same samples"
    )
    with pytest.raises(InputDataError, match=message):
        collect_pairs(case.full, None, case.inputs, [spec], wrong)


def test_the_head_is_seen_where_it_answers(case):
    head = next(spec for spec in case.specs if spec.part == "head")
    for one in case.inputs:
        assert len(inputs_of(case.full, one, {head.group: head})[head.group]) == one.answer_tokens + 1


def test_surveyed_masses_are_those_of_the_balanced_moment(case):
    """Half for either modality: the second moment is calibration's, for every layer but the head, seen elsewhere."""
    specs = [spec for spec in case.specs if spec.part != "head"]
    expected = collect_moments(case.full, case.inputs, specs)
    pairs = collect_pairs(case.full, None, case.inputs, specs, case.survey.token_weights)
    for spec in specs:
        close(pairs[spec.group].whole.moment, expected[spec.name].second_moment)


def test_surveyed_energies_are_the_diagonals(case):
    pairs = collect_pairs(case.full, None, case.inputs, case.specs, case.survey.token_weights)
    assert set(case.survey.energies) == set(pairs)
    for group, energies in case.survey.energies.items():
        close(energies, pairs[group].whole.moment.diagonal())


def test_surveyed_masses_sum_to_1(case):
    for group, token_weights in case.survey.token_weights.items():
        assert float(torch.cat(token_weights).sum()) == pytest.approx(1, abs=1e-5), group


def test_a_pass_ends_at_the_last_layer_asked_about(case):
    """The layer asked about is not run itself."""
    spec = case.spec("layers.0.mlp.down_proj")
    ran = []
    handles = [
        case.full.get_submodule(one.name).register_forward_hook(lambda module, *_: ran.append(module))
        for one in (spec, case.spec("layers.1.mlp.down_proj"), case.spec("layers.0.self_attn.o_proj"))
    ]
    inputs_of(case.full, case.inputs[0], {spec.group: spec})
    for handle in handles:
        handle.remove()
    assert ran == [case.full.get_submodule("model.language_model.layers.0.self_attn.o_proj")]


def test_no_hook_stays(case):
    assert not any(module._forward_pre_hooks for model in (case.full, case.twin) for module in model.modules())


def test_a_layer_that_no_input_reaches_is_refused(case):
    model = copy.deepcopy(case.full)
    model.unused = torch.nn.Linear(4, 4)
    spec = LayerSpec("unused", "vision", "linear", 4, 4, "unused", 0)
    with pytest.raises(InputDataError, match="layer unused: a calibration input does not reach it"):
        collect_pairs(model, None, case.inputs, [spec], {"unused": [torch.ones(1)] * 3})
    with pytest.raises(InputDataError, match="layer unused: a calibration input does not reach it"):
        survey_inputs(model, case.inputs, [spec])


def test_capped_surveys_count_a_sink_as_its_neighbours(case):
    """One token of a thousand times the norm weighs on token weights and energies like the highest-energy ordinary
    token.
    """
    name = case.spec("layers.1.self_attn.v_proj").name

    def hook(_, arguments):
        x = arguments[0].clone()
        x[0, 0] *= 1_000
        return (x,)

    handle = case.full.get_submodule(name.replace("v_proj", "q_proj")).register_forward_pre_hook(hook)
    try:
        plain = survey_inputs(case.full, case.inputs, case.specs)
        capped = survey_inputs(case.full, case.inputs, case.specs, norm_quantile=0.9)
    finally:
        handle.remove()
    group = case.spec("layers.1.self_attn.v_proj").group
    norms = torch.cat(capped.norms[group])
    token_weights = torch.cat(capped.token_weights[group])
    assert float(token_weights.sum()) == pytest.approx(1, abs=1e-5)
    loud = norms.argmax()
    assert float(token_weights[loud]) < 1e-3 * float(torch.cat(plain.token_weights[group])[loud])
    ordinary = float(norms.kthvalue(int(0.9 * len(norms))).values)
    assert float(capped.energies[group].sum()) < 2 * ordinary < float(plain.energies[group].sum())
    found = capped.capped(plain.token_weights, 0.9)[group]
    torch.testing.assert_close(torch.cat(found), token_weights)


def test_surveys_without_a_cap_keep_no_norms(case):
    assert case.survey.norms == {}
