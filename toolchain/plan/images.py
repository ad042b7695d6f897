"""The size an image is worked at: what a family's rule makes of its sides, before any pixel is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolchain.errors import InputDataError

# CLIP's statistics, the ones Qwen2-VL's processor config carries.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImagePlan:
    """How one family cuts images into patches. Pixels are counted after resizing."""

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    frames: int = 2
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def resized_shape(height: int, width: int, plan: ImagePlan) -> tuple[int, int]:
    """(height, width) after resizing: multiples of patch * merge, between min_pixels and max_pixels in all.

    Raises:
        InputDataError: the sides differ by more than a factor of 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise InputDataError(f"image of {width}x{height} pixels: sides may differ by a factor of 200 at most; crop it")
    unit = plan.patch * plan.merge
    tall, wide = round(height / unit) * unit, round(width / unit) * unit
    if tall * wide > plan.max_pixels:
        shrink = math.sqrt(height * width / plan.max_pixels)
        tall = max(unit, math.floor(height / shrink / unit) * unit)
        wide = max(unit, math.floor(width / shrink / unit) * unit)
    elif tall * wide < plan.min_pixels:
        grow = math.sqrt(plan.min_pixels / (height * width))
        tall, wide = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return tall, wide


def tile_grid(width: int, height: int, side: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of tiles: nearest the image's shape; of equally near ones, the larger that it half fills."""
    shapes = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1)]
    shapes = sorted((s for s in shapes if min_tiles <= s[0] * s[1] <= max_tiles), key=lambda s: s[0] * s[1])
    best, best_distance = (1, 1), float("inf")
    for columns, rows in shapes:
        distance = abs(width / height - columns / rows)
        fills_half = width * height > 0.5 * side * side * columns * rows
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = (columns, rows), distance
    return best
