"""The sequential sweep over a model: groups of layers in order, each coded for the inputs that those before it give."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from toolchain.checkpoint.install import install_codebooks, install_layer, link_shared, untie_dense
from toolchain.checkpoint.modules import vq_modules
from toolchain.errors import MgvqError
from toolchain.files.store import ObjectStore
from toolchain.quantize.driver.pace import LayerPace
from toolchain.values import SILENT, BitPlan, LayerSpec, Progress, VQCode, groups_of, parse_format
from toolchain.vq.weights import SegmentedGroup, SegmentedWeights, StoredWeights, VQGroup, VQWeights


@dataclass(frozen=True)
class LayerResult:
    """How one layer came out: tr(E H Eᵀ) / tr(W H Wᵀ) on the calibration inputs, the share of the first-order shift
    that its gate let through, the seconds its group took, and how its codes were found (`gated_descent`).
    """

    name: str
    part: str
    code: str
    relative_error: float
    seconds: float
    step: float = 0.0
    way: str = ""


@dataclass(frozen=True)
class Solved:
    """A group as a solver leaves it: stored forms, how each layer was coded where there was a choice, biases that
    replace the layers' own, and the shift's step.
    """

    group: VQGroup | SegmentedGroup
    ways: tuple[str, ...] = ()
    biases: dict[str, Tensor] = field(default_factory=dict)
    step: float = 0.0


class Solver(Protocol):
    """What codes groups. `begin` is told the layers of the step that comes, before any of them is replaced."""

    def begin(self, model: nn.Module, step: Sequence[LayerSpec]) -> None: ...

    def solve(
        self, model: nn.Module, members: Sequence[LayerSpec], weights: list[Tensor], generator: torch.Generator
    ) -> Solved: ...


def quantize_in_sequence(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    plan: BitPlan,
    solver: Solver,
    store: ObjectStore,
    seed: int,
    progress: Progress = SILENT,
) -> tuple[LayerResult, ...]:
    """Replace every planned layer in place, in the order of the forward pass; finished groups come from the store.

    Modules hold a decoded copy while this runs. Afterwards codebooks are stored once, ties are made, copies are gone.
    """

    def begin(step: Sequence[LayerSpec]) -> None:
        if any(store.get(object_name(group)) is None for group in groups_of(step)):
            solver.begin(model, step)

    results = walk_groups(
        specs, begin, lambda members: _one_group(model, specs, plan, solver, store, seed, members), progress
    )
    for module in vq_modules(model).values():
        module.keep(False)
    link_codebooks(model, plan)
    return results


def walk_groups(
    specs: Iterable[LayerSpec],
    begin: Callable[[Sequence[LayerSpec]], None],
    quantize: Callable[[list[LayerSpec]], Sequence[LayerResult]],
    progress: Progress = SILENT,
) -> tuple[LayerResult, ...]:
    """Every group that stores codes, in the order of the forward pass; what came of its layers.

    Args:
        begin: called with the layers of a step before any of them is replaced.
        quantize: called with the layers of one group.
    """
    stored = [spec for spec in specs if not spec.tied_to]
    results: list[LayerResult] = []
    pace = LayerPace(stored)
    for order in sorted({spec.order for spec in stored}):
        step = [spec for spec in stored if spec.order == order]
        begin(step)
        for members in groups_of(step).values():
            for result in quantize(members):
                results.append(result)
                left = pace.after(result.name, result.seconds)
                progress.layer(len(results), len(stored), result.name, left)
    return tuple(results)


def layer_batches(
    specs: Iterable[LayerSpec], most_bytes: int, bytes_of: Callable[[Sequence[LayerSpec]], int]
) -> Iterator[list[LayerSpec]]:
    """Whole groups, in order, as many at a time as their bytes together fit, one at least."""
    layer_batch: list[LayerSpec] = []
    size = 0
    for members in groups_of(specs).values():
        own = bytes_of(members)
        if layer_batch and size + own > most_bytes:
            yield layer_batch
            layer_batch, size = [], 0
        layer_batch, size = [*layer_batch, *members], size + own
    if layer_batch:
        yield layer_batch


def dense_weight(model: nn.Module, spec: LayerSpec) -> Tensor:
    """float32[rows, columns]: a layer's weight as the model has it, a convolution's kernel flattened."""
    return model.get_parameter(f"{spec.name}.weight").detach().flatten(1).float()


def object_name(group: str) -> str:
    """What a group's piece is called in the store."""
    return f"group.{group}"


