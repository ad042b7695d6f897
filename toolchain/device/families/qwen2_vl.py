"""Qwen2-VL's host half: dynamic resolution patches, one vision token per 2x2 patches, three-axis positions (mRoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.device.families.base import Feeds, Host
from toolchain.device.families.images import grid_position_ids, patches_from_image
from toolchain.plan.images import ImagePlan


class Qwen2VLHost(Host):
    axes = 3

    def __init__(self, settings: dict[str, Any], tokenizer_json: bytes, chat_template: str) -> None:
        super().__init__(settings, tokenizer_json, chat_template)
        self.plan = ImagePlan(**settings["image"])

    def image_feeds(self, image: Image.Image) -> Feeds:
        patches, grid = patches_from_image(image, self.plan)
        return {"pixel_values": patches, "position_ids": grid_position_ids(*grid, self.plan)}

    def image_tokens(self, feeds: Feeds) -> int:
        return feeds["pixel_values"].shape[0] // self.plan.merge**2

    def image_text(self, tokens: int) -> str:
        return self.image_token * tokens

    def positions(
        self, ids: NDArray[np.int64], places: Sequence[tuple[int, int]], feeds: Sequence[Feeds]
    ) -> NDArray[np.int64]:
        """Text counts up on all axes; image tokens share time, and carry row and column.

        What follows an image goes on from the larger side of its token grid (Qwen2-VL, arXiv 2409.12191, 2.1).
        """
        positions = np.empty((3, len(ids)), dtype=np.int64)
        done = following = 0
        for (start, end), each in zip(places, feeds):
            positions[:, done:start] = np.arange(start - done) + following
            first = following + start - done
            rows, columns = (each["position_ids"].max(axis=0) + 1) // self.plan.merge
            row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
            positions[0, start:end] = first
            positions[1, start:end] = first + row.reshape(-1)
            positions[2, start:end] = first + column.reshape(-1)
            done, following = end, first + int(max(rows, columns))
        positions[:, done:] = np.arange(len(ids) - done) + following
        return positions
