"""InternVL's host half: images cut into square tiles of one size plus a thumbnail, plain positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.device.families.base import Feeds, Host
from toolchain.plan.images import tile_grid


class InternVLHost(Host):
    axes = 1

    def image_feeds(self, image: Image.Image) -> Feeds:
        return {"pixel_values": self.tiles(image)}

    def image_tokens(self, feeds: Feeds) -> int:
        return self.settings["image"]["tokens_per_tile"] * feeds["pixel_values"].shape[0]

    def image_text(self, tokens: int) -> str:
        start, end = self.settings["tokens"]["image_start"], self.settings["tokens"]["image_end"]
        return start + self.image_token * tokens + end

    def positions(
        self, ids: NDArray[np.int64], places: Sequence[tuple[int, int]], feeds: Sequence[Feeds]
    ) -> NDArray[np.int64]:
        return np.arange(len(ids), dtype=np.int64)[None]

    def tiles(self, image: Image.Image) -> NDArray[np.float32]:
        """float32[T, 3, side, side]: tiles in reading order, then the whole image as a thumbnail when T > 1."""
        settings = self.settings["image"]
        side = settings["tile"]
        columns, rows = tile_grid(image.width, image.height, side, settings["min_tiles"], settings["max_tiles"])
        canvas = image.convert("RGB").resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        boxes = [(c * side, r * side, (c + 1) * side, (r + 1) * side) for r in range(rows) for c in range(columns)]
        pieces = [canvas.crop(box) for box in boxes]
        if len(pieces) > 1:
            pieces.append(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        pixels = np.stack([np.asarray(p, dtype=np.float32).transpose(2, 0, 1) for p in pieces]) / np.float32(255)
        mean, std = (np.asarray(settings[k], dtype=np.float32)[:, None, None] for k in ("mean", "std"))
        return (pixels - mean) / std
