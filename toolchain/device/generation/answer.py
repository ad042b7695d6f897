"""The generation loop over three graphs, shared by every backend: vision, embed, decoder, one token at a time.

A graph is anything that maps named arrays to named arrays. Keys and values live in one preallocated buffer per layer
with the sequence outermost, so that its filled prefix is a contiguous array and nothing is ever concatenated.

Two ways to call the decoder, of equal results (`CachePlan`): with the past at its exact length, or, as a device wants
it, with a past of few fixed lengths, the mask hiding what is not filled, so that shapes stay from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.device.families.base import Feeds, Host, Prepared, PromptBatch
from toolchain.errors import UsageError

Graph = Callable[[Feeds], Feeds]
Graphs = Mapping[str, Graph]  # "vision", "embed", "decoder"
Watcher = Callable[[str, Feeds, Feeds], None]  # (graph name, inputs, outputs) of every call


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one decoder: layers of [sequence, batch, kv_heads, head_dim] float32."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class CachePlan:
    """Which lengths the decoder is called with.

    Args:
        buckets: lengths of past, rising; a call takes the smallest that holds what is filled, never an empty past.
            None at all: the exact length.
        chunk: the most new tokens a call takes; a longer prompt is decoded in pieces. None: no limit.
    """

    buckets: tuple[int, ...] = ()
    chunk: int | None = None

    @classmethod
    def from_settings(cls, decoder: Mapping[str, Any]) -> CachePlan:
        """The plan that engines are built for, from host.json's section about the decoder."""
        return cls(tuple(decoder.get("past_buckets", ())), decoder.get("prefill_chunk"))

    def past_length(self, filled: int) -> int:
        """Length of past to call with.

        Raises:
            UsageError: the longest bucket does not hold `filled`.
        """
        if not self.buckets:
            return filled
        fitting = [length for length in self.buckets if length >= filled]
        if not fitting:
            raise UsageError(
                f"{filled} tokens of context exceed the longest the engines are built for, {self.buckets[-1]}; shorten "
                "the prompt, use a smaller image, or ask for fewer tokens"
            )
        return fitting[0]


class KeyValueCache:
    """Preallocated keys and values, filled from the front; what is not filled is zero."""

    def __init__(self, shape: CacheShape, batch: int, capacity: int) -> None:
        size = (shape.layers, 2, capacity, batch, shape.kv_heads, shape.head_dim)
        self._buffer = np.zeros(size, dtype=np.float32)
        self.length = 0

    def feeds(self, length: int | None = None) -> Feeds:
        """past.{layer}.key and past.{layer}.value: views of the first `length` places, of the filled ones if None."""
        end = self.length if length is None else length
        return {
            f"past.{layer}.{name}": self._buffer[layer, which, :end]
            for layer in range(self._buffer.shape[0])
            for which, name in enumerate(("key", "value"))
        }

    def append(self, outputs: Feeds) -> None:
        """Copy present.{layer}.* (the new positions only) to the end of the buffer."""
        added = outputs["present.0.key"].shape[0]
        for layer in range(self._buffer.shape[0]):
            for which, name in enumerate(("key", "value")):
                self._buffer[layer, which, self.length : self.length + added] = outputs[f"present.{layer}.{name}"]
        self.length += added


