"""The parts that are timed compute what the line computes."""

from __future__ import annotations

import pytest
import torch

from toolchain.bench.parts import PARTS, Clock, accumulate, draw_group, sweep_group, time_group
from toolchain.bench.shapes import GroupShape
from toolchain.values import VQCode
from toolchain.vq.drift import gated_shift
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import Options, pack_indices

SHAPE = GroupShape("qkv", (64, 32), 48)
CPU = torch.device("cpu")
CODE = VQCode(2, 4, 8)


def drawn(tokens: int = 300, seed: int = 0):
    return draw_group(SHAPE, tokens, CPU, torch.Generator().manual_seed(seed))


def test_statistics_are_the_moments_of_all_tokens():
    group = drawn()
    pairs = accumulate(group.samples, drifts=True)
    quantized, full = (torch.cat(rows) for rows in zip(*group.samples, strict=True))
    torch.testing.assert_close(pairs.whole.moment, quantized.T @ quantized / len(quantized))
    torch.testing.assert_close(pairs.whole.cross, full.T @ quantized / len(full))
    assert pairs.whole.token_weight == pytest.approx(1)
    assert pairs.halves is not None


def test_without_drift_only_the_second_moment_is_added_up():
    whole = accumulate(drawn().samples, drifts=False).whole
    assert torch.equal(whole.cross, whole.moment)


def test_synthetic_inputs_open_the_gate_of_drift():
    group = drawn(tokens=4096)
    shift = gated_shift(torch.cat(group.weights), accumulate(group.samples, drifts=True), trusted=1e9)
    assert shift.step > 0.5


def test_the_same_seed_draws_the_same_group():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert torch.equal(first.weights[0], again.weights[0])
    assert torch.equal(first.samples[1][0], again.samples[1][0])
    assert not torch.equal(first.weights[0], other.weights[0])


@pytest.mark.parametrize("tokens", [2, 300, 3000])
def test_samples_hold_all_tokens_and_make_two_halves(tokens):
    lengths = [len(rows) for rows, _ in drawn(tokens).samples]
    assert sum(lengths) == tokens
    assert len(lengths) >= 2
    assert min(lengths) >= 1


def test_the_timed_sweep_is_the_lines():
    group = drawn()
    moment = accumulate(group.samples, drifts=False).whole.moment
    problem, found = sweep_group(group.weights, moment, CODE, Options(), torch.Generator().manual_seed(3))
    stored = quantize_group(group.weights, moment, CODE, Options(), torch.Generator().manual_seed(3))
    codes = [pack_indices(part, CODE) for part in found.indices.split(problem.held)]
    assert all(torch.equal(mine, layer.codes) for mine, layer in zip(codes, stored.layers, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_is_all_that_is_kept(part):
    clock = Clock(CPU, (part,))
    time_group(SHAPE, 200, (CODE,), False, clock, 0)
    assert [timing.part for timing in clock.timings] == [part]


def test_peers_are_swept_in_a_plain_code():
    clock = Clock(CPU, ("sweep",))
    time_group(SHAPE, 200, (CODE,), True, clock, 0)
    assert [(t.method, t.code) for t in clock.timings] == [("mgvq", "2,4,8"), ("mgvq", "4,8,8"), ("gptq", "4,8,8")]
