"""A model quantized block by block by a method whose codes no checkpoint can hold: decoded weights, and bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.bits.bitplan import KEPT_BYTES, BitCount, kept_by_part
from toolchain.calibration.moments import layer_moments
from toolchain.errors import MgvqError
from toolchain.quantize.baselines.compared import ComparedMethod
from toolchain.quantize.driver.request import QuantizationRequest, plan_request
from toolchain.quantize.driver.sequence import LayerResult, group_generator, walk_groups
from toolchain.values import PARTS, SILENT, BitPlan, LayerSpec, Progress, VQCode
from toolchain.vq.weights import Options

# Rows of these are tokens: their order says nothing, and those of rare tokens can be far larger than those of common
# ones. Methods that code neighbouring rows together get them sorted by size, and pay for it. VPTQ-style on the built-in
# model, 437 of whose 512 tokens never occur and have the largest rows, at 2 bits: KL 0.252 unsorted (seed 0), 0.020,
# 0.039 and 0.054 sorted (seeds 0, 1, 2).
TOKEN_PARTS = ("embedding", "head")


@dataclass(frozen=True)
class DenseResult:
    """What `quantize_dense` did. `model` is dense and holds the decoded weights; `bits` is counted as by
    `bitplan.real_bits`, from the bytes the method says it needs.
    """

    model: nn.Module
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    bits: dict[str, BitCount]
    seconds: float


def quantize_dense(request: QuantizationRequest, method: ComparedMethod, progress: Progress = SILENT) -> DenseResult:
    """The same walk over the model as `quantize.checkpoint`'s, in memory; the request's model is given up.

    Raises:
        UsageError: bits or overrides that no plan can keep.
    """
    began = time.monotonic()
    plan = plan_request(request)
    sizes: dict[str, int] = {}
    moments: dict[str, Tensor] = {}

    def begin(step: Sequence[LayerSpec]) -> None:
        moments.clear()
        moments.update(layer_moments(request.model, request.inputs, step, request.specs))

    def quantize(members: list[LayerSpec]) -> list[LayerResult]:
        code = VQCode.parse(plan.layer(members[0].name).code)
        generator = group_generator(request.seed, members[0].group)
        moment = moments[members[0].name]
        found, size = _quantize_members(request.model, members, moment, code, method, request.options, generator)
        sizes[members[0].group] = size
        return found

    results = walk_groups(request.specs, begin, quantize, progress)
    return DenseResult(request.model, plan, results, dense_bits(plan, sizes), time.monotonic() - began)


def _quantize_members(
    model: nn.Module,
    members: list[LayerSpec],
    moment: Tensor,
    code: VQCode,
    method: ComparedMethod,
    options: Options,
    generator: torch.Generator,
) -> tuple[list[LayerResult], int]:
    """Put the decoded weights of one group into the model; what came of its layers, and its bytes."""
    began = time.monotonic()
    parameters = [model.get_parameter(f"{spec.name}.weight") for spec in members]
    weights = [p.detach().flatten(1).float() for p in parameters]
    sorts = members[0].part in TOKEN_PARTS
    permutations = [w.norm(dim=1).argsort(stable=True) if sorts else torch.arange(len(w)) for w in weights]
    try:
        group = method([w[order] for w, order in zip(weights, permutations)], moment, code, options, generator)
    except MgvqError as error:
        raise type(error)(f"layer {members[0].name}: {error}") from error
    with torch.no_grad():
        for parameter, weight, order in zip(parameters, group.weights, permutations):
            parameter.copy_(weight[order.argsort()].reshape(parameter.shape))  # in place: what is tied to it follows
    size = group.bytes + (sum(_order_bytes(len(w)) for w in weights) if sorts else 0)
    seconds = time.monotonic() - began
    relative = [e / r if r > 0 else 0.0 for e, r in zip(group.errors, group.references)]
    return [LayerResult(s.name, s.part, str(code), x, seconds) for s, x in zip(members, relative)], size


def _order_bytes(rows: int) -> int:
    """Bytes of a permutation of the rows, each place in whole bytes: 2 up to 65,536 rows, 3 beyond."""
    return rows * -(-max(1, rows - 1).bit_length() // 8)


def dense_bits(plan: BitPlan, sizes: dict[str, int]) -> dict[str, BitCount]:
    """Part → cost and "total", as `bitplan.real_bits`, where `sizes` are the bytes of each group's stored form."""
    kept = kept_by_part(plan)
    counts = {}
    for part in PARTS:
        stored = [layer for layer in plan.layers if layer.part == part and not layer.tied_to]
        if stored or kept[part]:
            weights = sum(layer.rows * layer.columns for layer in stored) + kept[part]
            size = sum(sizes[group] for group in {layer.group for layer in stored}) + KEPT_BYTES * kept[part]
            counts[part] = BitCount(plan.index_bits((part,)), 8 * size / weights, size, weights)
    weights, size = (sum(getattr(c, key) for c in counts.values()) for key in ("weights", "bytes"))
    return counts | {"total": BitCount(plan.index_bits(), 8 * size / weights, size, weights)}
