"""Universal codebooks: the file can be made again, fits Gaussian weights, and is what every group then stores."""

from __future__ import annotations

import pytest
import torch
from layer_problems import random_moment
from safetensors.torch import load_file, save_file

from toolchain.errors import InputDataError
from toolchain.quantize.mgvq.proxy import GAUSSIAN_ERROR
from toolchain.values import CODE_NAMES, CODES, VQCode, parse_format
from toolchain.vq import universal_codebooks as universal
from toolchain.vq.codebook import Samples, entry_features, sample_features
from toolchain.vq.descent import Descent
from toolchain.vq.factor import factor_moment
from toolchain.vq.refit_cg import refine
from toolchain.vq.segments import quantize_segments
from toolchain.vq.solve import quantize_group, solve_problem
from toolchain.vq.trellis import tail_biting_paths
from toolchain.vq.universal_codebooks import gaussian_codebook, machine, stored_metadata, universal_codebooks
from toolchain.vq.weights import FixedCodebook, Options, stack_group

GIVEN = Options(codebooks=universal_codebooks())
OWN = Options(lloyd_rounds=6, samples=8_000)
NAMES = [str(code) for code in universal.TRAINED_CODES]


def gaussian_error(code: VQCode, codebook: FixedCodebook) -> float:
    """Mean squared error of the code's cheapest paths on other Gaussian samples."""
    vectors = torch.randn(1 << 14, code.vector, generator=torch.Generator().manual_seed(99))
    features = sample_features(Samples(vectors, torch.eye(code.vector).expand(len(vectors), -1, -1)))
    worth = codebook.stored.float() * codebook.step
    if code.window == code.shift:
        chosen = (features @ entry_features(worth).T).argmin(dim=1)
    else:
        queries = features.view(-1, 16, features.shape[1]).permute(1, 2, 0)
        chosen = tail_biting_paths(queries, entry_features(worth), code).T.reshape(-1)
    return float((vectors - worth[chosen]).square().mean())


def gaussian_layer(rows: int, columns: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.03 * torch.randn(rows, columns, generator=generator)
    return weight, random_moment(columns, generator)


def solved(weight, moment, code, options):
    return quantize_group([weight], moment, code, options, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["2,4,4", "2,6,6", "2,6,8"])
def test_the_file_can_be_made_again(name):
    """To the byte with the arithmetic it was made with; elsewhere rounding may lead to another codebook as good."""
    code = VQCode.parse(name)
    found, stored = gaussian_codebook(code), universal_codebooks()[code]
    if machine() == stored_metadata()["machine"]:
        assert torch.equal(found.stored, stored.stored)
        assert found.step == stored.step
    assert gaussian_error(code, found) == pytest.approx(gaussian_error(code, stored), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_codebooks_reach_the_error_that_dry_runs_expect(name):
    code = VQCode.parse(name)
    codebook = universal_codebooks()[code]
    assert codebook.stored.dtype == (torch.int8 if code.vector == 4 else torch.float16)
    assert (codebook.step == 1) == (code.vector == 2)
    assert gaussian_error(code, codebook) < 1.04 * GAUSSIAN_ERROR[name]


@pytest.mark.parametrize("name", CODE_NAMES)
def test_a_group_stores_the_codebook_it_was_given(name):
    """The same bytes for any weights; decoding is that of the stored form, and the error what is reported."""
    weight, moment = gaussian_layer(150, 40)
    for size in (1.0, 2.0**-6):
        group = solved(size * weight, moment, CODES[name], GIVEN)
        stored = group.layers[0]
        assert torch.equal(stored.codebook, universal_codebooks()[CODES[name]].stored)
        error = (size * weight - stored.decode()).double()
        assert group.errors[0] == pytest.approx(float(((error @ moment.double()) * error).sum()), rel=1e-4)
        assert stored.scales.float().mean() > 0


@pytest.mark.parametrize("name", ["2,4,8", "4,8,8"])
def test_without_outliers_they_are_nearly_as_good_and_with_them_far_from_it(name):
    """What makes them unsafe on heavy tails is a few weights beyond the largest entry (formats-on-real-weights, 5)."""
    weight, moment = gaussian_layer(512, 128)[0], torch.eye(128)
    losses = [solved(weight, moment, CODES[name], options).loss for options in (OWN, GIVEN)]
    assert losses[1] < 1.1 * losses[0]
    weight[::2, 7] = 0.6
    losses = [solved(weight, moment, CODES[name], options).loss for options in (OWN, GIVEN)]
    assert losses[1] > 2 * losses[0]


def test_codes_that_are_not_given_train_their_own():
    weight, moment = gaussian_layer(128, 32)
    some = Options(codebooks={CODES["2,6,6"]: universal_codebooks()[CODES["2,6,6"]]})
    trained = solved(weight, moment, CODES["2,4,8"], some).layers[0]
    assert torch.equal(trained.codebook, solved(weight, moment, CODES["2,4,8"], Options()).layers[0].codebook)
    assert not torch.equal(trained.codebook, universal_codebooks()[CODES["2,4,8"]].stored)


def test_segments_take_the_codebook_of_their_code():
    weight, moment = gaussian_layer(130, 150)
    segments = parse_format("2,6,8@64+2,3,8", 150)
    group = quantize_segments([weight], moment, segments, GIVEN, torch.Generator().manual_seed(0))
    for segment, stored in zip(segments, group.layers[0].segments, strict=True):
        assert torch.equal(stored.codebook, universal_codebooks()[segment.code].stored)


@pytest.mark.parametrize("name", ["4,8,8", "2,4,8"])
def test_descent_refits_scales_and_leaves_the_codebook(name):
    code = CODES[name]
    weight, moment = gaussian_layer(150, 40)
    problem = stack_group([weight], moment, code, searches_paths=True)
    start = solve_problem(problem, code, GIVEN, torch.Generator().manual_seed(0))
    damped = factor_moment(problem.moment, 40, code.vector, GIVEN.damping).damped
    kept = refine(problem, start, code, damped, None, Descent(sweeps=1), rounds=2, keeps_codebook=True)
    free = refine(problem, start, code, damped, None, Descent(sweeps=1), rounds=2)
    assert torch.equal(kept.codebook, start.codebook)
    assert not torch.equal(free.codebook, start.codebook)
    assert not torch.equal(kept.scales, start.scales)
    assert free.loss < kept.loss < start.loss


def test_a_file_that_lacks_a_codebook_is_refused(tmp_path, monkeypatch):
    tensors = load_file(universal.FILE)
    tensors["2,4,8"] = tensors["2,4,8"].float()
    with universal.safe_open(universal.FILE, framework="pt") as file:
        save_file(tensors, tmp_path / "u.safetensors", metadata=file.metadata())
    monkeypatch.setattr(universal, "FILE", tmp_path / "u.safetensors")
    with pytest.raises(InputDataError, match=r"expected float16\[256, 2\] under 2,4,8, found torch.float32"):
        universal_codebooks.__wrapped__()
