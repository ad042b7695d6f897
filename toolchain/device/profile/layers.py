"""Times of single layers gathered by module, by block and by part: where the milliseconds of a phase went.

Layer names carry module paths, because exported nodes are named after the module they come from:

    model.language_model.layers.3.self_attn.q_proj+k_proj+v_proj      a quantized node, several modules fused into one
    model.language_model.layers.3.self_attn/Softmax_0                 an operator of a module
    decoder/Shape_0                                                   an operator of the graph around the modules
    PWN(a.b/Mul_0, a.b/Add_1)   a.b/Mul_0 + a.c/Add_0   {ForeignNode[a.b/Mul_0...a.c/Add_0]}      TensorRT's fusions

A name without any path is not guessed at: its time stays in the row "unattributed". So does that of a fusion across
modules that share nothing but the model's root.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNATTRIBUTED = "unattributed"  # inside a graph call, but of no layer whose name says where it belongs
HOST = "host"  # outside the graph calls: choosing a token, moving keys and values, Python
GRAPH = "graph"  # the graph around the modules: masks, positions, shapes, the keys' and values' layout

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+(?:\+\w+)*)*(?:/\w+)*")
_NUMBER = re.compile(r"\d+$")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_VISION = {"visual", "vision_tower", "vision_model"}
_PROJECTOR = {"merger", "multi_modal_projector"}
_ATTENTION = {"self_attn", "attn", "attention"}
_MLP = {"mlp", "feed_forward"}
_HEAD = {"lm_head"}
_EMBEDDING = {"embed_tokens"}


@dataclass(frozen=True)
class LayerTime:
    """One layer of one graph call, in milliseconds.

    `nodes` are the ONNX nodes it stands for, where the backend keeps them apart; without any the name has to say.
    """

    name: str
    ms: float
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Mean milliseconds of a module, a block or a part in one run of a phase; `layers` ran in it on average."""

    name: str
    part: str
    ms: float
    layers: float


@dataclass
class Tally:
    """Rows of one phase, over all its runs that were recorded. Every list's `ms` sum to `total_ms`.

    `by_module`, `by_block` (model.layers.3, model.visual.blocks.0) and `by_part` hold the same time at three
    grains, the largest first; the rows "unattributed" and "host" close each list, in this order.
    """

    total_ms: float
    runs: int
    by_module: list[Row] = field(default_factory=list)
    by_block: list[Row] = field(default_factory=list)
    by_part: list[Row] = field(default_factory=list)

    def part(self, name: str) -> Row:
        return next(row for row in self.by_part if row.name == name)


def tally(runs: Sequence[tuple[float, float, Iterable[LayerTime]]]) -> Tally:
    """Rows of one phase, from each run's milliseconds, those of them inside graph calls, and these calls' layers."""
    count = max(len(runs), 1)
    total, inside = sum(run[0] for run in runs) / count, sum(run[1] for run in runs) / count
    times: dict[str, list[float]] = defaultdict(list)
    for _, _, layers in runs:
        for layer in layers:
            times[module_of(layer.name, layer.nodes)].append(layer.ms)
    named = {module: (sum(ms) / count, len(ms) / count) for module, ms in times.items() if module}
    nameless = times.get("", [])
    rest = inside - sum(ms for ms, _ in named.values())
    closing = [Row(UNATTRIBUTED, UNATTRIBUTED, rest, len(nameless) / count), Row(HOST, HOST, total - inside, 0.0)]
    rows = [Row(module, part_of(module), ms, layers) for module, (ms, layers) in named.items()]
    blocks = _merged((block_of(row.name), row) for row in rows)
    parts = _merged((row.part, row) for row in rows)
    return Tally(total, len(runs), *([*_largest_first(each), *closing] for each in (rows, blocks, parts)))


def module_of(layer: str, nodes: Collection[str] = ()) -> str:
    """The module a layer belongs to: the longest path that its nodes' names, or its own, begin with.

    "" where none has a path, or where several have only the root in common: "model" holds all of a model and says
    nothing of where in it the time went.
    """
    modules = _modules_in(nodes or (layer,))
    if len(modules) <= 1:
        return next(iter(modules), "")
    paths = [module.split(".") for module in modules]
    common = []
    for pieces in zip(*paths):
        if len(set(pieces)) > 1:
            break
        common.append(pieces[0])
    return ".".join(common) if len(common) > 1 else ""


def _modules_in(names: Iterable[str]) -> set[str]:
    """Module paths of the node names in these names; words without a dot or an operator are none.

    The graph around the modules is left out where a module is named beside it.
    """
    found = [token for name in names for token in _PATH.findall(name.replace("...", " "))]
    paths = {token.partition("/")[0] for token in found if "." in token or "/" in token or token in _HEAD}
    return {path for path in paths if "." in path or path in _HEAD} or paths


def part_of(module: str) -> str:
    """attention, mlp, norm, embedding, head, projector, rotary; of the tower "vision attention" and so on; graph."""
    pieces = [piece for each in module.split(".") for piece in each.split("+")]
    if len(pieces) == 1 and pieces[0] not in _HEAD:
        return GRAPH
    found = set(pieces)
    if found & _PROJECTOR:
        return "projector"
    tower = "vision " if found & _VISION else ""
    for part, words in (("head", _HEAD), ("embedding", _EMBEDDING), ("attention", _ATTENTION), ("mlp", _MLP)):
        if found & words:
            return tower + part
    if any("norm" in piece or piece.startswith("ln_") for piece in pieces):
        return tower + "norm"
    if any("rotary" in piece for piece in pieces):
        return tower + "rotary"
    return tower + "other"


def block_of(module: str) -> str:
    """Path up to and with the first number, model.layers.3; the module itself where it is in no numbered block."""
    pieces = module.split(".")
    for index, piece in enumerate(pieces):
        if _NUMBER.match(piece):
            return ".".join(pieces[: index + 1])
    return module


def origins_from_inspector(information: str | Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Layer name → ONNX node names, of TensorRT's engine inspector in JSON with detailed verbosity.

    A layer's "Metadata" there lists its nodes as "[ONNX Layer: NAME]". Layers without it are left out.

    Raises:
        ValueError: not the inspector's JSON.
    """
    data = json.loads(information) if isinstance(information, str) else information
    layers = data.get("Layers") if isinstance(data, Mapping) else None
    if not isinstance(layers, list):
        raise ValueError("expected the engine inspector's JSON with a list of Layers")
    found = {}
    for layer in layers:
        if not isinstance(layer, Mapping):
            continue  # layer names alone: the engine was built without detailed verbosity
        names = _ORIGIN.findall(str(layer.get("Metadata", "")))
        if names:
            found[str(layer["Name"])] = tuple(names)
    return found


def _merged(named: Iterable[tuple[str, Row]]) -> list[Row]:
    """Rows of one name become one; its part is the parts' own, or "several"."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for name, row in named:
        groups[name].append(row)
    return [
        Row(
            name,
            rows[0].part if len({row.part for row in rows}) == 1 else "several",
            sum(row.ms for row in rows),
            sum(row.layers for row in rows),
        )
        for name, rows in groups.items()
    ]


def _largest_first(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row.ms, row.name))
