"""Stage 5: groups swept in order, each coded for the inputs that the quantized prefix gives it, towards what full
precision would put out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from toolchain.calibration.activations import TokenWeights, collect_pairs
from toolchain.calibration.gradients import ROWS_UP_TO, LossStatistics, collect_loss_statistics
from toolchain.calibration.held_out import gate_samples
from toolchain.calibration.moments import tied_moment
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.driver.sequence import LayerResult, Solved, planned_code, quantize_in_sequence
from toolchain.quantize.mgvq.descent import Fit, Gate, gated_group, gated_segments
from toolchain.quantize.mgvq.proxy import expected_loss, row_weights_of
from toolchain.quantize.mgvq.recipe import Recipe
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.values import BitPlan, LayerSpec, parse_format
from toolchain.vq.curvature import damp, unit_mean
from toolchain.vq.drift import PairMoments, gated_shift
from toolchain.vq.segments import quantize_segments
from toolchain.vq.solve import quantize_group
from toolchain.vq.weights import FixedCodebook, Options, SegmentedGroup, StoredWeights, VQGroup

ROW_DAMPING = 0.1  # of S_o, which few samples know: heavy damping turns it into I


def forked(generator: torch.Generator) -> torch.Generator:
    """A generator that draws what the given one would, and leaves it as it is."""
    fork = torch.Generator(generator.device)
    fork.set_state(generator.get_state())
    return fork


def group_moment(spec: LayerSpec, pairs: PairMoments | None) -> Tensor:
    """H float32[n, n] of a group: mean second moment of its inputs; an embedding's is that of a tied head, or I."""
    if spec.kind == "embedding":
        return torch.eye(spec.columns) if pairs is None else tied_moment(pairs.whole.moment)
    assert pairs is not None
    return pairs.whole.second_moment


