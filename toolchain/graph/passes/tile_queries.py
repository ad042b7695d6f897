"""Attention over a large image runs in tiles of queries, each against all keys, so that no score tensor is whole.

    q ── MatMul(kᵀ) ── Softmax ── MatMul(v) ── y
    →    rows n·i/T … n·(i+1)/T of q, the same three nodes for each i < T, and a Concat of the T results

Every row of scores is computed from the same numbers as before. Only chains without a mask are touched, and only where
the scores of the largest image exceed the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from toolchain.graph.passes import PassResult, Refusal
from toolchain.plan.memory import MOST_TILES, SCORES_BYTES


@dataclass(frozen=True)
class _Chain:
    """The nodes of one attention, and its score tensor's size at the largest image."""

    scores: gs.Node
    softmax: gs.Node
    mix: gs.Node
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)


def tile_queries(graph: gs.Graph, largest: Mapping[str, Sequence[int]], scores_bytes: int = SCORES_BYTES) -> PassResult:
    """Tile every chain whose scores exceed `scores_bytes` at the largest input shapes; `done` has the MatMuls' names.

    Args:
        largest: graph input → its largest shape; gives named dimensions their sizes.
    """
    sizes = _named_sizes(graph, largest)
    done, refused = [], []
    bounds: dict[object, list[gs.Tensor]] = {}
    for node in [node for node in graph.nodes if node.op == "MatMul"]:
        found = _chain_from(node, sizes) if node.outputs else None  # a chain's second MatMul goes with its first
        if isinstance(found, Refusal):
            refused.append(found)
        elif found is not None and found.bytes > scores_bytes:
            wanted = min(-(-found.bytes // scores_bytes), found.shape[-2])
            tiles = min(wanted, MOST_TILES)
            if tiles < wanted:
                reason = f"{found.bytes:,} bytes of scores take {wanted} tiles, more than {MOST_TILES}: a tile holds "
                reason += f"{found.bytes // tiles:,}, more than {scores_bytes:,}; limit the largest image"
                refused.append(Refusal(node.name, reason))
            _tile(graph, found, tiles, bounds)
            done.append(node.name)
    graph.cleanup().toposort()
    return PassResult("tile_queries", tuple(done), tuple(refused))


def _named_sizes(graph: gs.Graph, largest: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {
        name: int(size)
        for tensor in graph.inputs
        for name, size in zip(tensor.shape or (), largest.get(tensor.name, ()))
        if isinstance(name, str)
    }


def _chain_from(node: gs.Node, sizes: Mapping[str, int]) -> _Chain | Refusal | None:
    """The chain that starts at a MatMul; None where there is none."""
    softmax = _only_reader(node, "Softmax")
    mix = _only_reader(softmax, "MatMul") if softmax else None
    if softmax is None or mix is None or mix.inputs[0] is not softmax.outputs[0]:
        return None
    shape = node.outputs[0].shape
    if softmax.attrs.get("axis", -1) not in (-1, len(shape or ()) - 1):
        return Refusal(node.name, f"softmax runs along axis {softmax.attrs['axis']}, expected the last, the keys")
    found = [dim if isinstance(dim, int) else sizes.get(dim) for dim in shape or ()]
    if not found or None in found:
        return Refusal(node.name, f"the scores' shape {shape} has sizes that the largest inputs do not give")
    return _Chain(node, softmax, mix, tuple(int(dim) for dim in found if dim is not None))


def _only_reader(node: gs.Node, op: str) -> gs.Node | None:
    readers = node.outputs[0].outputs
    return readers[0] if len(readers) == 1 and readers[0].op == op else None


def _tile(graph: gs.Graph, chain: _Chain, tiles: int, shared: dict[object, list[gs.Tensor]]) -> None:
    query, keys = chain.scores.inputs
    values, output = chain.mix.inputs[1], chain.mix.outputs[0]
    stem, axis = chain.scores.name, len(chain.shape) - 2
    rows = (chain.scores.outputs[0].shape or ())[axis]
    key = (rows, tiles, len(chain.shape))
    if key not in shared:
        shared[key] = _bounds(graph, f"{stem}.tiles", query, axis, rows, tiles)
    bounds, axes = shared[key], gs.Constant(f"{stem}.axis", np.array([axis], dtype=np.int64))
    softmax = dict(chain.softmax.attrs)
    for node in (chain.scores, chain.softmax, chain.mix):
        node.inputs.clear()
        node.outputs.clear()
    mixed = []
    for i in range(tiles):
        # The last tile ends where the others say; the sum of all is the whole by construction.
        inputs = [query, bounds[i], bounds[i + 1], axes]
        part = _node(graph, "Slice", f"{stem}.tile.{i}/Slice", inputs, query.dtype)
        scores = _node(graph, "MatMul", f"{stem}.tile.{i}/MatMul_0", [part, keys], output.dtype)
        weights = _node(graph, "Softmax", f"{stem}.tile.{i}/Softmax", [scores], output.dtype, softmax)
        mixed.append(_node(graph, "MatMul", f"{stem}.tile.{i}/MatMul_1", [weights, values], output.dtype))
    graph.nodes.append(gs.Node("Concat", f"{stem}/Concat", {"axis": axis}, mixed, [output]))


def _bounds(graph: gs.Graph, stem: str, query: gs.Tensor, axis: int, rows: object, tiles: int) -> list[gs.Tensor]:
    """int64[1] each: n·i/T for i = 0 … T; no tile is empty while n is at least T."""
    if isinstance(rows, int):
        return [gs.Constant(f"{stem}.{i}", np.array([rows * i // tiles], dtype=np.int64)) for i in range(tiles + 1)]
    shape = _node(graph, "Shape", f"{stem}/Shape", [query], np.int64, {"start": axis, "end": axis + 1})
    count = gs.Constant(f"{stem}.count", np.array([tiles], dtype=np.int64))
    found: list[gs.Tensor] = []
    for i in range(tiles + 1):
        factor = gs.Constant(f"{stem}.{i}", np.array([i], dtype=np.int64))
        product = _node(graph, "Mul", f"{stem}.{i}/Mul", [shape, factor], np.int64)
        found.append(_node(graph, "Div", f"{stem}.{i}/Div", [product, count], np.int64))
    return found


def _node(
    graph: gs.Graph, op: str, name: str, inputs: list, dtype: type, attributes: dict | None = None
) -> gs.Variable:
    output = gs.Variable(f"{name}.out", dtype=dtype)
    graph.nodes.append(gs.Node(op, name, attributes or {}, inputs, [output]))
    return output
