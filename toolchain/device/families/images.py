"""Images to vision-tower patches, with NumPy and Pillow alone, equal to the checkpoint's own image processor.

Qwen2-VL's rule: resize (bicubic) to the nearest multiples of patch * merge that keep the pixel count in range,
normalise, repeat the frame along time, and cut into patches ordered so that each merge block is contiguous.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from toolchain.plan.images import ImagePlan, resized_shape


def patches_from_image(image: Image.Image, plan: ImagePlan) -> tuple[np.ndarray, tuple[int, int]]:
    """(patches float32[N, 3 * frames * patch²], (rows, columns) of the patch grid) of one image."""
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
