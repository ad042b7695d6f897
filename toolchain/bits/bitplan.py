"""Which code every layer gets, and what that costs in bits and bytes. No framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from toolchain.bits.allocation import (
    OVERLAPPING_BY_BITS,
    Group,
    Losses,
    codes_for_average,
    codes_for_bytes,
    codes_for_losses,
    is_known_format,
    modelled_losses,
)
from toolchain.bits.codebook_sharing import GROUP, check_choice, codebook_owner, shared_codebook_id
from toolchain.errors import UnsupportedError, UsageError
from toolchain.values import CODE_NAMES, CODES, PARTS, BitPlan, LayerPlan, LayerSpec, parse_format

# Without a requested average. The decoder carries most of the weights and stands 2 bits; what is small, or is read by
# everything after it, gets more.
DEFAULT_CODES = {
    "language": "4,8,8",
    "vision": "2,6,6",
    "projector": "2,8,8",
    "embedding": "2,6,6",
    "head": "2,6,6",
}
KEPT_BYTES = 2  # a tensor that stays is stored in 16 bits


@dataclass(frozen=True)
class BitCount:
    """What some parts cost.

    `index` counts code bits of quantized weights alone (what papers quote); `real` counts every stored bit over every
    weight, quantized or kept: padded codes, codebooks, scales, kept tensors; `bytes` is the sum.
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
    budget_bytes: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    sensitivity: Mapping[str, float] | None = None,
    losses: Losses | None = None,
    overlapping: bool = False,
    codebooks: str = GROUP,
) -> BitPlan:
    """A code for every layer; layers of a group, and a layer and what it is tied to, share code and codebook.

    With neither `bits` nor `budget_bytes` every part has its default. With `losses` every group gets the one of its
    codes that makes the losses' sum the least within either (`bits.knapsack`). Without them the loss at b bits is taken
    as sensitivity · 4⁻ᵇ, an average one where a group has none; under `bits` it is then bought down greedily and all
    that fits is bought.

    Args:
        kept: name → element count of every tensor that stays in 16 bits.
        bits: most index bits, averaged over the stored quantized weights.
        budget_bytes: most bytes of the whole model as `real_bits` counts them: padded codes, codebooks, scales, and
            what stays in 16 bits.
        overrides: (glob pattern of layer names, code "V,k,L" or segments as `values.parse_format` reads them); the
            last that matches wins.
        sensitivity: group → loss at 2 bits, in any one unit.
        losses: group → code or segments → loss, in any one unit; every group that no override fixes chooses among
            its own.
        overlapping: codes with overlapping windows wherever neither an override nor losses name one.
        codebooks: whose they are, one of `codebook_sharing.CHOICES`; one that groups share counts once.

    Raises:
        UsageError: both bits and budget_bytes, both sensitivity and losses, or one of these with nothing to plan for;
            bits out of range or less than overrides and losses allow; a pattern that matches nothing or splits a
            group; an unknown code or group.
        BudgetError: even the smallest codes exceed `budget_bytes`.
        NumericGateError: a loss is negative or not finite.
    """
    _check_request(bits, budget_bytes, sensitivity, losses)
    check_choice(codebooks)
    layers = tuple(specs)
    members = _groups(layers)
    fixed = _overridden(layers, members, tuple(overrides))
    owners = {name: codebook_owner(codebooks, specs[0]) for name, specs in members.items()}
    groups = {name: Group(_stored_shapes(specs), fixed.get(name), owners[name]) for name, specs in members.items()}
    if budget_bytes is not None:
        offered = modelled_losses(groups, sensitivity or {}, overlapping) if losses is None else losses
        codes = codes_for_bytes(groups, offered, budget_bytes, KEPT_BYTES * sum(kept.values()))
    elif bits is not None and losses is not None:
        codes = codes_for_losses(groups, losses, bits)
    elif bits is not None:
        codes = codes_for_average(groups, bits, sensitivity or {}, overlapping)
    else:
        codes = {name: fixed.get(name) or _default_code(specs[0], overlapping) for name, specs in members.items()}
    return BitPlan(_planned(layers, members, codes, owners), dict(kept), bits)


def _check_request(
    bits: float | None, budget_bytes: int | None, sensitivity: Mapping[str, float] | None, losses: Losses | None
) -> None:
    if bits is not None and budget_bytes is not None:
        raise UsageError(f"bits {bits:g} and a budget of {budget_bytes:,} bytes: a plan is made for one; leave one out")
    if sensitivity is not None and losses is not None:
        raise UsageError("sensitivity and losses both say what a code costs; give one of them")
    if bits is None and budget_bytes is None and (sensitivity is not None or losses is not None):
        raise UsageError("sensitivity and losses choose codes under a limit; give bits or budget_bytes with them")


