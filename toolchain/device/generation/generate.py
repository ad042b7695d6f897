"""One conversation's tokens on any backend: what a backend must do (`Runner`), onnxruntime's way, streaming text.

A runner holds the keys and values of one sequence. It is given tokens at the sequence's end, or told to forget its end;
everything else (what to feed, what to choose, when to stop) is the same for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolchain.device.families.base import Feeds, Host
from toolchain.device.generation.answer import CachePlan, CacheShape, Graphs, KeyValueCache
from toolchain.device.generation.sampling import Sampler
from toolchain.errors import BudgetError

Logits = NDArray[np.float32]


class Runner(Protocol):
    """A model on some backend, with the keys and values of one sequence."""

    @property
    def capacity(self) -> int:
        """The most tokens it holds."""

    @property
    def length(self) -> int:
        """Tokens it holds."""

    def image_features(self, feeds: Feeds) -> NDArray[np.float32]:
        """Features float32[tokens, hidden] of one image."""

    def extend(self, ids: NDArray[np.int64], features: NDArray[np.float32], positions: NDArray[np.int64]) -> Logits:
        """Logits float32[vocabulary] of the token after `ids` int64[S], which go to the sequence's end.

        `features` float32[F, hidden] take the places of the F image tokens in `ids`; `positions` int64[axes, S].

        Raises:
            BudgetError: the sequence would be longer than `capacity`.
        """

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class GraphRunner:
    """A runner over three functions on named arrays: onnxruntime's sessions, or the device graphs on the CPU."""

    def __init__(
        self, graphs: Graphs, decoder: Mapping[str, Any], axes: int, capacity: int, plan: CachePlan | None = None
    ) -> None:
        """`decoder` is host.json's section; `plan` the lengths that the decoder is called with (exact ones if None)."""
        self.graphs, self.axes, self.plan = graphs, axes, plan or CachePlan()
        self.hidden, self._capacity = decoder["hidden"], capacity
        places = max(capacity, self.plan.past_length(capacity - 1)) if capacity else 0
        self._cache = KeyValueCache(CacheShape(**decoder["cache"]), 1, places)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def length(self) -> int:
        return self._cache.length

    def image_features(self, feeds: Feeds) -> NDArray[np.float32]:
        return self.graphs["vision"](feeds)["image_features"]

    def extend(self, ids: NDArray[np.int64], features: NDArray[np.float32], positions: NDArray[np.int64]) -> Logits:
        check_room(self, len(ids))
        images = features.reshape(-1, self.hidden)
        embeds = self.graphs["embed"]({"input_ids": ids[None], "image_features": images})["inputs_embeds"]
        chunk, logits = self.plan.chunk or len(ids), np.zeros(0, dtype=np.float32)
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            logits = self._decode(embeds[:, part], positions[:, part])
        return logits

    def truncate(self, length: int) -> None:
        self._cache.length = min(self._cache.length, length)

    def _decode(self, embeds: NDArray, positions: NDArray[np.int64]) -> Logits:
        filled, past = self._cache.length, self.plan.past_length(self._cache.length)
        mask = np.ones((1, past + embeds.shape[1]), dtype=np.int64)
        mask[:, filled:past] = 0
        places = positions[:, None] if self.axes > 1 else positions
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": places}
        outputs = self.graphs["decoder"](feeds | self._cache.feeds(past))
        self._cache.append(outputs)
        return outputs["logits"][0]


def check_room(runner: Runner, added: int) -> None:
    """Refuse tokens that a runner has no room for.

    Raises:
        BudgetError: there are more of them than places left.
    """
    if runner.length + added > runner.capacity:
        raise BudgetError(
            f"{runner.length} tokens held and {added} more exceed the {runner.capacity} that there is room for; start "
            "over, or shorten the prompt"
        )


@dataclass(frozen=True)
class Generated:
    """Tokens of one answer, the stop token included where one was reached. Seconds count from the prompt's logits."""

    ids: tuple[int, ...]
    stopped: bool
    seconds: float


def generate(
    host: Host,
    runner: Runner,
    logits: Logits,
    next_position: int,
    sampler: Sampler,
    max_new_tokens: int,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """The answer that follows `logits` of a prompt's last token: until a stop token, or `max_new_tokens` of them.

    The last token is chosen and not fed: the runner holds the prompt and all tokens before it.
    """
    ids: list[int] = []
    nothing = np.zeros((0, host.settings["decoder"]["hidden"]), dtype=np.float32)
    began = time.perf_counter()
    while True:
        ids.append(sampler.choose(logits))
        if on_token:
            on_token(ids[-1])
        if ids[-1] in host.stop_ids or len(ids) == max_new_tokens:
            return Generated(tuple(ids), ids[-1] in host.stop_ids, time.perf_counter() - began)
        positions = np.full((host.axes, 1), next_position + len(ids) - 1, dtype=np.int64)
        logits = runner.extend(np.asarray(ids[-1:], dtype=np.int64), nothing, positions)


class TextStream:
    """Text as tokens arrive: the pieces join to what `Host.decode` says of all of them.

    A piece is held back while it may still change: characters of several tokens that are not whole yet, and white
    space, which is dropped if nothing follows.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before, often empty."""
        self._ids.append(token)
        text = self._host.decode(self._ids)
        return self._show(text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip())

    def end(self) -> str:
        """What was held back."""
        return self._show(self._host.decode(self._ids))

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece
