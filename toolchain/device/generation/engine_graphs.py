"""Generation with engines: buffers made once, keys and values in place, decode as a CUDA graph.

activations   one block for all contexts, as large as the largest engine needs, because they run one after another
weights       uploaded once from the sidecar, bound as inputs of every context that reads them
keys, values  [layer, key|value, place, kv heads x head size], one block; `past.*` are the first places of a layer,
              `present.*` are bound at the end of what is filled, so that nothing is joined or copied
one token     embed and decoder with fixed pointers and shapes, captured as a CUDA graph, anew for another length of
              past: a context keeps state of its shapes on the device, so that a graph holds while they do
              (NVIDIA/TensorRT issue 3798); `present.*` go to a staging row, which one 2D copy moves to their places
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolchain.bundle.manifest import Bundle
from toolchain.device.families.base import Feeds, Host
from toolchain.device.generation.answer import CachePlan
from toolchain.device.generation.generate import Logits, check_room
from toolchain.device.runtime.backends import load_backend
from toolchain.device.runtime.cuda import Cuda
from toolchain.device.runtime.loaded_engines import EngineContext, LoadedEngine, checked_build, load_engines
from toolchain.device.runtime.weights import SIDECAR, upload_weights
from toolchain.errors import EnvironmentMismatch, InputDataError

GRAPHS = ("vision", "embed", "decoder")
ALIGNMENT = 256  # of every tensor's address (setTensorAddress in NvInferRuntime.h)


def open_runner(
    bundle: Bundle, engines: Path, backend: str, host: Host, capacity: int, watch: CallWatch | None = None
) -> EngineRunner:
    """A runner over the engines of a folder, for at most `capacity` tokens.

    Raises:
        EnvironmentMismatch: the backend or CUDA is not here, or other versions built the engines.
        InputDataError: engines or weights are missing or not the bundle's.
        BudgetError: memory does not suffice.
    """
    trt = load_backend(backend)
    checked_build(trt, engines, backend, bundle)  # before a GPU is asked for: another machine may not help
    cuda = Cuda()
    loaded = load_engines(trt, engines, backend, bundle)
    weights = bundle.path(SIDECAR) if backend == "tensorrt" else None
    return EngineRunner(loaded, cuda, host.settings["decoder"], host.axes, capacity, weights, watch)


class CallWatch(Protocol):
    """Told of every call of an engine: that it begins, and the milliseconds it took. Calls do not overlap then."""

    def begin(self, graph: str) -> None: ...
    def end(self, ms: float) -> None: ...


@dataclass(frozen=True)
class CacheBlock:
    """Keys and values of all layers in one block: sequence outermost in each, `pitch` bytes from one to the next."""

    pointer: int
    pitch: int
    row_bytes: int
    layers: int
    row_shape: tuple[int, int, int]  # batch 1, kv heads, head size

    def address(self, layer: int, which: int, place: int = 0) -> int:
        """Of keys (0) or values (1) of a layer, from a place on."""
        return self.pointer + (2 * layer + which) * self.pitch + place * self.row_bytes


class EngineRunner:
    """A `Runner` (see generate.py) over three loaded engines, batch 1."""

    def __init__(
        self,
        engines: Mapping[str, LoadedEngine],
        cuda: Cuda,
        decoder: Mapping[str, Any],
        axes: int,
        capacity: int,
        weights: Path | None = None,
        watch: CallWatch | None = None,
    ) -> None:
        """`decoder` is host.json's section. With a `watch` every call is waited for and none is a CUDA graph."""
        if missing := sorted(set(GRAPHS) - set(engines)):
            raise InputDataError(f"expected engines {', '.join(GRAPHS)}, missing {missing}; run `mgvq build` again")
        self._engines, self._cuda, self._axes, self._watch = engines, cuda, axes, watch
        self._plan, self._hidden = CachePlan.from_settings(decoder), decoder["hidden"]
        self._capacity = min(capacity, self._plan.buckets[-1])
        self._length = 0
        self._ran: int | None = None  # the length of past that the decode contexts have their shapes for
        self._graph: Any = None  # of a step with that length, once it was captured
        self._is_refused = False  # a capture, once: then none is tried
        self._activation_bytes = max(engine.memory_bytes for engine in engines.values())
        self._activations = cuda.allocate(self._activation_bytes, "activations of the engines")
        self._cache = self._make_cache(decoder["cache"])
        decode = 1 if engines["decoder"].profiles > 1 else 0
        self.contexts = {
            "vision": self._context("vision", 0),
            "embed": self._context("embed", 0),
            "decoder": self._context("decoder", 0),
            "embed.decode": self._context("embed", 0),
            "decoder.decode": self._context("decoder", decode),
        }
        self._weights = upload_weights(weights, engines, cuda)
        self._buffers = self._make_buffers()
        self._logits = self._bind_fixed()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def length(self) -> int:
        return self._length

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)

    def image_features(self, feeds: Feeds) -> NDArray[np.float32]:
        context, engine = self.contexts["vision"], self._engines["vision"]
        for name, array in feeds.items():
            self._send(context, name, array)
        shape, output = context.output_shape("image_features"), engine.tensors["image_features"]
        self._run(context)
        features = self._cuda.download(self._buffers["vision", "image_features"], shape, output.dtype)
        return features.astype(np.float32, copy=False)

    def extend(self, ids: NDArray[np.int64], features: NDArray[np.float32], positions: NDArray[np.int64]) -> Logits:
        check_room(self, len(ids))
        if len(ids) == 1 and not features.size:
            self._step(ids, positions)
        else:
            self._prefill(ids, features.reshape(-1, self._hidden), positions)
        dtype = self._engines["decoder"].tensors["logits"].dtype
        return self._cuda.download(self._logits, (self._vocabulary,), dtype).astype(np.float32, copy=False)

    def _prefill(self, ids: NDArray[np.int64], features: NDArray, positions: NDArray[np.int64]) -> None:
        """All tokens through embed at once, then the decoder chunk by chunk; only the last chunk's logits count."""
        embed, decoder = self.contexts["embed"], self.contexts["decoder"]
        self._send(embed, "input_ids", ids[None])
        self._send(embed, "image_features", features)
        self._run(embed)
        embeds = self._engines["decoder"].tensors["inputs_embeds"]
        row = self._hidden * embeds.dtype.itemsize
        step = self._plan.chunk or len(ids)
        for start in range(0, len(ids), step):
            count = min(step, len(ids) - start)
            past = self._plan.past_length(self._length)
            pointer = self._buffers["embed", "inputs_embeds"] + start * row
            decoder.bind("inputs_embeds", pointer, (1, count, self._hidden))
            mask, places = self._places(positions[:, start : start + count], past)
            self._send(decoder, "attention_mask", mask)
            self._send(decoder, "position_ids", places)
            staged = self._bind_cache(decoder, past, count)
            self._run(decoder)
            if staged:
                self._unstage(count)
            self._length += count
            self._cuda.synchronize()  # the next chunk's mask goes where this one's is

    def _step(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """One token: the same pointers and shapes for every step of a length of past, which are told once."""
        embed, decoder = self.contexts["embed.decode"], self.contexts["decoder.decode"]
        past = self._plan.past_length(self._length)
        mask, places = self._places(positions, past)
        feeds = [(embed, "input_ids", ids[None]), (decoder, "attention_mask", mask), (decoder, "position_ids", places)]
        is_new = self._ran != past
        if is_new:
            self._shape_step(past, {name: array.shape for _, name, array in feeds})
        for context, name, array in feeds:
            self._fill(context, name, array)
        # Captured from the second step on: the first, with new shapes, may allocate, which a capture refuses.
        if not is_new and self._graph is None and self._can_capture():
            self._graph = self._captured_step()
        if self._graph is None:
            self._run_step()
        else:
            self._cuda.launch(self._graph)
        self._unstage(1)
        self._length += 1

    def _shape_step(self, past: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give the decode contexts the shapes and pointers of a length of past; a graph of other shapes goes."""
        embed, decoder = self.contexts["embed.decode"], self.contexts["decoder.decode"]
        if self._graph is not None:
            self._cuda.free_graph(self._graph)
            self._graph = None
        for context, names in ((embed, ("input_ids",)), (decoder, ("attention_mask", "position_ids"))):
            for name in names:
                context.bind(name, self._buffers[context.engine.name, name], shapes[name])
        embed.bind("image_features", self._buffers["embed", "image_features"], (0, self._hidden))
        decoder.bind("inputs_embeds", self._buffers["embed", "inputs_embeds"], (1, 1, self._hidden))
        self._bind_cache(decoder, past, 1, always_stage=True)
        self._ran = past

    def _can_capture(self) -> bool:
        contexts = (self.contexts["embed.decode"], self.contexts["decoder.decode"])
        allowed = self._watch is None and not self._is_refused
        return allowed and all(context.can_capture(self._cuda.stream) for context in contexts)

    def _captured_step(self) -> Any:
        """A graph of one step; None, said in a warning, where an engine holds what a capture does not permit."""
        try:
            return self._cuda.capture(self._run_step)
        except EnvironmentMismatch as error:
            self._is_refused = True
            warnings.warn(f"decode runs without a CUDA graph, and is slower: {error}", RuntimeWarning, stacklevel=2)
            return None

    def _run_step(self) -> None:
        self._run(self.contexts["embed.decode"])
        self._run(self.contexts["decoder.decode"])

    def _run(self, context: EngineContext) -> None:
        if self._watch is None:
            context.run(self._cuda.stream)
            return
        self._cuda.synchronize()
        self._watch.begin(context.engine.name)
        began = time.perf_counter()
        context.run(self._cuda.stream)
        self._cuda.synchronize()
        self._watch.end(1000 * (time.perf_counter() - began))

    def _send(self, context: EngineContext, name: str, array: NDArray) -> None:
        """Upload an input to its buffer, in the engine's type, and set its shape."""
        # First the shape: it refuses what the buffer would not hold.
        context.bind(name, self._buffers[context.engine.name, name], array.shape)
        self._fill(context, name, array)

    def _fill(self, context: EngineContext, name: str, array: NDArray) -> None:
        """Upload an input whose shape and buffer the context knows, in the engine's type."""
        dtype = context.engine.tensors[name].dtype
        self._cuda.upload(self._buffers[context.engine.name, name], array.astype(dtype, copy=False))

    def _places(self, positions: NDArray[np.int64], past: int) -> tuple[NDArray, NDArray]:
        """Mask (what is filled of the past, and the new tokens) and positions of a call, in the graph's shapes."""
        mask = np.ones((1, past + positions.shape[1]), dtype=np.int64)
        mask[:, self._length : past] = 0
        return mask, positions[:, None] if self._axes > 1 else positions

    def _bind_cache(self, context: EngineContext, past: int, count: int, always_stage: bool = False) -> bool:
        """Bind `past.*` and `present.*`; true where present goes to the staging rows and has to be moved."""
        cache = self._cache
        staged = always_stage or cache.row_bytes % ALIGNMENT != 0
        for layer in range(cache.layers):
            for which, name in enumerate(("key", "value")):
                context.bind(f"past.{layer}.{name}", cache.address(layer, which), (past, *cache.row_shape))
                end = self._staging(layer, which) if staged else cache.address(layer, which, self._length)
                context.bind(f"present.{layer}.{name}", end)
        return staged

    def _staging(self, layer: int, which: int) -> int:
        return self._buffers["decoder", "staging"] + (2 * layer + which) * self._staging_pitch

    def _unstage(self, count: int) -> None:
        cache = self._cache
        self._cuda.copy_rows(
            cache.address(0, 0, self._length), cache.pitch, self._staging(0, 0), self._staging_pitch,
            count * cache.row_bytes, 2 * cache.layers,
        )  # fmt: skip

    def _context(self, name: str, profile: int) -> EngineContext:
        return self._engines[name].context(self._cuda.stream, profile, self._activations, self._activation_bytes)

    def _make_cache(self, shape: Mapping[str, int]) -> CacheBlock:
        dtype = self._engines["decoder"].tensors["past.0.key"].dtype
        row = shape["kv_heads"] * shape["head_dim"] * dtype.itemsize
        # As long as the longest past that is called with: what lies beyond the filled places is masked, not absent.
        places = max(self._capacity, self._plan.past_length(max(self._capacity - 1, 0)))
        pitch = _aligned(places * row)
        size = 2 * shape["layers"] * pitch
        pointer = self._cuda.allocate(size, f"keys and values of {places} tokens")
        self._cuda.zero(pointer, size)  # masked or not, a NaN left there would spread
        self._staging_pitch = _aligned(row * (1 if row % ALIGNMENT == 0 else self._plan.chunk or places))
        return CacheBlock(pointer, pitch, row, shape["layers"], (1, shape["kv_heads"], shape["head_dim"]))

    def _make_buffers(self) -> dict[tuple[str, str], int]:
        """A buffer for every input of the largest profile's size, and for outputs of the size those give."""
        buffers = {}
        for name, engine in self._engines.items():
            for tensor in engine.inputs.values():
                shared = name == "decoder" and tensor.name == "inputs_embeds"  # embed's output
                if tensor.name in self._weights or tensor.name.startswith("past.") or shared:
                    continue
                size = tensor.dtype.itemsize * int(np.prod(engine.largest_shape(tensor.name)))
                buffers[name, tensor.name] = self._cuda.allocate(size, f"{name}'s input {tensor.name}")
        for name, output in (("vision", "image_features"), ("embed", "inputs_embeds"), ("decoder", "logits")):
            engine, context = self._engines[name], self.contexts[name]
            for tensor in engine.inputs.values():
                if tensor.name not in self._weights:
                    context.native.set_input_shape(tensor.name, engine.largest_shape(tensor.name))
            shape = context.output_shape(output)
            size = engine.tensors[output].dtype.itemsize * int(np.prod(shape))
            buffers[name, output] = self._cuda.allocate(size, f"{name}'s output {output}")
        self._vocabulary = int(self.contexts["decoder"].output_shape("logits")[-1])
        staging = 2 * self._cache.layers * self._staging_pitch
        buffers["decoder", "staging"] = self._cuda.allocate(staging, "new keys and values")
        return buffers

    def _bind_fixed(self) -> int:
        """Bind what never moves: outputs of all contexts, and their weights. Where the logits are."""
        for context in self.contexts.values():
            name = context.engine.name
            for tensor in context.engine.tensors.values():
                if tensor.name in self._weights:
                    context.bind(tensor.name, self._weights[tensor.name])
                elif not tensor.is_input and (name, tensor.name) in self._buffers:
                    context.bind(tensor.name, self._buffers[name, tensor.name])
        return self._buffers["decoder", "logits"]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
