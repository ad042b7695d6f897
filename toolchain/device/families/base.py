"""What a family's host half answers, and what all families share: chat template, tokenizer, batching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tokenizers import Tokenizer

from toolchain.errors import InputDataError

Feeds = dict[str, NDArray]


@dataclass(frozen=True)
class Prepared:
    """One prompt with its pictures, ready for the graphs.

    `vision_feeds` holds one set of inputs per call of the vision graph. `input_ids` int64[S] has every picture's
    placeholder repeated once per image feature. `positions` int64[axes, S]; the token after the prompt stands at
    `next_position` on every axis.
    """

    vision_feeds: tuple[Feeds, ...]
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left to one length: ids and mask int64[B, S], positions int64[axes, B, S]."""

    prompts: tuple[Prepared, ...]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    positions: NDArray[np.int64]


class Host(ABC):
    """Pictures and prompts in, graph inputs out. `settings` is the content of host.json."""

    axes: int  # position axes of the decoder: 3 for mRoPE, 1 otherwise

    def __init__(self, settings: dict[str, Any], tokenizer_json: bytes, chat_template: str) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template)

    @abstractmethod
    def prepare(self, image: Image.Image | None, prompt: str) -> Prepared:
        """Graph inputs of one prompt about at most one picture."""

    @property
    def image_token(self) -> str:
        """The placeholder that the chat template writes where a picture stands."""
        return self.settings["tokens"]["image"]

    @property
    def image_token_id(self) -> int:
        return self.settings["tokens"]["image_id"]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return tuple(self.settings["tokens"]["stop_ids"])

    @property
    def pad_id(self) -> int:
        return self.settings["tokens"]["pad_id"]

    def chat_text(self, prompt: str, with_image: bool) -> str:
        """The chat template's text for one user turn, up to where the answer starts."""
        content = ([{"type": "image"}] if with_image else []) + [{"type": "text", "text": prompt}]
        text = self._template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        if with_image and text.count(self.image_token) != 1:
            raise InputDataError(
                f"the chat template wrote {text.count(self.image_token)} times {self.image_token!r} for one picture, "
                "expected once; check chat_template.jinja and the prompt"
            )
        return text

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        """Answer text of token ids, without special tokens and outer white space."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True).strip()

    def collate(self, prompts: list[Prepared]) -> PromptBatch:
        """One batch of several prompts, padded on the left so that every answer starts at the same place."""
        longest = max(p.length for p in prompts)
        ids = np.full((len(prompts), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        positions = np.zeros((self.axes, len(prompts), longest), dtype=np.int64)
        for row, p in enumerate(prompts):
            ids[row, longest - p.length :] = p.input_ids
            mask[row, longest - p.length :] = 1
            positions[:, row, longest - p.length :] = p.positions
        return PromptBatch(tuple(prompts), ids, mask, positions)


def open_image(path: Path) -> Image.Image:
    """The picture in a file, decoded, as RGB.

    Raises:
        InputDataError: the file is missing, or is no picture that Pillow can decode whole.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputDataError(f"image {path} does not exist; check the path") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputDataError(
            f"image {path} cannot be read ({error}); expected a whole PNG, JPEG or WebP file"
        ) from None