def group_generator(seed: int, group: str) -> torch.Generator:
    """A generator of its own for every group, so that the order of groups changes nothing."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _one_group(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    plan: BitPlan,
    solver: Solver,
    store: ObjectStore,
    seed: int,
    members: list[LayerSpec],
) -> list[LayerResult]:
    """Code one group, or take it from the store, and put it and what is tied to it into the model."""

    def make() -> tuple[dict[str, Tensor], Any]:
        began = time.monotonic()
        weights = [dense_weight(model, spec) for spec in members]
        try:
            solved = solver.solve(model, members, weights, group_generator(seed, members[0].group))
        except MgvqError as error:
            raise type(error)(f"layer {members[0].name}: {error}") from error
        results = _results(members, solved, time.monotonic() - began)
        return _tensors(solved, members), [asdict(result) for result in results]

    tensors, results = store.get_or_make(object_name(members[0].group), make)
    device = model.get_parameter(f"{members[0].name}.weight").device
    for spec, result in zip(members, results, strict=True):
        weights = _weights({k: t.to(device) for k, t in tensors.items()}, spec, result["code"])
        _install(model, specs, plan, spec, weights, tensors.get(f"{spec.name}.bias"))
    untie_dense(model)
    return [LayerResult(**result) for result in results]


def _results(members: Sequence[LayerSpec], solved: Solved, seconds: float) -> list[LayerResult]:
    found = []
    layers: tuple[StoredWeights, ...] = solved.group.layers
    ways = solved.ways or ("",) * len(members)
    for spec, stored, error, reference, way in zip(
        members, layers, solved.group.errors, solved.group.references, ways, strict=True
    ):
        relative = error / reference if reference > 0 else 0.0
        found.append(LayerResult(spec.name, spec.part, str(stored.code), relative, seconds, solved.step, way))
    return found


def _tensors(solved: Solved, members: Sequence[LayerSpec]) -> dict[str, Tensor]:
    """A group as the store keeps it: a codebook once for all layers, codes and scales a layer; of every segment."""
    tensors = {}
    layers: tuple[StoredWeights, ...] = solved.group.layers
    for spec, stored in zip(members, layers, strict=True):
        for mark, piece in _marked(stored):
            tensors[f"codebook{mark}"] = piece.codebook
            tensors[f"{spec.name}{mark}.codes"], tensors[f"{spec.name}{mark}.scales"] = piece.codes, piece.scales
    return tensors | {f"{name}.bias": bias for name, bias in solved.biases.items()}


def _marked(stored: StoredWeights) -> list[tuple[str, VQWeights]]:
    """(what follows the layer's name in the store, weights) of everything a layer stores."""
    if isinstance(stored, VQWeights):
        return [("", stored)]
    return [(f".segments.{number}", segment) for number, segment in enumerate(stored.segments)]


def _weights(tensors: dict[str, Tensor], spec: LayerSpec, code: str) -> StoredWeights:
    segments = parse_format(code, spec.columns)
    marks = [f".segments.{number}" for number in range(len(segments))] if len(segments) > 1 else [""]
    pieces = tuple(
        VQWeights(
            segment.code,
            spec.rows,
            segment.columns,
            tensors[f"{spec.name}{mark}.codes"],
            tensors[f"codebook{mark}"],
            tensors[f"{spec.name}{mark}.scales"],
        )
        for mark, segment in zip(marks, segments, strict=True)
    )
    return SegmentedWeights(pieces) if len(pieces) > 1 else pieces[0]


def _install(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    plan: BitPlan,
    spec: LayerSpec,
    weights: StoredWeights,
    bias: Tensor | None,
) -> None:
    module: Any = install_layer(model, plan.layer(spec.name))
    module.set_weights(weights)
    module.keep(True)
    if bias is not None:
        own = model.get_parameter(f"{spec.name}.bias")
        own.data = bias.to(own)
    for other in specs:
        if other.tied_to == spec.name:
            tied: Any = install_layer(model, plan.layer(other.name))
            tied.tie_to(module)
            tied.keep(True)


def link_codebooks(model: nn.Module, plan: BitPlan) -> None:
    """Store every codebook once, on the model's root, and hand it to the modules that share it."""
    pieces = [piece for layer in plan.layers for piece in layer.pieces]
    codebooks = {piece.table: model.get_submodule(piece.name).codebook for piece in pieces}
    install_codebooks(model, plan.layers)
    model.get_submodule("mgvq_tables").load_state_dict(codebooks)
    link_shared(model, plan.layers)


def planned_code(plan: BitPlan, spec: LayerSpec) -> VQCode:
    """The code a plan gives a layer that has one; see `LayerPlan.vq_code`."""
    return plan.layer(spec.name).vq_code
