"""Gradients of a decoded weight against autograd of the obvious decoder; rounding; what is used is what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vq_samples import TinyModel, fill

from toolchain.checkpoint.modules import VQLinear, decode_weight
from toolchain.quantize.refine.lookup import (
    TunedWeights,
    lookup_indices,
    rounded_codebook,
    rounded_to,
    scaled_lookup,
    straight_through,
    sum_by_entry,
)
from toolchain.values import CODES, VQCode
from toolchain.vq import format as vq_format


def filled(code: VQCode, rows: int, columns: int, seed: int = 0) -> VQLinear:
    return fill(VQLinear(code, rows, columns, "t0", torch.float32), np.random.default_rng(seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CODES)), st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32))
def test_the_lookup_is_the_format_bit_for_bit(name, rows, columns, seed):
    module = filled(CODES[name], rows, columns, seed)
    indices = lookup_indices(module)
    found = scaled_lookup(module.codebook.float(), module.scales.float(), indices, columns)
    stored = (module.codes, module.codebook, module.scales, module.code, rows, columns)
    assert torch.equal(found, decode_weight(*stored, torch.float32))
    defined = vq_format.decode(*(x.numpy() for x in stored[:3]), module.code, rows, columns)
    assert torch.equal(found, torch.from_numpy(defined))


@pytest.mark.parametrize("name", ["4,8,9", "2,4,8"])
@pytest.mark.parametrize("columns", [32, 29])
def test_gradients_are_those_of_the_obvious_decoder(name, columns):
    module = filled(CODES[name], 130, columns)
    indices = lookup_indices(module)
    codebook, scales = (x.double().requires_grad_() for x in (module.codebook, module.scales))
    weighting = torch.randn(130, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = (codebook[indices.long()].reshape(130, -1)[:, :columns] * scales[:, None] * weighting).sum()
    expected = torch.autograd.grad(plain, (codebook, scales))
    found = torch.autograd.grad(
        (scaled_lookup(codebook, scales, indices, columns) * weighting).sum(), (codebook, scales)
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_indices_are_narrow():
    assert lookup_indices(filled(CODES["2,6,8"], 8, 16)).dtype == torch.uint8
    assert lookup_indices(filled(CODES["4,8,9"], 8, 16)).dtype == torch.int16


def test_sums_by_hand():
    blocks = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    found = sum_by_entry(blocks, torch.tensor([2, 0, 2], dtype=torch.uint8), 4)
    assert found.tolist() == [[10, 20], [0, 0], [101, 202], [0, 0]]


@pytest.mark.gpu
def test_sums_on_a_gpu_are_the_same_every_time():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(100_000, 4, generator=generator)
    indices = torch.randint(0, 512, (100_000,), generator=generator).short()
    once, again = (sum_by_entry(blocks.cuda(), indices.cuda(), 512) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(once.cpu(), sum_by_entry(blocks, indices, 512), rtol=1e-4, atol=1e-4)


def test_straight_through_gives_the_stored_value_and_a_whole_gradient():
    exact = torch.tensor([0.1, 3e-9, -1e9], requires_grad=True)
    stored = torch.tensor([0.0, 1.0, 5.0])
    found = straight_through(exact, stored)
    assert torch.equal(found, stored)
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert exact.grad.tolist() == [1, 2, 3]


def test_int8_codebooks_are_whole_numbers_within_reach_and_pull_no_further():
    exact = torch.tensor([[0.4, -1.6, 127.3, -300.0]], requires_grad=True)
    found = rounded_codebook(exact, CODES["4,8,8"])
    assert found.tolist() == [[0, -2, 127, -127]]
    found.sum().backward()
    assert exact.grad.tolist() == [[1, 1, 0, 0]]


def test_float16_codebooks_are_float16_values():
    exact = torch.tensor([[1 / 3, 1000.3]])
    found = rounded_codebook(exact, CODES["2,6,8"])
    assert torch.equal(found, exact.half().float())
    assert torch.equal(rounded_to(exact, torch.bfloat16), exact.bfloat16().float())


def moved(tuned: TunedWeights, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    tuned.load(
        {
            kind: {name: 0.1 * torch.randn(x.shape, generator=generator) for name, x in own.items()}
            for kind, own in tuned.offsets.items()
        }
    )


class WithNorm(TinyModel):
    """The tiny model behind a norm whose bias starts at zero, and a position codebook that is not to be tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.places = nn.Parameter(torch.ones(2, 64))

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids) + self.places) + self.mix(self.v(self.embed(ids))))


