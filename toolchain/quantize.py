"""Float checkpoint to quantized checkpoint, block by block; each sees what the quantized blocks before it put out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from toolchain.bitplan import BitCount, real_bits
from toolchain.bitplan import plan as plan_bits
from toolchain.calibration import CalibrationInput, calibration_inputs, collect_moments, samples_hash
from toolchain.checkpoint import load_model, write_quantized
from toolchain.errors import MgvqError
from toolchain.folders import check_output, open_checkpoint, staged_folder
from toolchain.install import install_layer, install_tables, link_shared, untie_dense
from toolchain.methods import method_named
from toolchain.models.family import family_for
from toolchain.models.inventory import kept_parameters
from toolchain.modules import vq_modules
from toolchain.values import BitPlan, LayerPlan, LayerSpec, Sample, VQCode, write_json
from toolchain.vq.weights import Method, Options, VQGroup

# A tied table is read twice: as the head, where the head's inputs weigh columns, and as the embedding, where none
# counts more than another. Half of the metric for each.
EMBEDDING_SHARE = 0.5


@dataclass(frozen=True)
class LayerResult:
    """How one layer came out: tr(E H Eᵀ) / tr(W H Wᵀ) on the calibration inputs, and the seconds its group took."""

    name: str
    part: str
    code: str
    relative_error: float
    seconds: float


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize_checkpoint` did; `bits` is `bitplan.real_bits` of the plan."""

    folder: Path
    method: str
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    bits: dict[str, BitCount]
    seconds: float


Progress = Callable[[LayerResult, int, int], None]


@dataclass
class _Run:
    """What the groups of one run share."""

    model: nn.Module
    inputs: list[CalibrationInput]
    plan: BitPlan
    method: Method
    options: Options
    seed: int


def quantize_checkpoint(
    folder: Path | str,
    samples: list[Sample],
    out: Path | str,
    *,
    method: str = "mgvq",
    bits: float | None = 2.0,
    overrides: Iterable[tuple[str, str]] = (),
    seed: int = 0,
    options: Options | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a checkpoint folder into `out`, which appears whole or not at all, bitplan.json and layers.json in it.

    Args:
        samples: calibration data (`calibration.read_manifest`).
        bits, overrides: as for `bitplan.plan`.
        seed: everything random is drawn from it and a group's name; same machine and threads, same bytes.
        progress: called after every layer with (its result, layers done, layers in all).

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work where they can be known then.
    """
    began = time.monotonic()
    chosen = method_named(method)
    check_output(Path(out))
    base = open_checkpoint(folder)
    family = family_for(base.config)
    specs = family.layers(base.config)
    model = load_model(folder)
    plan = plan_bits(specs, kept_parameters(model, specs), bits=bits, overrides=overrides)
    inputs = calibration_inputs(family.load_processor(Path(folder)), samples)
    run = _Run(model, inputs, plan, chosen, options or Options(), seed)
    with staged_folder(out) as staging:
        layers = _quantize_model(run, specs, progress)
        calibration = {"samples": len(samples), "sha256": samples_hash(samples), "seed": seed}
        write_quantized(model, base, staging, plan, method=method, calibration=calibration)
        write_json(staging / "layers.json", {"method": method, "layers": [asdict(layer) for layer in layers]})
    return QuantizeResult(Path(out), method, plan, layers, real_bits(plan), time.monotonic() - began)


def _quantize_model(run: _Run, specs: tuple[LayerSpec, ...], progress: Progress | None) -> tuple[LayerResult, ...]:
    """Quantize every group in the order of the sweep, in place; the model holds linked quantized modules afterwards."""
    total = sum(not spec.tied_to for spec in specs)
    results: list[LayerResult] = []
    for order in sorted({spec.order for spec in specs}):
        step = [spec for spec in specs if spec.order == order and not spec.tied_to]
        moments = _moments_of_step(run, step, specs)
        for members in _by_group(step):
            for result in _quantize_members(run, members, moments[members[0].name], specs):
                results.append(result)
                if progress:
                    progress(result, len(results), total)
    for module in vq_modules(run.model).values():
        module.keep(False)
    _link_tables(run)
    return tuple(results)


def _by_group(step: list[LayerSpec]) -> list[list[LayerSpec]]:
    groups: dict[str, list[LayerSpec]] = {}
    for spec in step:
        groups.setdefault(spec.group, []).append(spec)
    return list(groups.values())


def _moments_of_step(run: _Run, step: list[LayerSpec], specs: tuple[LayerSpec, ...]) -> dict[str, Tensor]:
    """Layer name → H float32[n, n], from the model as it stands: everything before this step is quantized."""
    linears = [spec for spec in step if spec.kind != "embedding"]
    found = {}
    if linears:
        collected = collect_moments(run.model, run.inputs, linears)
        found = {name: moments.second_moment for name, moments in collected.items()}
    for spec in step:
        if spec.kind == "embedding":
            found[spec.name] = _embedding_moment(run, spec, specs)
    return found


def _embedding_moment(run: _Run, spec: LayerSpec, specs: tuple[LayerSpec, ...]) -> Tensor:
    """H of an embedding: the identity, blended with what the head sees where the head uses the same codes."""
    heads = [other for other in specs if other.tied_to == spec.name]
    if not heads:
        return torch.eye(spec.columns)
    return tied_moment(collect_moments(run.model, run.inputs, heads)[heads[0].name].second_moment)


def tied_moment(moment: Tensor) -> Tensor:
    """H float32[n, n] of a table that is head and embedding at once, from the second moment of the head's inputs."""
    identity = torch.eye(len(moment))
    return (1 - EMBEDDING_SHARE) * moment + EMBEDDING_SHARE * moment.diagonal().mean() * identity


def group_generator(seed: int, group: str) -> torch.Generator:
    """A generator of its own for every group, so that the order of groups changes nothing."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _quantize_members(
    run: _Run, members: list[LayerSpec], moment: Tensor, specs: tuple[LayerSpec, ...]
) -> list[LayerResult]:
    """Quantize the layers of one group and put them, and what is tied to them, into the model."""
    began = time.monotonic()
    code = VQCode.parse(run.plan.layer(members[0].name).code)
    weights = [run.model.get_parameter(f"{s.name}.weight").detach().flatten(1).float() for s in members]
    generator = group_generator(run.seed, members[0].group)
    try:
        group = run.method(weights, moment, code, run.options, generator)
    except MgvqError as error:
        raise type(error)(f"layer {members[0].name}: {error}") from error
    for spec, stored in zip(members, group.layers):
        module = install_layer(run.model, run.plan.layer(spec.name))
        module.set_weights(stored)
        module.keep(True)
        for other in specs:
            if other.tied_to == spec.name:
                tied = install_layer(run.model, run.plan.layer(other.name))
                tied.tie_to(module)
                tied.keep(True)
    untie_dense(run.model)
    seconds = time.monotonic() - began
    return [_layer_result(run.plan.layer(s.name), group, i, seconds) for i, s in enumerate(members)]


def _layer_result(layer: LayerPlan, group: VQGroup, index: int, seconds: float) -> LayerResult:
    reference = group.references[index]
    relative = group.errors[index] / reference if reference > 0 else 0.0
    return LayerResult(layer.name, layer.part, layer.code, relative, seconds)


def _link_tables(run: _Run) -> None:
    """Store every table once, on the model's root, and hand it to the modules that share it."""
    layers = run.plan.layers
    tables = {layer.table: run.model.get_submodule(layer.name).table for layer in layers}
    install_tables(run.model, layers)
    run.model.get_submodule("mgvq_tables").load_state_dict(tables)
    link_shared(run.model, layers)
