"""The parts of quantizing one group of layers, each timed as the line runs it, on drawn weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from toolchain.bench.machine import timed
from toolchain.bench.shapes import GroupShape
from toolchain.quantize.baselines import gptq
from toolchain.values import VQCode
from toolchain.vq.descent import descend
from toolchain.vq.drift import Pair, PairMoments, gated_shift
from toolchain.vq.factor import factor_moment
from toolchain.vq.solve import Solution, solve_problem
from toolchain.vq.weights import Options, Problem, output_errors, pack_group, stack_group

PARTS = ("statistics", "drift", "factor", "sweep", "descent")
PART_OF_SWEEP = "factor"  # timed apart, and done once more inside the sweep: it is not added to sums
OURS, PEER, PEER_CODE = "mgvq", "gptq", "4,8,8"
# Tokens a sample: moments are added up sample by sample, and an image with its question is of this order.
SAMPLE_TOKENS = 1024
WEIGHT_SIZE = 0.02  # standard deviation, as of a trained decoder's linears
COLUMN_SPREAD = 0.7  # of the logarithm of the input columns' sizes
INPUT_ERROR = 0.2  # what quantized layers before this one do to its inputs, as a share of them
TRUSTED_SHARE = 0.1  # of the output's square: what coding without a shift is said to lose

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """One part, of one method in one code (None where the part is the same for all): wall and CPU seconds."""

    part: str
    method: str
    code: str | None
    seconds: float
    cpu_seconds: float


@dataclass
class Clock:
    """Times calls on a device and keeps those of the parts that are wanted."""

    device: torch.device
    wanted: tuple[str, ...]
    timings: list[Timing] = field(default_factory=list)

    def run(self, part: str, method: str, code: VQCode | None, call: Callable[[], Result]) -> Result:
        """What `call` returns; its seconds are kept under the part's name."""
        result, *seconds = timed(self.device, call)
        if part in self.wanted:
            self.timings.append(Timing(part, method, None if code is None else str(code), *seconds))
        return result


@dataclass(frozen=True)
class DrawnGroup:
    """Random weights float32[m_i, n] a layer, and samples of inputs (x_q, x_f), both float32[tokens, n]."""

    weights: list[Tensor]
    samples: list[tuple[Tensor, Tensor]]


def draw_group(shape: GroupShape, tokens: int, device: torch.device, generator: torch.Generator) -> DrawnGroup:
    """Gaussian weights, and inputs whose columns differ in size; x_q is x_f with noise, so that there is drift.

    Args:
        tokens: at least 2; they make two samples or more, because drift holds one half against the other.
        generator: on the CPU, so that every device gets the same numbers.
    """
    weights = [WEIGHT_SIZE * torch.randn(rows, shape.columns, generator=generator) for rows in shape.rows]
    sizes = torch.exp(COLUMN_SPREAD * torch.randn(shape.columns, generator=generator))
    samples = []
    for part in torch.arange(tokens).tensor_split(max(2, tokens // SAMPLE_TOKENS)):
        full = torch.randn(len(part), shape.columns, generator=generator) * sizes
        noise = torch.randn(len(part), shape.columns, generator=generator) * sizes
        samples.append(((full + INPUT_ERROR * noise).to(device), full.to(device)))
    return DrawnGroup([weight.to(device) for weight in weights], samples)


def accumulate(samples: list[tuple[Tensor, Tensor]], *, drifts: bool) -> PairMoments:
    """The moments of the samples as `activations.collect_pairs` adds them up; with drift C = E[x_f x_qᵀ] too."""
    tokens = sum(len(quantized) for quantized, _ in samples)
    halves: list[Pair | None] = [None, None]
    for number, (quantized, full) in enumerate(samples):
        token_weight = torch.full((len(quantized),), 1 / tokens, device=quantized.device)
        found = Pair.of(quantized, full if drifts else quantized, token_weight)
        halves[number % 2] = found.added(halves[number % 2])
    return PairMoments.merged(halves)


def sweep_group(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
) -> tuple[Problem, Solution]:
    """What `solve.quantize_group` does, packing included; (the stacked problem, its solution) for what follows."""
    problem = stack_group(weights, moment, code, searches_paths=True)
    found = solve_problem(problem, code, options, generator)
    pack_group(problem, found.indices, found.codebook, found.scales, code)
    return problem, found


def time_group(shape: GroupShape, tokens: int, codes: tuple[VQCode, ...], peers: bool, clock: Clock, seed: int) -> None:
    """Run the parts of one group of layers that the clock wants, and those they need, by our method and its peers.

    Args:
        codes: what our method codes with; PEER_CODE is swept too where there are peers.
        seed: of weights, inputs and tables.
    """
    generator, options = torch.Generator().manual_seed(seed), Options()
    drawn = draw_group(shape, tokens, clock.device, generator)
    drifts = "drift" in clock.wanted
    pairs = clock.run("statistics", OURS, None, lambda: accumulate(drawn.samples, drifts=drifts))
    weights, moment = drawn.weights, pairs.whole.second_moment
    if drifts:
        weights = _shifted(weights, moment, pairs, clock)
    del pairs
    if {"factor", "sweep", "descent"}.isdisjoint(clock.wanted):
        return
    for code in codes:
        _time_code(weights, moment, code, options, clock, generator)
    if peers and "sweep" in clock.wanted:
        plain = VQCode.parse(PEER_CODE)
        if plain not in codes:
            clock.run("sweep", OURS, plain, lambda: sweep_group(weights, moment, plain, options, generator))
        clock.run("sweep", PEER, plain, lambda: gptq.quantize_group(weights, moment, plain, options, generator))


def _shifted(weights: list[Tensor], moment: Tensor, pairs: PairMoments, clock: Clock) -> list[Tensor]:
    """W* of every layer: as the line shifts them, stacked."""
    stacked = torch.cat(weights)
    columns = stacked.shape[1]
    alone = Problem(stacked, moment, columns, (len(stacked),), (len(stacked),), stacked.new_ones(len(stacked)))
    trusted = TRUSTED_SHARE * float(output_errors(stacked, alone).sum())
    shift = clock.run("drift", OURS, None, lambda: gated_shift(stacked, pairs, trusted))
    return list((stacked + shift.value).split([len(weight) for weight in weights]))


def _time_code(
    weights: list[Tensor], moment: Tensor, code: VQCode, options: Options, clock: Clock, generator: torch.Generator
) -> None:
    """Factor, sweep and descent in one code; the sweep factors again, as it does in the line."""
    damped = None
    if not {"factor", "descent"}.isdisjoint(clock.wanted):
        problem = stack_group(weights, moment, code, searches_paths=True)
        factor = (problem.moment, problem.columns, code.vector, options.damping)
        damped = clock.run("factor", OURS, code, lambda: factor_moment(*factor).damped)
        del problem, factor
    if not {"sweep", "descent"}.isdisjoint(clock.wanted):
        problem, found = clock.run("sweep", OURS, code, lambda: sweep_group(weights, moment, code, options, generator))
        if "descent" in clock.wanted and damped is not None:
            clock.run("descent", OURS, code, lambda: descend(problem, found, code, damped))