class Decoding:
    """One batch of prompts on its way through the graphs: `prefill`, then `step` with the tokens that were chosen."""

    def __init__(
        self,
        host: Host,
        graphs: Graphs,
        prompts: list[Prepared],
        max_new_tokens: int,
        watch: Watcher | None = None,
        plan: CachePlan | None = None,
    ):
        self.host, self.graphs, self.watch, self.plan = host, graphs, watch, plan or CachePlan()
        self.batch: PromptBatch = host.collate(prompts)
        shape = CacheShape(**host.settings["decoder"]["cache"])
        length = self.batch.input_ids.shape[1]
        limit = host.settings["decoder"]["max_context"]
        if length + max_new_tokens > limit:
            raise UsageError(
                f"prompt of {length} tokens (images included) and {max_new_tokens} new ones exceed the context of "
                f"{limit}; shorten the prompt, use a smaller image, or ask for fewer tokens"
            )
        total = length + max_new_tokens
        self.cache = KeyValueCache(shape, len(prompts), max(total, self.plan.past_length(total - 1)))
        self.mask = self.batch.attention_mask
        self.steps = 0

    def prefill(self) -> NDArray[np.float32]:
        """Logits float32[B, vocabulary] of the first new token of every prompt."""
        features = [
            self._run("vision", feeds)["image_features"] for p in self.batch.prompts for feeds in p.vision_feeds
        ]
        hidden = self.host.settings["decoder"]["hidden"]
        merged = np.concatenate([np.zeros((0, hidden), dtype=np.float32), *features])
        return self._decode(self.batch.input_ids, merged, self.batch.positions)

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits float32[B, vocabulary] after one more token int64[B] per prompt."""
        first = np.array([p.next_position for p in self.batch.prompts], dtype=np.int64) + self.steps
        positions = np.repeat(first[None, :, None], self.host.axes, axis=0)
        self.mask = np.concatenate([self.mask, np.ones((len(first), 1), dtype=np.int64)], axis=1)
        self.steps += 1
        hidden = self.host.settings["decoder"]["hidden"]
        return self._decode(tokens[:, None], np.zeros((0, hidden), dtype=np.float32), positions)

    def _decode(self, ids: NDArray, features: NDArray, positions: NDArray) -> NDArray[np.float32]:
        embeds = self._run("embed", {"input_ids": ids, "image_features": features})["inputs_embeds"]
        chunk = self.plan.chunk or ids.shape[1]
        logits = np.zeros(0, dtype=np.float32)
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, start + chunk)
            logits = self._decode_part(embeds[:, part], positions[:, :, part])
        return logits

    def _decode_part(self, embeds: NDArray, positions: NDArray) -> NDArray[np.float32]:
        """One call of the decoder: the tokens that follow what the cache holds."""
        filled, length = self.cache.length, self.plan.past_length(self.cache.length)
        unfilled = np.zeros((self.mask.shape[0], length - filled), dtype=np.int64)
        new = self.mask[:, filled : filled + embeds.shape[1]]
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.concatenate([self.mask[:, :filled], unfilled, new], axis=1),
            "position_ids": positions if self.host.axes > 1 else positions[0],
        }
        outputs = self._run("decoder", feeds | self.cache.feeds(length))
        self.cache.append(outputs)
        return outputs["logits"]

    def _run(self, name: str, feeds: Feeds) -> Feeds:
        outputs = self.graphs[name](feeds)
        if self.watch:
            self.watch(name, feeds, outputs)
        return outputs


def greedy(
    host: Host,
    graphs: Graphs,
    prompts: list[Prepared],
    max_new_tokens: int,
    on_token: Callable[[int, int], None] | None = None,
    watch: Watcher | None = None,
    plan: CachePlan | None = None,
) -> list[list[int]]:
    """Token ids of each prompt's greedy answer, the stop token included where one was reached.

    `on_token(prompt, id)` is called as tokens appear; `watch` sees every graph call.
    """
    decoding = Decoding(host, graphs, prompts, max_new_tokens, watch, plan)
    answers: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), dtype=bool)
    logits = decoding.prefill()
    for step in range(max_new_tokens):
        tokens = logits.argmax(axis=-1).astype(np.int64)
        for i in np.flatnonzero(~finished):
            answers[i].append(int(tokens[i]))
            finished[i] = tokens[i] in host.stop_ids
            if on_token:
                on_token(int(i), int(tokens[i]))
        if finished.all() or step + 1 == max_new_tokens:
            break
        logits = decoding.step(np.where(finished, host.pad_id, tokens))
    return answers
