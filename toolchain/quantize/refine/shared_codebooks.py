"""The codebooks of parts: trained before the sweep, from the full-precision model, for the codes that the plan
gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from toolchain.bits.codebook_sharing import PART
from toolchain.calibration.activations import TokenWeights, collect_pairs
from toolchain.quantize.driver.request import QuantizationRequest
from toolchain.quantize.driver.sequence import dense_weight, group_generator
from toolchain.quantize.mgvq.proxy import row_weights_of
from toolchain.quantize.mgvq.run import MgvqRun
from toolchain.quantize.mgvq.sensitivity import moment_batches
from toolchain.quantize.mgvq.sweep import group_moment
from toolchain.values import BitPlan, LayerSpec, Progress, groups_of, parse_format
from toolchain.vq.drift import PairMoments
from toolchain.vq.shared_codebooks import Pool, pieces_of
from toolchain.vq.weights import FixedCodebook

SAMPLES = 4  # times as many as a group's own codebook trains on


def shared_codebooks(run: MgvqRun, plan: BitPlan, token_weights: TokenWeights) -> dict[str, FixedCodebook]:
    """Codebook id → the codebook, of every part and code of the plan, kept in the store; none unless the recipe has
    parts own them.

    A codebook is trained on all groups and segments of its part that the plan gives its code; the others will not use
    it. What is random is drawn from the request's seed and the names of groups and codebooks.

    Args:
        run: its model in full precision, with the column permutations that the sweep will meet.
        plan: whose codebooks parts own (`bitplan.plan`).
    """
    if run.recipe.codebooks != PART:
        return {}
    request = run.request

    def make() -> tuple[dict[str, Tensor], Any]:
        pools = _drawn(request, plan, token_weights, run.progress)
        found = {}
        for done, (name, pool) in enumerate(pools.items(), start=1):
            # The seed's name is part of what a method's bytes depend on: it stays as checkpoints were made with it.
            found[name] = pool.codebook(request.options, group_generator(request.seed, f"table.{name}"))
            run.progress.step(done, len(pools), "codebooks")
        return {n: one.stored for n, one in found.items()}, {n: one.step for n, one in found.items()}

    codebooks, steps = run.store.get_or_make("codebooks", make)
    return {name: FixedCodebook(stored, steps[name]) for name, stored in codebooks.items()}


def _drawn(
    request: QuantizationRequest, plan: BitPlan, token_weights: TokenWeights, progress: Progress
) -> dict[str, Pool]:
    """Codebook id → samples of all that uses it."""
    pools = _pools(plan)
    stored = [spec for spec in request.specs if not spec.tied_to]
    done = 0
    for layer_batch in moment_batches(stored):
        pairs = _pairs(request, layer_batch, token_weights)
        for group, members in groups_of(layer_batch).items():
            _draw_group(request, plan, members, pairs.get(group), pools)
            done += len(members)
            progress.step(done, len(stored), "codebook samples")
    return pools


def _pools(plan: BitPlan) -> dict[str, Pool]:
    """Codebook id → an empty pool that knows how many weights will use the codebook."""
    pools: dict[str, Pool] = {}
    for piece in (piece for layer in plan.layers if not layer.tied_to for piece in layer.pieces):
        pools.setdefault(piece.table, Pool(piece.vq_code, 0)).weights += piece.rows * piece.columns
    return pools


def _pairs(
    request: QuantizationRequest, layer_batch: Sequence[LayerSpec], token_weights: TokenWeights
) -> Mapping[str, PairMoments]:
    """Group → moments of its full-precision inputs; an embedding's are those of the head that is tied to it."""
    groups = {spec.group for spec in layer_batch}
    asked = [spec for spec in request.specs if spec.group in groups and spec.kind != "embedding"]
    return collect_pairs(request.model, None, request.inputs, asked, token_weights) if asked else {}


def _draw_group(
    request: QuantizationRequest,
    plan: BitPlan,
    members: Sequence[LayerSpec],
    pairs: PairMoments | None,
    pools: Mapping[str, Pool],
) -> None:
    """Add what a group's layers give to the pools of their codebooks."""
    spec = members[0]
    weights = [dense_weight(request.model, one) for one in members]
    moment = group_moment(spec, pairs).to(weights[0])
    rows = [row_weights_of(spec, weight) for weight in weights] if spec.kind == "embedding" else None
    layer = plan.layer(spec.name)
    pieces = pieces_of(weights, moment, parse_format(layer.code, spec.columns), request.options.damping, rows)
    for number, (planned, piece) in enumerate(zip(layer.pieces, pieces, strict=True)):
        generator = group_generator(request.seed, f"samples.{spec.group}.{number}")
        pools[planned.table].add(piece, SAMPLES * request.options.samples, generator)
