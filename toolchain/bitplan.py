"""Which code every layer gets, and what that costs in bits and bytes. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from toolchain.errors import UsageError
from toolchain.values import CODE_NAMES, CODES, PARTS, BitPlan, LayerPlan, LayerSpec

# Without a requested average. The decoder carries most of the weights and stands 2 bits; what is small, or is read by
# everything after it, gets more.
DEFAULT_CODES = {
    "language": "4,8,8",
    "vision": "2,6,6",
    "projector": "2,8,8",
    "embedding": "2,6,6",
    "head": "2,6,6",
}
CODES_BY_BITS: dict[float, str] = {2: "4,8,8", 3: "2,6,6", 4: "2,8,8"}
# The same bits and less error for a longer search.
OVERLAPPING_BY_BITS: dict[float, str] = {2: "2,4,8", 3: "2,6,8", 4: "2,8,9"}
LOWEST_BITS, HIGHEST_BITS = 2.0, 4.0
KEPT_BYTES = 2  # a tensor that stays is stored in 16 bits


@dataclass(frozen=True)
class BitCount:
    """What some parts cost.

    `index` counts code bits of quantized weights alone (what papers quote); `real` counts every stored bit over every
    weight, quantized or kept: padded codes, tables, scales, kept tensors; `bytes` is the sum.
    """

    index: float
    real: float
    bytes: int
    weights: int


def plan(
    specs: Iterable[LayerSpec],
    kept: Mapping[str, int],
    *,
    bits: float | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    sensitivity: Mapping[str, float] | None = None,
    overlapping: bool = False,
) -> BitPlan:
    """A code for every layer; layers of a group, and a layer and what it is tied to, share code and table.

    Without `bits` every part has its default. With it, index bits averaged over the stored quantized weights stay at
    or below `bits`: all groups start at 2 bits and the upgrade that takes most loss per bit is bought while it fits,
    the loss at b bits taken as sensitivity · 4⁻ᵇ. A group without a sensitivity counts as an average one of its size;
    among equals the smallest goes first, so that as many layers as possible are raised.

    Args:
        kept: name → element count of every tensor that stays in 16 bits.
        overrides: (glob pattern of layer names, code "V,k,L"); the last that matches wins.
        sensitivity: group → loss at 2 bits, in any one unit.
        overlapping: codes with overlapping windows wherever no override names one.

    Raises:
        UsageError: bits out of range, a pattern that matches nothing or splits a group, an unknown code, or overrides
            that alone exceed `bits`.
    """
    layers = tuple(specs)
    groups = _groups(layers)
    fixed = _overridden(layers, groups, tuple(overrides))
    if bits is None:
        wanted = {group: CODES[DEFAULT_CODES[members[0].part]].index_bits for group, members in groups.items()}
    else:
        wanted = _allocate(groups, fixed, bits, sensitivity or {})
    by_bits = OVERLAPPING_BY_BITS if overlapping else CODES_BY_BITS
    codes = {group: fixed.get(group) or by_bits[wanted[group]] for group in groups}
    tables = {group: f"t{index}" for index, group in enumerate(groups)}
    group_of = {spec.name: group for group, members in groups.items() for spec in members}
    planned = tuple(
        LayerPlan(
            spec.name,
            spec.part,
            spec.kind,
            spec.rows,
            spec.columns,
            spec.group,
            codes[group_of[spec.name]],
            tables[group_of[spec.name]],
            spec.tied_to,
        )
        for spec in layers
    )
    return BitPlan(planned, dict(kept), bits)


def _groups(layers: tuple[LayerSpec, ...]) -> dict[str, list[LayerSpec]]:
    """Group → members, those that store codes first; a tied layer belongs to the group of what it is tied to."""
    by_name = {spec.name: spec for spec in layers}
    groups: dict[str, list[LayerSpec]] = {}
    for spec in layers:
        if not spec.tied_to:
            groups.setdefault(spec.group, []).append(spec)
    for spec in layers:
        if spec.tied_to:
            groups[by_name[spec.tied_to].group].append(spec)
    return groups


def _overridden(
    layers: tuple[LayerSpec, ...], groups: dict[str, list[LayerSpec]], overrides: tuple[tuple[str, str], ...]
) -> dict[str, str]:
    """Group → code, where an override says one."""
    chosen: dict[str, str] = {}
    for pattern, code in overrides:
        if code not in CODES:
            raise UsageError(f"override {pattern}={code}: unknown code; use one of {' '.join(CODE_NAMES)}")
        matched = [spec.name for spec in layers if fnmatchcase(spec.name, pattern)]
        if not matched:
            raise UsageError(f"override {pattern}={code}: matches no layer; see the layer names with `mgvq inspect`")
        chosen |= dict.fromkeys(matched, code)
    fixed: dict[str, str] = {}
    for group, members in groups.items():
        found = {chosen.get(spec.name) for spec in members}
        if len(found) > 1:
            names = ", ".join(f"{spec.name} {chosen.get(spec.name, '(none)')}" for spec in members)
            raise UsageError(f"group {group} runs as one node and has one code, but the overrides give: {names}")
        if override := found.pop():
            fixed[group] = override
    return fixed


def _stored_weights(members: list[LayerSpec]) -> int:
    return sum(spec.rows * spec.columns for spec in members if not spec.tied_to)


def _allocate(
    groups: dict[str, list[LayerSpec]], fixed: dict[str, str], bits: float, sensitivity: Mapping[str, float]
) -> dict[str, float]:
    """Group that no override fixes → its index bits, at most `bits` on average over all groups."""
    if not LOWEST_BITS <= bits <= HIGHEST_BITS:
        raise UsageError(
            f"bits {bits:g}: expected {LOWEST_BITS:g} to {HIGHEST_BITS:g} for now, "
            f"the range that the codes {' '.join(CODES_BY_BITS.values())} span; an override may name any code"
        )
    weights = {group: _stored_weights(members) for group, members in groups.items()}
    allowed = bits * sum(weights.values()) + 1e-6
    spent = sum(weights[g] * (CODES[fixed[g]].index_bits if g in fixed else LOWEST_BITS) for g in groups)
    if spent > allowed:
        average = spent / sum(weights.values())
        raise UsageError(f"bits {bits:g}: the overrides alone come to {average:.3f}; ask for more, or override less")
    per_weight = _loss_per_weight(weights, sensitivity)
    level: dict[str, float] = {group: LOWEST_BITS for group in groups if group not in fixed}
    order = {group: index for index, group in enumerate(groups)}
    while True:
        open_groups = [g for g in level if level[g] + 1 in CODES_BY_BITS and spent + weights[g] <= allowed]
        if not open_groups:
            break
        best = max(open_groups, key=lambda g: (per_weight[g] / 4 ** level[g], -weights[g], -order[g]))
        level[best] += 1
        spent += weights[best]
    return level


def _loss_per_weight(weights: dict[str, int], sensitivity: Mapping[str, float]) -> dict[str, float]:
    unknown = sorted(set(sensitivity) - set(weights))
    if unknown:
        raise UsageError(f"sensitivity names groups that the model lacks: {', '.join(unknown[:3])}")
    known = [sensitivity[group] / weights[group] for group in sensitivity]
    average = sum(known) / len(known) if known else 1.0
    return {group: sensitivity[group] / weights[group] if group in sensitivity else average for group in weights}


def part_of_kept(name: str, layers: Iterable[LayerPlan]) -> str:
    """The part a kept tensor belongs to: that of the quantized layers whose names share most of its leading path."""
    best, votes = -1, dict.fromkeys(PARTS, 0)
    path = name.split(".")
    for layer in layers:
        other = layer.name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(path, other)) if a != b), min(len(path), len(other)))
        if shared > best:
            best, votes = shared, dict.fromkeys(PARTS, 0)
        if shared == best:
            votes[layer.part] += 1
    return max(PARTS, key=lambda part: votes[part])


def real_bits(bit_plan: BitPlan, parts: Iterable[str] | None = None) -> dict[str, BitCount]:
    """Part → cost, for the parts that have weights, and "total" over them.

    Args:
        parts: the parts to count; all when None. `("language",)` gives the language model alone.
    """
    wanted = tuple(PARTS if parts is None else parts)
    kept = dict.fromkeys(PARTS, 0)
    for name, count in bit_plan.kept.items():
        kept[part_of_kept(name, bit_plan.layers)] += count
    counts = {}
    for part in wanted:
        stored = [layer for layer in bit_plan.layers if layer.part == part and not layer.tied_to]
        if stored or kept[part]:
            counts[part] = _count(stored, kept[part])
    stored = [layer for layer in bit_plan.layers if layer.part in wanted and not layer.tied_to]
    return counts | {"total": _count(stored, sum(kept[part] for part in wanted))}


def _count(stored: list[LayerPlan], kept: int) -> BitCount:
    quantized = sum(layer.rows * layer.columns for layer in stored)
    tables = {layer.table: layer.vq_code.table_bytes for layer in stored}
    size = sum(layer.codes_bytes + layer.scales_bytes for layer in stored) + sum(tables.values()) + KEPT_BYTES * kept
    index = sum(layer.rows * layer.columns * layer.vq_code.index_bits for layer in stored)
    weights = quantized + kept
    return BitCount(index / quantized if quantized else 0.0, 8 * size / weights if weights else 0.0, size, weights)