def _default_code(spec: LayerSpec, overlapping: bool) -> str:
    plain = DEFAULT_CODES[spec.part]
    return OVERLAPPING_BY_BITS[CODES[plain].index_bits] if overlapping else plain


def _planned(
    layers: tuple[LayerSpec, ...],
    members: dict[str, list[LayerSpec]],
    codes: dict[str, str],
    owners: dict[str, str | None],
) -> tuple[LayerPlan, ...]:
    """The layers with their groups' codes, and the codebooks of the groups or of their owners."""
    group_of = {spec.name: name for name, specs in members.items() for spec in specs}
    codebooks = {
        name: _shared_ids(owner, codes[name], members[name][0].columns) if (owner := owners[name]) else f"t{index}"
        for index, name in enumerate(members)
    }
    planned = []
    for spec in layers:
        code, codebook = codes[group_of[spec.name]], codebooks[group_of[spec.name]]
        planned.append(
            LayerPlan(
                spec.name, spec.part, spec.kind, spec.rows, spec.columns, spec.group, code, codebook, spec.tied_to
            )
        )
    return tuple(planned)


def _shared_ids(owner: str, code: str, columns: int) -> str:
    """The ids of an owner's codebooks for a code or its segments, as `LayerPlan.codebook` holds them."""
    return "+".join(shared_codebook_id(owner, segment.code) for segment in parse_format(code, columns))


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
        if not is_known_format(code):
            raise UsageError(
                f"override {pattern}={code}: unknown code; use one of {' '.join(CODE_NAMES)}, or segments of them such "
                "as 2,6,8@64+2,4,8"
            )
        matched = [spec for spec in layers if fnmatchcase(spec.name, pattern)]
        if not matched:
            raise UsageError(f"override {pattern}={code}: matches no layer; see the layer names with `mgvq inspect`")
        for spec in matched:
            _check_segments(spec, code)
        chosen |= {spec.name: code for spec in matched}
    fixed: dict[str, str] = {}
    for group, members in groups.items():
        found = {chosen.get(spec.name) for spec in members}
        if len(found) > 1:
            names = ", ".join(f"{spec.name} {chosen.get(spec.name, '(none)')}" for spec in members)
            raise UsageError(f"group {group} runs as one node and has one code, but the overrides give: {names}")
        if override := found.pop():
            fixed[group] = override
    return fixed


def _check_segments(spec: LayerSpec, code: str) -> None:
    """Refuse segments of what is no linear, or that do not fit it."""
    if "+" not in code:
        return
    if spec.kind != "linear" or spec.tied_to:
        raise UsageError(
            f"layer {spec.name}: only untied linears are cut into segments, found {code}; give it one code"
        )
    try:
        parse_format(code, spec.columns)
    except UnsupportedError as error:
        raise UsageError(f"layer {spec.name}: {error}") from None


def _stored_shapes(specs: list[LayerSpec]) -> tuple[tuple[int, int], ...]:
    return tuple((spec.rows, spec.columns) for spec in specs if not spec.tied_to)


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
    kept = kept_by_part(bit_plan)
    counts = {}
    for part in wanted:
        stored = [layer for layer in bit_plan.layers if layer.part == part and not layer.tied_to]
        if stored or kept[part]:
            counts[part] = _count(stored, kept[part])
    stored = [layer for layer in bit_plan.layers if layer.part in wanted and not layer.tied_to]
    return counts | {"total": _count(stored, sum(kept[part] for part in wanted))}


def kept_by_part(bit_plan: BitPlan) -> dict[str, int]:
    """Part → how many of its elements stay in 16 bits; every part is there."""
    kept = dict.fromkeys(PARTS, 0)
    for name, count in bit_plan.kept.items():
        kept[part_of_kept(name, bit_plan.layers)] += count
    return kept


def _count(stored: list[LayerPlan], kept: int) -> BitCount:
    quantized = sum(layer.rows * layer.columns for layer in stored)
    codebooks = {piece.table: piece.vq_code.codebook_bytes for layer in stored for piece in layer.pieces}
    size = sum(layer.codes_bytes + layer.scales_bytes for layer in stored) + sum(codebooks.values()) + KEPT_BYTES * kept
    index = sum(layer.rows * layer.columns * layer.index_bits for layer in stored)
    weights = quantized + kept
    return BitCount(index / quantized if quantized else 0.0, 8 * size / weights if weights else 0.0, size, weights)
