"""Coordinate descent behind a gate: every matrix takes it, with S_o or with S_o = I, or keeps the sweep's codes,
whichever loses least by gradients of images that none of them was fitted to (mgvq-algorithm 6, note 2c).

What a matrix loses is E_b⟨G_b, E⟩² with E = W* − Ŵ (equation 16). Matrices of a group share a codebook, and while that
stays the sweep's, codes and row scales are each matrix's own: nothing couples one's choice to another's, and the sum
over the group is least when each term is. The codebook is then fitted to the codes chosen, all at once, and taken where
that sum falls. The cross terms ⟨G_b, E⟩⟨G'_b, E'⟩ of two matrices are left out, as they are in a block-diagonal S_o.

K-segments are not mixed: a segment's codebook is trained on what the segments before it left, so that two ways of
coding have no codebook in common from the second segment on. All matrices of such a group go the way of least sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolchain.calibration.gradients import GradientSample
from toolchain.values import Segment, VQCode
from toolchain.vq.descent import Descent, descend
from toolchain.vq.factor import factor_moment
from toolchain.vq.kronecker import Objective, best_of
from toolchain.vq.refit_cg import refine, refit, refit_stored_scales
from toolchain.vq.segments import Coder, quantize_segments, weighted_square
from toolchain.vq.solve import Solution, solve_problem
from toolchain.vq.weights import Options, Problem, SegmentedGroup, VQGroup, pack_group, stack_group

# How a matrix may be coded; the first of equals is taken.
SWEEP, DESCENT, COUPLED = "sweep", "descent", "descent with S_o"
SETTINGS = Descent(sweeps=2)

RowFactors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Gate:
    """Held-out gradients, those of each layer of a group."""

    gradient_samples: Sequence[Sequence[GradientSample]]

    def losses(self, errors: Sequence[Tensor]) -> list[float]:
        """E_b⟨G_b, E⟩² of every layer, for E float32[m, n]."""
        products = [[p.product(error) for p in own] for own, error in zip(self.gradient_samples, errors, strict=True)]
        return [float(torch.tensor(own, dtype=torch.float64).square().mean()) for own in products]


@dataclass(frozen=True)
class Fit:
    """What the ways of coding are fitted to: S_i float32[n, n] of all inputs, which the sweep takes; that of the
    images no gate holds out, which descent takes; S_o float32[m, m] a layer, damped, or None, where rows count alike.
    """

    moment: Tensor
    fitted: Tensor
    row_factors: RowFactors

    @property
    def is_coupled(self) -> bool:
        """Whether some layer has an S_o."""
        return any(factor is not None for factor in self.row_factors)


def gated_group(
    targets: list[Tensor], fit: Fit, gate: Gate, code: VQCode, options: Options, generator: torch.Generator
) -> tuple[VQGroup, tuple[str, ...]]:
    """(the group, how each of its layers was coded).

    Args:
        targets: W* float32[m_i, n] of layers that read the same input.
        generator: seeds the codebook; the result depends on nothing else random.
    """
    problem = stack_group(targets, fit.moment, code, searches_paths=True)
    damped = _damped(fit, problem, code, options)

    def judged(found: Solution) -> list[float]:
        errors = (problem.weight - found.decode())[:, : problem.columns].split(problem.held)
        return gate.losses([error[:rows] for error, rows in zip(errors, problem.rows)])

    swept = solve_problem(problem, code, options, generator)
    ways = {SWEEP: swept, DESCENT: _descended(problem, swept, damped, None, code)}
    losses = {name: judged(found) for name, found in ways.items()}
    if fit.is_coupled:
        ways[COUPLED] = _descended(problem, ways[DESCENT], damped, fit.row_factors, code)
        own = zip(judged(ways[COUPLED]), fit.row_factors, strict=True)
        losses[COUPLED] = [math.inf if factor is None else loss for loss, factor in own]
    chosen = best_ways(losses)
    best = swept
    if set(chosen) != {SWEEP}:
        mixed = _mixed([ways[name] for name in chosen], problem.held)
        factors = [factor if name == COUPLED else None for name, factor in zip(chosen, fit.row_factors, strict=True)]
        objective = Objective.of(problem, damped, factors)
        refitted = refit(problem, mixed, code, objective, keeps_codebook=code in options.codebooks)
        best, _ = best_of([mixed, refitted], lambda found: sum(judged(found)))
    return pack_group(problem, best.indices, best.codebook, best.scales, code), chosen


def _damped(fit: Fit, problem: Problem, code: VQCode, options: Options) -> Tensor:
    """float32[n, n]: the moment that descent takes, padded and damped as the sweep's is."""
    extra = len(problem.moment) - len(fit.fitted)
    fitted = torch.nn.functional.pad(fit.fitted.float(), (0, extra, 0, extra))
    return factor_moment(fitted, problem.columns, code.vector, options.damping).damped


