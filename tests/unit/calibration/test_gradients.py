"""What backward passes leave behind, against autograd's own weight gradients and the model's real loss."""

from __future__ import annotations

import copy

import pytest
import torch
from heard_progress import Heard
from torch import Tensor

from toolchain.calibration.gradients import answer_scores, collect_loss_statistics, draw_labels
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model
from toolchain.errors import InputDataError
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.values import LayerSpec
from toolchain.vq.curvature import balanced_token_weights, unit_mean
from toolchain.vq.divergence import token_divergences

SEED = 7
# One of every kind: image patches, a tower's linear, both ends of the decoder, and the head.
ENDINGS = (
    "patch_embed.proj",
    "patch_embeddings.projection",
    "linear_2",
    "merger.mlp.0",
    "layers.0.self_attn.q_proj",
    "layers.1.mlp.down_proj",
    "lm_head",
)


class Case:
    """A tiny model whose parameters need no gradient, its layers, and three answered images."""

    def __init__(self, folder, manifest) -> None:
        config = read_config(folder)
        family = family_for(config)
        self.specs = family.layers(config)
        self.linears = [spec for spec in self.specs if spec.kind != "embedding"]
        self.model = load_model(folder).requires_grad_(False)
        self.inputs = calibration_inputs(family.load_processor(folder), read_manifest(manifest)[:3])

    def spec(self, ending):
        return next(spec for spec in self.specs if spec.name.endswith(ending))

    def untied(self):
        """Layers of ENDINGS whose weight nothing else reads: five of a family without ties, four with."""
        return [spec for spec in self.linears if spec.name.endswith(ENDINGS) and not spec.tied_to]

    def moved_scores(self, spec, difference: Tensor) -> Tensor:
        """`answer_scores` of the first sample with W + `difference` in place of W, which is put back."""
        weight = self.weight(spec)
        kept = weight.clone()
        weight.add_(difference.reshape(weight.shape))
        with torch.no_grad():
            scores = answer_scores(self.model, self.inputs[0])
        weight.copy_(kept)
        return scores

    def collect(self, specs, inputs=None, **options):
        return collect_loss_statistics(self.model, inputs or self.inputs, specs, **{"seed": SEED, **options})

    def weight(self, spec) -> Tensor:
        return self.model.get_parameter(f"{spec.name}.weight")

    def losses(self, generator=None):
        """The mean cross entropy of every sample's drawn answer, labels as `collect` draws them."""
        generator = torch.Generator().manual_seed(SEED)
        for one in self.inputs:
            scores = answer_scores(self.model, one)
            yield -scores.gather(1, draw_labels(scores.detach(), 1, generator)).mean()

    def autograd(self, spec) -> list[Tensor]:
        """∂loss/∂W float32[m, n] of every sample."""
        weight = self.weight(spec).requires_grad_(True)
        try:
            return [torch.autograd.grad(loss, weight)[0].flatten(1) for loss in self.losses()]
        finally:
            weight.requires_grad_(False)


@pytest.fixture(scope="module", params=["tiny_qwen2_vl", "tiny_internvl"])
def case(request, tiny_manifest):
    return Case(request.getfixturevalue(request.param), tiny_manifest)


@pytest.fixture(scope="module")
def found(case):
    """gradient samples of every sample, of every layer."""
    return case.collect(case.specs, held_out=range(3))


def whole(gradient_sample) -> Tensor:
    return gradient_sample.outputs.T @ gradient_sample.inputs


def close(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    """Within `share` of the expected's largest entry."""
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def difference_like(weight: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(weight.flatten(1).shape, generator=torch.Generator().manual_seed(seed))


def test_answers_are_scored_where_the_model_says_them(case):
    """At each answer token's predecessor, the stop token included."""
    for one in case.inputs:
        assert one.answer_tokens > 1
        with torch.no_grad():
            logits = case.model(**one.tensors, use_cache=False).logits[0]
            scores = answer_scores(case.model, one)
        expected = torch.log_softmax(logits.float(), dim=-1)[-one.answer_tokens - 1 : -1]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_without_an_answer_the_next_token_is_scored(case):
    one = case.inputs[0]
    asked = type(one)(one.tensors, one.is_image, 0)
    with torch.no_grad():
        logits = case.model(**one.tensors, use_cache=False).logits[0]
        scores = answer_scores(case.model, asked)
    torch.testing.assert_close(scores, torch.log_softmax(logits[-1:].float(), dim=-1), rtol=1e-4, atol=1e-4)


def test_labels_are_drawn_as_often_as_the_model_says_them():
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]])
    labels = draw_labels(probabilities.log(), 20_000, torch.Generator().manual_seed(0))
    for row, expected in zip(labels, probabilities, strict=True):
        torch.testing.assert_close(row.bincount(minlength=4) / 20_000, expected, rtol=0, atol=0.02)


def test_every_layer_is_seen_once_a_sample(case, found):
    assert set(found.gradient_samples) == {spec.name for spec in case.specs}
    assert {len(gradient_samples) for gradient_samples in found.gradient_samples.values()} == {3}
    assert set(found.token_weights) == {spec.group for spec in case.linears}