IDS = torch.tensor([[1, 200], [3, 3]])


def test_without_offsets_nothing_changes():
    model = WithNorm()
    before = model(IDS)
    tuned = TunedWeights(model, torch.float32)
    tuned.install()
    assert torch.equal(model(IDS), before)
    tuned.store(tuned.copied())
    tuned.release()
    assert torch.equal(model(IDS), before)


def test_a_model_that_is_released_is_what_it_was():
    model = WithNorm()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    tuned = TunedWeights(model, torch.float16)
    moved(tuned)
    tuned.install()
    model(IDS).sum().backward()
    tuned.release()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert model.q._decoded is None


def test_what_is_stored_computes_what_was_installed():
    model = WithNorm()
    tuned = TunedWeights(model, torch.float16)
    moved(tuned)
    tuned.install()
    installed = model(IDS).detach()
    tuned.release()
    tuned.store(tuned.copied())
    with torch.no_grad():
        assert torch.equal(model(IDS), installed)
    assert model.k.codebook is model.q.codebook
    assert model.head.scales is model.embed.scales
    assert all(bool((m.scales >= 0).all()) for m in tuned.modules.values())
    assert torch.equal(model.norm.bias, model.norm.bias.half().float())
    assert bool((model.norm.bias != 0).any())
    assert bool((model.places == 1).all())


def test_a_zero_scale_stays_zero():
    model = WithNorm()
    model.q.scales[5] = 0
    tuned = TunedWeights(model, torch.float16)
    moved(tuned)
    tuned.store(tuned.copied())
    assert model.q.scales[5] == 0
    assert bool((model.q.scales[:5] > 0).all())


def test_a_shared_codebooks_gradient_is_the_sum_over_all_that_use_it():
    """mix and down share a codebook here; each one's part is what autograd gives it alone."""
    model = WithNorm()
    model.down.codebook_id, model.down.codebook = "t2", model.mix.codebook
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    tuned = TunedWeights(model, torch.float32)
    tuned.install()
    (model.mix(hidden).square().mean() + model.down(hidden[:, :192]).square().mean()).backward()
    tuned.backward()
    start = model.mix.codebook.float()
    parts = []
    for module, x in ((model.mix, hidden), (model.down, hidden[:, :192])):
        codebook = start.clone().requires_grad_()
        weight = codebook[lookup_indices(module).long()].reshape(module.rows, -1)[:, : module.columns]
        y = x @ (weight * module.scales.float()[:, None]).T
        (y + (0 if module.bias is None else module.bias.detach())).square().mean().backward()
        parts.append(codebook.grad * start.square().mean().sqrt())
    found = tuned.offsets["codebooks"]["t2"].grad
    torch.testing.assert_close(found, parts[0] + parts[1], rtol=1e-4, atol=1e-6 * float(found.abs().max()))
    assert all(float(part.abs().max()) > 0 for part in parts)
    moved(tuned)
    tuned.store(tuned.copied())
    assert model.down.codebook is model.mix.codebook
    assert not torch.equal(model.mix.codebook.float(), start)
    tuned.release()


def test_a_tied_head_and_its_embedding_pull_together():
    model = WithNorm()
    tuned = TunedWeights(model, torch.float32)
    tuned.install()
    model(IDS).square().mean().backward()
    tuned.backward()
    weight = model.embed.weight.detach().clone().requires_grad_()
    plain = nn.functional.embedding(IDS, weight)
    hidden = model.norm(plain + model.places) + model.mix(model.v(plain))
    (hidden @ weight.T).square().mean().backward()
    # ∂/∂ log a[i] = Σ_j ∂/∂Ŵ[i, j] · Ŵ[i, j], for the head's and the embedding's use together.
    torch.testing.assert_close(
        tuned.offsets["scales"]["embed"].grad, (weight.grad * weight.detach()).sum(dim=1), rtol=1e-4, atol=1e-7
    )
    assert tuned.offsets["codebooks"]["t0"].grad is not None
    assert tuned.offsets["codebooks"]["t3"].grad is None  # gate and up are not run
    tuned.release()
