"""Qwen2-VL's host half: dynamic resolution patches, one vision token per 2x2 patches, three-axis positions (mRoPE)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.device.families.base import Host, Prepared
from toolchain.device.images import ImagePlan, grid_position_ids, patches_from_image


class Qwen2VLHost(Host):
    axes = 3

    def __init__(self, settings: dict[str, Any], tokenizer_json: bytes, chat_template: str) -> None:
        super().__init__(settings, tokenizer_json, chat_template)
        self.plan = ImagePlan(**settings["image"])

    def prepare(self, image: Image.Image | None, prompt: str) -> Prepared:
        text = self.chat_text(prompt, image is not None)
        if image is None:
            ids = self.encode(text)
            positions = np.broadcast_to(np.arange(len(ids)), (3, len(ids))).astype(np.int64)
            return Prepared((), ids, positions, len(ids))
        patches, grid = patches_from_image(image, self.plan)
        tokens = patches.shape[0] // self.plan.merge**2
        ids = self.encode(text.replace(self.image_token, self.image_token * tokens))
        feeds = {"pixel_values": patches, "position_ids": grid_position_ids(*grid, self.plan)}
        positions = self._positions(ids, grid)
        return Prepared((feeds,), ids, positions, int(positions.max()) + 1)

    def _positions(self, ids: NDArray[np.int64], grid: tuple[int, int]) -> NDArray[np.int64]:
        """int64[3, S]: text counts up on all axes; picture tokens share time, and carry row and column.

        The text after a picture goes on from the larger side of its token grid (Qwen2-VL, arXiv 2409.12191, 2.1).
        """
        rows, columns = grid[0] // self.plan.merge, grid[1] // self.plan.merge
        first = int(np.argmax(ids == self.image_token_id))
        after = first + rows * columns
        positions = np.empty((3, len(ids)), dtype=np.int64)
        positions[:, :first] = np.arange(first)
        row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        positions[0, first:after] = first
        positions[1, first:after] = first + row.reshape(-1)
        positions[2, first:after] = first + column.reshape(-1)
        positions[:, after:] = np.arange(len(ids) - after) + first + max(rows, columns)
        return positions
