"""A conversation about images on a runner: what it holds already is not computed again.

Every turn renders the whole conversation by the chat template, as the model was trained to read it. The tokens that
equal those held, at the same positions and with the same images, stay; the rest is forgotten and fed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.device.families.base import Feeds, Host, Prepared, Turn
from toolchain.device.generation.generate import Generated, Logits, Runner, TextStream, generate
from toolchain.device.generation.limits import Limits
from toolchain.device.generation.sampling import Sampler


@dataclass(frozen=True)
class Reply:
    """One answer: its text and tokens, how the prompt was made up, and seconds to the first token and in all."""

    text: str
    ids: tuple[int, ...]
    stopped: bool
    prompt_tokens: int
    image_tokens: int
    reused_tokens: int
    first_token_seconds: float
    seconds: float


class Conversation:
    """Turns so far, on one runner. A turn that is refused leaves it as it was."""

    def __init__(self, host: Host, runner: Runner, limits: Limits) -> None:
        self.host, self.limits = host, limits
        self.turns: list[Turn] = []
        self._feeds: list[Feeds] = []
        self._held = HeldPrefix(runner)

    def ask(
        self,
        text: str,
        images: Sequence[tuple[str, Image.Image]] = (),
        sampler: Sampler | None = None,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """The answer to one more question, with (name, image) pairs before its text.

        `on_text` gets the answer piece by piece as it appears.

        Raises:
            InputDataError: an image is larger than planned, or the template refuses the conversation.
            BudgetError: the conversation does not fit the context any more.
        """
        began = time.perf_counter()
        turns = [*self.turns, Turn("user", text, tuple(image for _, image in images))]
        feeds = [*self._feeds, *(self._checked_feeds(name, image) for name, image in images)]
        prepared = self.host.prepare_turns(turns, feeds)
        of_images = sum(end - start for start, end in prepared.image_places)
        self.limits.check_context(prepared.length, of_images, max_new_tokens)
        logits, reused = self._held.feed(prepared)
        first = time.perf_counter() - began
        found = self._generate(prepared, logits, sampler or Sampler(), max_new_tokens, on_text)
        answer = self.host.decode(found.ids)
        self.turns, self._feeds = [*turns, Turn("assistant", answer)], feeds
        spent = time.perf_counter() - began
        return Reply(answer, found.ids, found.stopped, prepared.length, of_images, reused, first, spent)

    def reset(self) -> None:
        """Start over; what the runner holds may still be of use."""
        self.turns, self._feeds = [], []

    def _checked_feeds(self, name: str, image: Image.Image) -> Feeds:
        feeds = self.host.image_feeds(image)
        self.limits.check_image(name, image.size, self.host.image_tokens(feeds))
        return feeds

    def _generate(
        self,
        prepared: Prepared,
        logits: Logits,
        sampler: Sampler,
        max_new_tokens: int,
        on_text: Callable[[str], None] | None,
    ) -> Generated:
        stream = TextStream(self.host)

        def token(chosen: int) -> None:
            if on_text and (piece := stream.push(chosen)):
                on_text(piece)

        found = generate(self.host, self._held, logits, prepared.next_position, sampler, max_new_tokens, token)
        if on_text and (piece := stream.end()):
            on_text(piece)
        return found


class HeldPrefix:
    """A runner that knows which tokens it holds, where they stand and which images are among them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._ids: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._positions: NDArray[np.int64] | None = None
        self._images: list[tuple[int, str]] = []  # (first token, digest)

    @property
    def capacity(self) -> int:
        return self._runner.capacity

    @property
    def length(self) -> int:
        return self._runner.length

    def image_features(self, feeds: Feeds) -> NDArray[np.float32]:
        return self._runner.image_features(feeds)

    def feed(self, prepared: Prepared) -> tuple[Logits, int]:
        """(logits after the prompt, how many of its tokens were held already); only the rest is computed.

        Fed up to the end of each image but the last at a time: engines are built for one image's features a call.
        """
        digests = [_digest(feeds) for feeds in prepared.vision_feeds]
        kept = start = self._common(prepared, digests)
        self.truncate(kept)
        new = [i for i, (first, _) in enumerate(prepared.image_places) if first >= kept]
        logits, ends = None, [*(prepared.image_places[i][1] for i in new[:-1]), prepared.length]
        for i, end in zip([*new, None][: len(ends)], ends):
            features = np.zeros((0, 0), dtype=np.float32)
            if i is not None:
                features = self._runner.image_features(prepared.vision_feeds[i])
            logits = self.extend(prepared.input_ids[start:end], features, prepared.positions[:, start:end])
            self._images += [] if i is None else [(prepared.image_places[i][0], digests[i])]
            start = end
        assert logits is not None  # at least one token was left to feed
        return logits, kept

    def extend(self, ids: NDArray[np.int64], features: NDArray[np.float32], positions: NDArray[np.int64]) -> Logits:
        logits = self._runner.extend(ids, features, positions)
        self._ids = np.concatenate([self._ids, ids])
        held = positions if self._positions is None else np.concatenate([self._positions, positions], axis=1)
        self._positions = held
        return logits

    def truncate(self, length: int) -> None:
        self._runner.truncate(length)
        self._ids = self._ids[:length]
        self._positions = None if self._positions is None else self._positions[:, :length]
        self._images = [(start, digest) for start, digest in self._images if start < length]

    def _common(self, prepared: Prepared, digests: Sequence[str]) -> int:
        """Tokens from the front that are held as the prompt has them; at least one is left to feed, for its logits."""
        longest = min(len(self._ids), prepared.length - 1)
        same = self._ids[:longest] == prepared.input_ids[:longest]
        if self._positions is not None:
            same &= (self._positions[:, :longest] == prepared.positions[:, :longest]).all(axis=0)
        common = longest if same.all() else int(np.argmin(same))
        for (start, end), digest in zip(prepared.image_places, digests):
            # An image is fed whole: one that is not held, or not to its end, ends what is kept.
            if start < common and (end > common or (start, digest) not in self._images):
                return start
        return common


def _digest(feeds: Feeds) -> str:
    """An image's identity by what the vision graph sees of it."""
    total = hashlib.sha256()
    for name in sorted(feeds):
        total.update(f"{name} {feeds[name].dtype} {feeds[name].shape}".encode())
        total.update(np.ascontiguousarray(feeds[name]).tobytes())
    return total.hexdigest()
