"""What a family's host half answers, and what all families share: chat template, tokenizer, batching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer

from toolchain.errors import InputDataError

Feeds = dict[str, NDArray]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: who speaks ("system", "user" or "assistant"), the images, then the text."""

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """One prompt with its images, ready for the graphs.

    `vision_feeds` holds one set of inputs per image, a call of the vision graph each. `input_ids` int64[S] has every
    image's placeholder repeated once per image feature; `image_places` says where: [start, end) per image.
    `positions` int64[axes, S]; the token after the prompt stands at `next_position` on every axis.
    """

    vision_feeds: tuple[Feeds, ...]
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    next_position: int
    image_places: tuple[tuple[int, int], ...] = ()

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
    """Images and prompts in, graph inputs out. `settings` is the content of host.json."""

    axes: int  # position axes of the decoder: 3 for mRoPE, 1 otherwise

    def __init__(self, settings: dict[str, Any], tokenizer_json: bytes, chat_template: str) -> None:
        self.settings = settings
        self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        # As transformers renders templates: these blocks, loop controls, and a way for a template to refuse.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse_conversation
        self._template = environment.from_string(chat_template)

    @abstractmethod
    def image_feeds(self, image: Image.Image) -> Feeds:
        """Inputs of one call of the vision graph for one image."""

    @abstractmethod
    def image_tokens(self, feeds: Feeds) -> int:
        """How many features the vision graph gives for them, each a token of the context."""

    @abstractmethod
    def image_text(self, tokens: int) -> str:
        """What stands in the text for an image of so many tokens, where the template writes one placeholder."""

    @abstractmethod
    def positions(
        self, ids: NDArray[np.int64], places: Sequence[tuple[int, int]], feeds: Sequence[Feeds]
    ) -> NDArray[np.int64]:
        """int64[axes, S]: where every token stands, given the places of the images and their feeds."""

    def prepare(self, image: Image.Image | None, prompt: str) -> Prepared:
        """Graph inputs of one prompt about at most one image."""
        return self.prepare_turns([Turn("user", prompt, () if image is None else (image,))])

    def prepare_turns(self, turns: Sequence[Turn], feeds: Sequence[Feeds] | None = None) -> Prepared:
        """Graph inputs of a conversation, up to where the next answer starts.

        Args:
            feeds: `image_feeds` of all images in order, where they are known already.

        Raises:
            InputDataError: the template refuses the turns, or writes another number of placeholders than images.
        """
        images = [image for turn in turns for image in turn.images]
        feeds = [self.image_feeds(image) for image in images] if feeds is None else feeds
        counts = [self.image_tokens(each) for each in feeds]
        pieces = self.turns_text(turns).split(self.image_token)
        text = pieces[0] + "".join(self.image_text(n) + piece for n, piece in zip(counts, pieces[1:]))
        ids = self.encode(text)
        places = self._places(ids, counts)
        positions = self.positions(ids, places, feeds)
        return Prepared(tuple(feeds), ids, positions, int(positions.max()) + 1, places)

    @property
    def image_token(self) -> str:
        """The placeholder that the chat template writes where an image stands."""
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

    def turns_text(self, turns: Sequence[Turn]) -> str:
        """The chat template's text for a conversation, one placeholder an image, up to where the answer starts."""
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as error:
            raise InputDataError(
                f"the chat template refuses this conversation ({error}); check chat_template.jinja and the turns"
            ) from None
        found, expected = text.count(self.image_token), sum(len(turn.images) for turn in turns)
        if found != expected:
            raise InputDataError(
                f"the chat template wrote {found} times {self.image_token!r} for {expected} images, expected once "
                "each; check chat_template.jinja and the prompt"
            )
        return text

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
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

    def _places(self, ids: NDArray[np.int64], counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """[start, end) of every image's tokens in `ids`."""
        found, places, first = np.flatnonzero(ids == self.image_token_id), [], 0
        for count in counts:
            run = found[first : first + count]
            if len(run) < count or run[-1] - run[0] + 1 != count:
                break
            places.append((int(run[0]), int(run[-1]) + 1))
            first += count
        if len(places) < len(counts) or first != len(found):
            raise InputDataError(
                f"expected {sum(counts)} tokens {self.image_token!r} for {len(counts)} images, the tokenizer made "
                f"{len(found)}; check tokenizer.json and the prompt"
            )
        return tuple(places)


def _content(turn: Turn) -> list[dict[str, str]]:
    """A turn's parts as templates of VLMs expect them; an answer is text as well."""
    return [{"type": "image"}] * len(turn.images) + [{"type": "text", "text": turn.text}]


def _refuse_conversation(message: str) -> NoReturn:
    raise TemplateError(message)


def open_image(path: Path) -> Image.Image:
    """The image in a file, decoded, turned as its EXIF says, as RGB: what transformers' load_image gives.

    Raises:
        InputDataError: the file is missing, or is no image that Pillow can decode whole.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise InputDataError(f"image {path} does not exist; check the path") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputDataError(
            f"image {path} cannot be read ({error}); expected a whole PNG, JPEG or WebP file"
        ) from None