def test_probes_are_the_weight_gradients(case, found):
    for spec in case.untied():
        for gradient_sample, expected in zip(found.gradient_samples[spec.name], case.autograd(spec), strict=True):
            close(whole(gradient_sample), expected)
            difference = difference_like(expected)
            inner = float((expected.double() * difference).sum())
            scale = float(expected.norm() * difference.norm()) / expected.numel() ** 0.5
            assert gradient_sample.product(difference) == pytest.approx(inner, abs=1e-3 * scale)


def test_embedding_and_head_share_what_the_tied_weight_is_asked(case, found):
    """⟨G, E⟩ of one weight read at both ends is the sum of both gradient samples; of an embedding alone its own."""
    embedding = next(spec for spec in case.specs if spec.kind == "embedding")
    ends = [embedding, *(spec for spec in case.specs if spec.tied_to == embedding.name)]
    gradients = case.autograd(embedding)
    difference = difference_like(gradients[0])
    for number, gradient in enumerate(gradients):
        inner = float((gradient.double() * difference).sum())
        assert sum(found.gradient_samples[end.name][number].product(difference) for end in ends) == pytest.approx(
            inner, rel=1e-3
        )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_masses_of_every_group_sum_to_1(case, power):
    token_weights = case.collect(case.linears, power=power).token_weights
    for group, parts in token_weights.items():
        assert len(parts) == len(case.inputs)
        assert float(torch.cat(parts).sum()) == pytest.approx(1, abs=1e-5), group
        assert float(torch.cat(parts).min()) >= 0


@pytest.mark.parametrize("ending", ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"])
def test_masses_follow_the_gradients_of_all_members(case, found, ending):
    """s_t = ‖δ_t‖² / m over the outputs of all layers that read the input; images and text of all samples."""
    spec = next(one for one in case.linears if one.name.endswith(ending) and one.part == "language")
    members = [one for one in case.linears if one.group == spec.group]
    stacked = [torch.cat([found.gradient_samples[one.name][b].outputs for one in members], dim=1) for b in range(3)]
    norms = torch.cat(stacked).square().mean(dim=1)
    expected = balanced_token_weights(norms, torch.cat([one.is_image for one in case.inputs]))
    close(torch.cat(found.token_weights[spec.group]), expected)


def test_masses_of_the_head_are_those_of_its_answers(case, found):
    """The position after the last answer token is read by the head and asked nothing."""
    head = next(spec for spec in case.linears if spec.part == "head")
    for one, token_weight in zip(case.inputs, found.token_weights[head.group], strict=True):
        assert len(token_weight) == one.answer_tokens + 1
        assert float(token_weight[-1]) == 0
        assert float(token_weight[:-1].min()) > 0


def test_output_curvature_is_the_mean_of_the_outer_products(case, found):
    """E[G_b G_bᵀ] over the samples, mean diagonal 1, for layers with more and with fewer columns than tokens."""
    specs = [spec for spec in case.linears if spec.rows <= 128]
    rows = case.collect(case.linears, rows_up_to=128).rows
    assert set(rows) == {spec.name for spec in specs}
    few = {len(found.gradient_samples[spec.name][0].inputs) <= spec.columns for spec in specs}
    assert few == {True, False}, "both ways of forming it"
    for spec in specs:
        products = torch.stack(
            [whole(gradient_sample) @ whole(gradient_sample).T for gradient_sample in found.gradient_samples[spec.name]]
        )
        close(rows[spec.name], unit_mean(products.mean(dim=0)))
        assert float(rows[spec.name].diagonal().mean()) == pytest.approx(1, rel=1e-4)


def test_held_out_samples_stay_out_of_the_output_curvature(case, found):
    spec = case.spec("layers.1.self_attn.o_proj")
    part = case.collect([spec], rows_up_to=128, held_out=[1])
    products = torch.stack([whole(found.gradient_samples[spec.name][b]) for b in (0, 2)])
    close(part.rows[spec.name], unit_mean((products @ products.mT).mean(dim=0)))
    [gradient_sample] = part.gradient_samples[spec.name]
    close(whole(gradient_sample), whole(found.gradient_samples[spec.name][1]))


def test_several_draws_are_averaged(case):
    """gradient samples of every draw are kept; token weights are of the mean of their squares."""
    spec = case.spec("layers.1.mlp.down_proj")
    drawn = case.collect([spec], held_out=range(3), draws=4)
    gradient_samples = drawn.gradient_samples[spec.name]
    assert len(gradient_samples) == 12
    norms = [
        torch.stack([p.outputs.square().mean(dim=1) for p in gradient_samples[4 * b : 4 * b + 4]]).mean(dim=0)
        for b in range(3)
    ]
    expected = balanced_token_weights(torch.cat(norms), torch.cat([one.is_image for one in case.inputs]))
    close(torch.cat(drawn.token_weights[spec.group]), expected)


def test_a_step_along_the_gradient_changes_the_loss_as_predicted(case, found):
    """First order: ℓ(W + εG) − ℓ(W − εG) = 2ε⟨G, G⟩, on one sample with its drawn labels fixed."""
    with torch.no_grad():
        scores = answer_scores(case.model, case.inputs[0])
    labels = draw_labels(scores, 1, torch.Generator().manual_seed(SEED))
    for spec in case.untied():
        gradient_sample = found.gradient_samples[spec.name][0]
        gradient = whole(gradient_sample)
        length = float(gradient.square().sum())
        step = min(0.01 * float(case.weight(spec).norm()) / length**0.5, 0.01 / length)
        above, below = (
            -case.moved_scores(spec, sign * step * gradient).double().gather(1, labels).mean() for sign in (1, -1)
        )
        assert float(above - below) == pytest.approx(2 * step * gradient_sample.product(gradient), rel=0.02), spec.name


@pytest.mark.parametrize("ending", ["layers.1.mlp.down_proj", "layers.1.self_attn.v_proj"])
def test_drawn_gradients_are_the_curvature_of_the_divergence(case, ending):
    """Second order and its scale (equation 5): mean KL of an answer token = ½ T E_b⟨G_b, E⟩², E_b⟨G_b, E⟩ = 0.

    E is as long as makes the prediction 1e-4 nats: far above float32's rounding, far below where third order counts.
    """
    spec = next(one for one in case.linears if one.name.endswith(ending) and one.part == "language")
    one, draws = case.inputs[0], 400
    gradient_samples = case.collect([spec], [one], held_out=[0], draws=draws).gradient_samples[spec.name]
    difference = difference_like(case.weight(spec))
    products = torch.tensor([gradient_sample.product(difference) for gradient_sample in gradient_samples])
    predicted = 0.5 * one.answer_tokens * float(products.square().mean())
    with torch.no_grad():
        before = answer_scores(case.model, one)
    after = case.moved_scores(spec, (1e-4 / predicted) ** 0.5 * difference)
    real = float(token_divergences(before, after).mean())
    assert real == pytest.approx(1e-4, rel=0.25)  # the variance of 400 draws is known to 7 %
    assert abs(float(products.mean())) < 4 * float(products.std()) / draws**0.5


def test_the_seed_is_all_that_is_random(case):
    spec = case.spec("layers.1.mlp.down_proj")
    first, again, other = (
        case.collect([spec], held_out=[0], seed=seed).gradient_samples[spec.name][0] for seed in (3, 3, 4)
    )
    assert torch.equal(first.outputs, again.outputs)
    assert not torch.equal(first.outputs, other.outputs)


def test_no_hook_and_no_gradient_stays(case, found):
    """transformers keeps hooks of its own: no more than before."""

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in case.model.modules())

    before = hooks()
    case.collect(case.specs)
    assert hooks() == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in case.model.parameters())


