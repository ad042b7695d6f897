"""What a layer loses on held-out inputs, against moments written out, modality by modality."""

from __future__ import annotations

import copy

import pytest
import torch

from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.calibration.moments import collect_moments
from toolchain.checkpoint.loading import load_model
from toolchain.errors import ShapeError, UsageError
from toolchain.evaluate.layer_errors import layer_errors, worst_layers
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for


class Case:
    """A tiny model, a twin whose weights are off by 10 %, its layers and its inputs."""

    def __init__(self, folder, manifest) -> None:
        config = read_config(folder)
        family = family_for(config)
        self.specs = family.layers(config)
        self.dense = load_model(folder)
        self.other = copy.deepcopy(self.dense)
        torch.manual_seed(0)
        with torch.no_grad():
            for spec in self.specs:
                if not spec.tied_to:
                    weight = self.other.get_parameter(f"{spec.name}.weight")
                    weight.add_(0.1 * weight.std() * torch.randn_like(weight))
        self.inputs = calibration_inputs(family.load_processor(folder), read_manifest(manifest)[:3])

    def weights(self, spec):
        """(W, E) float32[m, n]."""
        weight, other = (m.get_submodule(spec.name).weight.detach().flatten(1) for m in (self.dense, self.other))
        return weight, weight - other

    def spec(self, ending):
        return next(spec for spec in self.specs if spec.name.endswith(ending))


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_internvl"])
def case(request, tiny_manifest):
    return Case(request.getfixturevalue(request.param), tiny_manifest)


@pytest.fixture(scope="module")
def found(case):
    return {error.name: error for error in layer_errors(case.dense, case.other, case.inputs, case.specs)}


def trace(matrix, moment):
    return float(((matrix.double() @ moment.double()) * matrix).sum())


def inputs_of(case, spec):
    """(x float32[t, n], is_image bool[t]) of a linear layer, all forward passes after one another."""
    seen = []
    handle = case.dense.get_submodule(spec.name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for one in case.inputs:
            case.dense(**one.tensors, use_cache=False)
    handle.remove()
    return torch.cat(seen), torch.cat([one.is_image for one in case.inputs])


def test_every_layer_is_measured_in_order(case, found):
    assert list(found) == [spec.name for spec in case.specs]


def test_both_is_the_trace_over_the_balanced_moment(case, found):
    """With the moments of calibration, whose modalities weigh the same, for every layer that has one."""
    linears = [spec for spec in case.specs if spec.kind != "embedding"]
    moments = collect_moments(case.dense, case.inputs, linears)
    for spec in linears:
        weight, off = case.weights(spec)
        moment = moments[spec.name].second_moment
        assert found[spec.name].both == pytest.approx(trace(off, moment) / trace(weight, moment), rel=1e-3)


@pytest.mark.parametrize("ending", ["layers.1.self_attn.v_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj"])
def test_modalities_are_the_traces_over_their_own_moments(case, found, ending):
    spec = next(spec for spec in case.specs if spec.name.endswith(ending) and spec.part == "language")
    x, is_image = inputs_of(case, spec)
    weight, off = case.weights(spec)
    for chosen, value in ((~is_image, found[spec.name].text), (is_image, found[spec.name].image)):
        moment = x[chosen].T @ x[chosen] / int(chosen.sum())
        assert value == pytest.approx(trace(off, moment) / trace(weight, moment), rel=1e-3)


def test_modalities_that_do_not_reach_a_layer_are_none(found):
    for error in found.values():
        has_text, has_image = error.text is not None, error.image is not None
        assert has_text == (error.part in ("language", "embedding", "head"))
        assert has_image == (error.part in ("language", "vision", "projector"))
        assert error.both > 0


def test_an_embedding_is_measured_by_the_rows_that_are_read(case, found):
    spec = case.spec("embed_tokens")
    weight, off = case.weights(spec)
    ids = torch.cat([one.tensors["input_ids"][0][~one.is_image] for one in case.inputs])
    expected = float(off[ids].square().sum() / weight[ids].square().sum())
    assert found[spec.name].text == pytest.approx(expected, rel=1e-4)


def test_an_error_at_one_modality_shows_at_that_modality_alone(case):
    """E is put where the image positions' inputs have nothing: only text pays."""
    spec = case.spec("layers.1.self_attn.o_proj")
    x, is_image = inputs_of(case, spec)
    _, _, basis = torch.linalg.svd(x[is_image].double(), full_matrices=True)
    twin = copy.deepcopy(case.dense)
    quiet = basis[-1].float()  # the direction in which images say the least
    with torch.no_grad():
        twin.get_parameter(f"{spec.name}.weight").add_(torch.outer(0.01 * torch.ones(spec.rows), quiet))
    [error] = layer_errors(case.dense, twin, case.inputs, [spec])
    assert error.image < 0.2 * error.text


def test_the_same_weights_lose_nothing(case):
    for error in layer_errors(case.dense, case.dense, case.inputs, case.specs):
        assert error.both == 0


def test_no_hook_stays(case):
    layer_errors(case.dense, case.other, case.inputs[:1], case.specs)
    assert not any(module._forward_pre_hooks for module in case.dense.modules())


def test_another_shape_is_refused(case):
    twin = copy.deepcopy(case.dense)
    spec = case.spec("layers.0.self_attn.o_proj")
    twin.get_submodule(spec.name).weight = torch.nn.Parameter(torch.zeros(3, spec.columns))
    with pytest.raises(ShapeError, match=r"o_proj: expected a weight of .* found \[3, "):
        layer_errors(case.dense, twin, case.inputs, [spec])


def test_channels_in_another_order_are_refused(case):
    twin = copy.deepcopy(case.dense)
    spec = case.spec("layers.0.mlp.down_proj")
    with torch.no_grad():
        weight = twin.get_parameter(f"{spec.name}.weight")
        weight.copy_(weight[:, torch.randperm(spec.columns, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(UsageError, match=r"down_proj: expected a quantized form .* same order"):
        layer_errors(case.dense, twin, case.inputs, [spec])


def test_the_worst_layers_of_every_part():
    layers = [{"name": str(i), "part": part, "error_both": error} for i, (part, error) in enumerate(
        [("vision", 0.1), ("language", 0.2), ("vision", 0.3), ("vision", 0.2), ("head", None)]
    )]  # fmt: skip
    assert [layer["name"] for layer in worst_layers(layers)] == ["1", "2", "3"]
    assert [layer["name"] for layer in worst_layers(layers, count=1)] == ["1", "2"]