class DriftSolver:
    """Codes groups for the inputs that the quantized prefix gives, against what full precision would have put out.

    `codebooks` are those that groups share, by the plan's codebook id, beside the ones that the request's options give
    by code.
    """

    def __init__(
        self,
        request: QuantizationRequest,
        recipe: Recipe,
        plan: BitPlan,
        full: nn.Module,
        token_weights: TokenWeights,
        codebooks: Mapping[str, FixedCodebook] | None = None,
    ) -> None:
        self.request, self.recipe, self.plan, self.full, self.token_weights = request, recipe, plan, full, token_weights
        self.codebooks = codebooks or {}
        self.pairs: dict[str, PairMoments] = {}
        self.fitted: dict[str, Tensor] = {}  # group → S_i of the images that the gate does not hold out
        self.statistics = LossStatistics()

    def begin(self, model: nn.Module, step: Sequence[LayerSpec]) -> None:
        self.pairs, self.fitted, self.statistics = {}, {}, LossStatistics()  # the last step's must not lie beside these
        groups = {spec.group for spec in step}
        asked = [spec for spec in self.request.specs if spec.group in groups and spec.kind != "embedding"]
        apart = gate_samples(self.request.inputs) if self.recipe.descent else []
        if apart and asked:
            self.fitted = self._fitted_moments(model, asked, set(apart))
        full = self.full if self.recipe.drift else None
        self.pairs = collect_pairs(model, full, self.request.inputs, asked, self.token_weights) if asked else {}
        if self.recipe.descent and asked:
            self.statistics = collect_loss_statistics(
                self.full,
                self.request.inputs,
                asked,
                held_out=apart,
                rows_up_to=ROWS_UP_TO if self.recipe.fisher else 0,
                draws=2,
                seed=self.request.seed,
            )

    def _fitted_moments(self, model: nn.Module, asked: Sequence[LayerSpec], apart: set[int]) -> dict[str, Tensor]:
        """Group → S_i float32[n, n] without the samples `apart`; none where that leaves no sample."""
        fit = [number for number in range(len(self.request.inputs)) if number not in apart]
        if not fit:
            return {}
        token_weights = {spec.group: [self.token_weights[spec.group][number] for number in fit] for spec in asked}
        pairs = collect_pairs(model, None, [self.request.inputs[number] for number in fit], asked, token_weights)
        return {group: pair.whole.second_moment for group, pair in pairs.items()}

    def solve(
        self, model: nn.Module, members: Sequence[LayerSpec], weights: list[Tensor], generator: torch.Generator
    ) -> Solved:
        spec, options = members[0], self._options(members[0])
        code = self.plan.layer(spec.name).code
        pairs = self.pairs.get(spec.group)
        moment = group_moment(spec, pairs)
        if spec.kind == "embedding":
            rows = [row_weights_of(spec, weight) for weight in weights]
            one = planned_code(self.plan, spec)
            return Solved(quantize_group(weights, moment.to(weights[0]), one, options, generator, rows))
        assert pairs is not None
        if not self.recipe.drift:
            return Solved(*self._coded(members, weights, moment, code, generator))
        stacked = torch.cat(weights)
        shift = gated_shift(stacked, pairs, self._expected_error(stacked, moment, code, options, generator))
        targets = list((stacked + shift.value).split([len(w) for w in weights]))
        group, ways = self._coded(members, targets, moment, code, generator)
        return Solved(group, ways, self._biases(model, members, weights, group, pairs), shift.step)

    def _options(self, spec: LayerSpec) -> Options:
        """The request's, with the codebooks that a layer shares with others."""
        shared = {
            p.vq_code: self.codebooks[p.table] for p in self.plan.layer(spec.name).pieces if p.table in self.codebooks
        }
        return replace(self.request.options, codebooks={**self.request.options.codebooks, **shared})

    def _coded(
        self,
        members: Sequence[LayerSpec],
        targets: list[Tensor],
        moment: Tensor,
        code: str,
        generator: torch.Generator,
    ) -> tuple[VQGroup | SegmentedGroup, tuple[str, ...]]:
        """(the group, how each layer was coded: as its gate says; nothing where the recipe knows the sweep alone)."""
        options = self._options(members[0])
        segments = parse_format(code, members[0].columns)
        if not self.recipe.descent:
            if len(segments) > 1:
                return quantize_segments(targets, moment, segments, options, generator), ()
            return quantize_group(targets, moment, segments[0].code, options, generator), ()
        fit = Fit(moment, self.fitted.get(members[0].group, moment), [self._row_factor(spec) for spec in members])
        gate = Gate([self.statistics.gradient_samples[spec.name] for spec in members])
        if len(segments) > 1:
            return gated_segments(targets, fit, gate, segments, options, lambda: forked(generator))
        return gated_group(targets, fit, gate, segments[0].code, options, generator)

    def _row_factor(self, spec: LayerSpec) -> Tensor | None:
        """S_o of a layer, damped, of mean diagonal 1; None where it has none."""
        found = self.statistics.rows.get(spec.name)
        return None if found is None else unit_mean(damp(found, ROW_DAMPING))

    def _expected_error(
        self, weight: Tensor, moment: Tensor, code: str, options: Options, generator: torch.Generator
    ) -> float:
        """tr(E H Eᵀ) that coding without a shift would leave, from a proxy quantization in the code's proxy code."""
        return expected_loss(weight, moment, code, options, forked(generator))

    def _biases(
        self,
        model: nn.Module,
        members: Sequence[LayerSpec],
        weights: Sequence[Tensor],
        group: VQGroup | SegmentedGroup,
        pairs: PairMoments,
    ) -> dict[str, Tensor]:
        """b + E[W x_f − Ŵ x_q] of the layers that have a bias (mgvq-algorithm 4.6)."""
        if not self.recipe.bias:
            return {}
        full_mean, mean = (m / pairs.whole.token_weight for m in (pairs.whole.full_mean, pairs.whole.mean))
        found = {}
        layers: tuple[StoredWeights, ...] = group.layers
        for spec, weight, stored in zip(members, weights, layers):
            bias = getattr(model.get_submodule(spec.name), "bias", None)
            if bias is not None:
                corrected = bias.detach().float() + weight @ full_mean - stored.decode().to(weight) @ mean
                found[spec.name] = corrected.to(self.request.kept_dtype).float()
        return found


def sweep_model(
    run: MgvqRun, plan: BitPlan, token_weights: TokenWeights, codebooks: Mapping[str, FixedCodebook]
) -> tuple[nn.Module, tuple[LayerResult, ...]]:
    """(the quantized model, how its layers came out); the request's model stays as it is.

    Args:
        codebooks: those that groups share, by the plan's codebook id.
    """
    request = run.request
    quantized = copy.deepcopy(request.model)
    solver = DriftSolver(request, run.recipe, plan, request.model, token_weights, codebooks)
    return quantized, quantize_in_sequence(
        quantized, request.specs, plan, solver, run.store, request.seed, run.progress
    )