def test_progress_is_told(case):
    heard = Heard()
    case.collect([case.spec("layers.1.mlp.down_proj")], progress=heard)
    assert heard.steps == [(done, 3, "gradients") for done in (1, 2, 3)]


def test_a_layer_that_no_loss_reaches_is_refused(case):
    """Left alone, tokens of one sample would be taken for another's."""
    model = copy.deepcopy(case.model)
    model.unused = torch.nn.Linear(4, 4)
    spec = LayerSpec("unused", "vision", "linear", 4, 4, "unused", 0)
    with pytest.raises(InputDataError, match="layer unused: the loss of 0 of 3 calibration inputs reaches it"):
        collect_loss_statistics(model, case.inputs, [case.spec("layers.1.mlp.down_proj"), spec])


@pytest.mark.parametrize("ending", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_probes_tell_modalities_and_columns_apart(case, ending):
    """⟨G, E⟩ is the sum of what text and image tokens give, and of what the columns give."""
    spec = next(one for one in case.linears if one.name.endswith(ending) and one.part == "language")
    (gradient_sample, *_) = case.collect([spec], held_out=range(3)).gradient_samples[spec.name]
    assert torch.equal(gradient_sample.is_image, case.inputs[0].is_image)
    error = torch.randn(spec.rows, spec.columns, generator=torch.Generator().manual_seed(0))
    whole = gradient_sample.product(error)
    parts = [
        gradient_sample.of_tokens(marks).product(error)
        for marks in (gradient_sample.is_image, ~gradient_sample.is_image)
    ]
    assert sum(parts) == pytest.approx(whole, rel=1e-4, abs=1e-7)
    columns = gradient_sample.by_column(error)
    assert columns.shape == (spec.columns,)
    error[:, 5:] = 0
    assert float(columns[:5].sum()) == pytest.approx(gradient_sample.product(error), rel=1e-4, abs=1e-7)


def test_probes_outside_the_decoder_are_of_one_kind(case):
    spec = next(one for one in case.linears if one.part == "vision" and one.kind == "linear")
    assert case.collect([spec], held_out=[0]).gradient_samples[spec.name][0].is_image is None