def _descended(
    problem: Problem, start: Solution, damped: Tensor, row_factors: RowFactors | None, code: VQCode
) -> Solution:
    """The start after sweeps of descent, with its codebook, and scales fitted to the codes.

    With S_o from where S_o = I ended: in random problems of three codes and three spectra of S_o that took 2 to 12 %
    more off tr(S_o E S_i Eᵀ) than from the sweep, in every one of them.
    """
    found = descend(problem, start, code, damped, row_factors, SETTINGS)
    return refit_stored_scales(problem, found, Objective.of(problem, damped, row_factors))


def best_ways(losses: dict[str, list[float]]) -> tuple[str, ...]:
    """The way of least loss for every layer, from way → losses a layer; the first of equals."""
    layers = len(next(iter(losses.values())))
    return tuple(min(losses, key=lambda way: losses[way][layer]) for layer in range(layers))


def _mixed(own: Sequence[Solution], held: Sequence[int]) -> Solution:
    """The rows of each layer from its own solution; all of them have one codebook."""
    rows = [slice(sum(held[:i]), sum(held[: i + 1])) for i in range(len(held))]
    indices = torch.cat([found.indices[r].long() for found, r in zip(own, rows)]).to(own[0].indices.dtype)
    scales = torch.cat([found.scales[r] for found, r in zip(own, rows)])
    return Solution(indices, own[0].codebook, scales, 0.0)


def gated_segments(
    targets: list[Tensor],
    fit: Fit,
    gate: Gate,
    segments: Sequence[Segment],
    options: Options,
    generator: Callable[[], torch.Generator],
) -> tuple[SegmentedGroup, tuple[str, ...]]:
    """`gated_group` in K-segments, the same way for all layers.

    Args:
        generator: gives one that draws the same at every call.
    """

    def losses(group: SegmentedGroup) -> float:
        return sum(gate.losses([w - layer.decode().to(w) for w, layer in zip(targets, group.layers)]))

    found = {SWEEP: quantize_segments(targets, fit.moment, segments, options, generator())}
    for name, factors in [(DESCENT, None)] + [(COUPLED, fit.row_factors)] * fit.is_coupled:
        found[name] = quantize_segments(targets, fit.fitted, segments, options, generator(), _descending(factors))
    way, _ = best_of(list(found), lambda name: losses(found[name]))
    h = fit.moment.float()
    errors = tuple(weighted_square(w - layer.decode().to(w), h) for w, layer in zip(targets, found[way].layers))
    references = tuple(weighted_square(w, h) for w in targets)
    return replace(found[way], errors=errors, references=references), (way,) * len(targets)


def _descending(row_factors: RowFactors | None) -> Coder:
    """Codes one segment by the sweep and descent from there, codebook and scales fitted."""

    def coder(
        targets: list[Tensor], moment: Tensor, code: VQCode, options: Options, generator: torch.Generator
    ) -> VQGroup:
        problem = stack_group(targets, moment, code, searches_paths=True)
        swept = solve_problem(problem, code, options, generator)
        damped = factor_moment(problem.moment, problem.columns, code.vector, options.damping).damped
        kept = code in options.codebooks
        found = refine(problem, swept, code, damped, row_factors, SETTINGS, rounds=1, keeps_codebook=kept)
        return pack_group(problem, found.indices, found.codebook, found.scales, code)

    return coder
