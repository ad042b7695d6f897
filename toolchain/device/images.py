"""Pictures to vision-tower patches, with NumPy and Pillow alone, equal to the checkpoint's own image processor.

Qwen2-VL's rule: resize (bicubic) to the nearest multiples of patch * merge that keep the pixel count in range,
normalise, repeat the frame along time, and cut into patches ordered so that each merge block is contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from toolchain.errors import InputDataError

# CLIP's statistics, the ones Qwen2-VL's processor config carries.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImagePlan:
    """How one family cuts pictures into patches. Pixels are counted after resizing."""

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
        raise InputDataError(
            f"picture of {width}x{height} pixels: sides may differ by a factor of 200 at most; crop it"
        )
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


def patches_from_image(image: Image.Image, plan: ImagePlan) -> tuple[np.ndarray, tuple[int, int]]:
    """(patches float32[N, 3 * frames * patch²], (rows, columns) of the patch grid) of one picture."""
    image = image.convert("RGB")
    height, width = resized_shape(image.height, image.width, plan)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (plan.mean, plan.std))
    pixels = (pixels - mean) / std
    rows, columns, m, p = height // plan.patch, width // plan.patch, plan.merge, plan.patch
    blocks = pixels.reshape(3, rows // m, m, p, columns // m, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    frames = np.repeat(blocks[:, :, :, :, :, None], plan.frames, axis=5)
    return np.ascontiguousarray(frames.reshape(rows * columns, -1)), (rows, columns)


def grid_position_ids(rows: int, columns: int, plan: ImagePlan) -> np.ndarray:
    """int64[N, 2]: (row, column) of every patch, in the order of `patches_from_image`."""
    m = plan.merge
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    order = [a.reshape(rows // m, m, columns // m, m).transpose(0, 2, 1, 3).reshape(-1) for a in (row, column)]
    return np.stack(order, axis=1).astype(np.int64)
