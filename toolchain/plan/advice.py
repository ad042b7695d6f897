"""The memory plan turned round: the largest image, context and bits that fit, and what to turn down otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolchain.bits.codebook_sharing import codebook_in
from toolchain.plan.geometry import ModelGeometry
from toolchain.plan.memory import MemoryPlan, Workload, mib, plan_memory
from toolchain.plan.target import Target
from toolchain.values import CODES, PLAIN_CODE_NAMES, BitPlan, VQCode

MAX_SIDE = 8192
MIN_CONTEXT, MAX_CONTEXT = 64, 1 << 20


@dataclass(frozen=True)
class Advice:
    """One thing to change, what it is changed to, and the peak and verdict that follow."""

    change: str
    to: str
    peak_bytes: int
    fits: bool
    text: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def largest_image(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> int:
    """Side in pixels of the largest square image that fits, the host's pixel limit lifted; 0 if none does."""
    unit = geometry.image_unit

    def fits(steps: int) -> bool:
        side = steps * unit
        lifted = dataclasses.replace(workload, image=(side, side), max_pixels=max(side * side, workload.max_pixels))
        return plan_memory(plan, geometry, target, lifted).fits

    return unit * _largest(fits, 1, MAX_SIDE // unit)


def largest_context(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> int:
    """Tokens of the largest context that fits, in steps of 64; 0 if none does."""
    lowest = MIN_CONTEXT
    if workload.image:
        image = plan_memory(plan, geometry, target, workload).image
        lowest = max(lowest, -(-(image.tokens + 1) // MIN_CONTEXT) * MIN_CONTEXT) if image else lowest

    def fits(steps: int) -> bool:
        return plan_memory(
            plan, geometry, target, dataclasses.replace(workload, context_tokens=steps * MIN_CONTEXT)
        ).fits

    return MIN_CONTEXT * _largest(fits, lowest // MIN_CONTEXT, MAX_CONTEXT // MIN_CONTEXT)


def largest_bits(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> float:
    """Index bits of the finest single code for all layers that fits; 0 if none does."""
    fitting = [
        code.index_bits
        for code in codes_to_choose(plan)
        if plan_memory(with_code(plan, str(code)), geometry, target, workload).fits
    ]
    return max(fitting, default=0.0)


def codes_to_choose(plan: BitPlan) -> tuple[VQCode, ...]:
    """The codes its method can make: plain ones, and those with overlapping windows if the plan has any such code."""
    overlapping = any(piece.vq_code.window > piece.vq_code.shift for x in plan.layers for piece in x.pieces)
    return tuple(CODES.values()) if overlapping else tuple(CODES[name] for name in PLAIN_CODE_NAMES)


def with_code(plan: BitPlan, code: str) -> BitPlan:
    """The same layers, all in one code, tables shared as they were."""
    layers = [
        dataclasses.replace(layer, code=code, table=codebook_in(layer, VQCode.parse(code))) for layer in plan.layers
    ]
    return dataclasses.replace(plan, layers=tuple(layers))


def advise(plan: BitPlan, geometry: ModelGeometry, target: Target, memory: MemoryPlan) -> tuple[Advice, ...]:
    """What to change, each with the peak that follows. For a plan that fits, only what the board must be set to."""
    if memory.fits:
        return _board_advice(target, memory)
    workload = memory.workload
    smaller = _smaller_image(plan, geometry, target, workload)
    shorter = _other_context(plan, geometry, target, workload)
    smallest = min(codes_to_choose(plan), key=lambda code: (code.index_bits, code.codebook_bytes))
    coarser = with_code(plan, str(smallest))
    found = []
    if smaller.image != workload.image and smaller.image:
        found.append(_advice("image", "{}x{}".format(*smaller.image), plan_memory(plan, geometry, target, smaller)))
    if shorter.context_tokens != workload.context_tokens:
        found.append(
            _advice("context", f"{shorter.context_tokens} tokens", plan_memory(plan, geometry, target, shorter))
        )
    if coarser.index_bits() < plan.index_bits():
        result = plan_memory(coarser, geometry, target, workload)
        found.append(_advice("bits", f"{smallest.index_bits:g} bits in every layer", result))
    if not any(advice.fits for advice in found):
        tight = _other_context(coarser, geometry, target, _smaller_image(coarser, geometry, target, workload))
        image = "{}x{}".format(*tight.image) if tight.image else "no image"
        to = f"{smallest.index_bits:g} bits, {image}, {tight.context_tokens} tokens"
        found.append(_advice("bits, image and context", to, plan_memory(coarser, geometry, target, tight)))
    if not any(advice.fits for advice in found):
        least = mib(found[-1].peak_bytes)
        text = f"choose a smaller model or a board with more memory: with everything turned down it takes {least}"
        found.append(Advice("target", "a larger board", found[-1].peak_bytes, False, text))
    return tuple(found)


def _smaller_image(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> Workload:
    """The asked-for image, or the largest square that fits; the smallest there is where none does."""
    if not workload.image or plan_memory(plan, geometry, target, workload).fits:
        return workload
    side = largest_image(plan, geometry, target, workload) or geometry.image_unit
    if side * side >= workload.image[0] * workload.image[1]:
        return workload
    return dataclasses.replace(workload, image=(side, side))


def _other_context(plan: BitPlan, geometry: ModelGeometry, target: Target, workload: Workload) -> Workload:
    """The asked-for context, or the largest that fits; where the image needs a longer one, that."""
    memory = plan_memory(plan, geometry, target, workload)
    if memory.fits:
        return workload
    if memory.image and memory.image.tokens >= workload.context_tokens:
        needed = -(-(memory.image.tokens + workload.prompt_tokens) // MIN_CONTEXT) * MIN_CONTEXT
        return dataclasses.replace(workload, context_tokens=needed)
    tokens = largest_context(plan, geometry, target, workload) or min(MIN_CONTEXT, workload.context_tokens)
    return dataclasses.replace(workload, context_tokens=tokens)


def _advice(change: str, to: str, result: MemoryPlan) -> Advice:
    ending = "which fits" if result.fits else f"which is still too much: {result.problems[0]}"
    text = f"{change} to {to}: takes {mib(result.peak_bytes)} of {mib(result.usable_bytes)}, {ending}"
    return Advice(change, to, result.peak_bytes, result.fits, text)


def _board_advice(target: Target, memory: MemoryPlan) -> tuple[Advice, ...]:
    found = []
    if memory.largest_block_bytes > target.largest_block_default_bytes:
        pool = f"cma={target.largest_block_bytes >> 20}M"
        text = (
            f"boot the board with {pool}: {memory.largest_block[0]} may want {mib(memory.largest_block_bytes)} in one "
            f"block, and it gives {mib(target.largest_block_default_bytes)} by default"
        )
        found.append(Advice("kernel argument", pool, memory.peak_bytes, True, text))
    if max(memory.peak_bytes, memory.build_peak_bytes) > target.memory_usable_desktop_bytes:
        text = (
            f"run the board without a desktop (sudo systemctl set-default multi-user.target): "
            f"{mib(memory.peak_bytes)} do not fit the {mib(target.memory_usable_desktop_bytes)} a desktop leaves"
        )
        found.append(Advice("desktop", "text mode", memory.peak_bytes, True, text))
    return tuple(found)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in low..high that fits, for a `fits` that holds up to some point; 0 if `low` does not."""
    if low > high or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
