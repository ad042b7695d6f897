"""Float checkpoint to quantized checkpoint: whole or not at all, and where it was after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain import __version__
from toolchain.bits.bitplan import BitCount, real_bits
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import samples_hash
from toolchain.calibration.moments import layer_moments
from toolchain.calibration.self_answers import answered
from toolchain.checkpoint.folder import Checkpoint, open_checkpoint
from toolchain.checkpoint.permuted import write_permutations
from toolchain.checkpoint.writing import write_quantized
from toolchain.errors import UsageError
from toolchain.files.folders import check_output, sha256_file, staged_folder, write_json
from toolchain.files.store import ObjectStore
from toolchain.models.runner import torch_graphs
from toolchain.quantize.baselines.registry import METHODS
from toolchain.quantize.driver.request import QuantizationRequest, QuantizeSettings, open_request, plan_request
from toolchain.quantize.driver.sequence import LayerResult, Solved, planned_code, quantize_in_sequence
from toolchain.quantize.line import QuantizedModel, quantize_model
from toolchain.quantize.methods import stored_method
from toolchain.quantize.refine.rotation import trials_json
from toolchain.values import SILENT, BitPlan, LayerSpec, Progress, Sample
from toolchain.vq.weights import GroupMethod, Options


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize_checkpoint` did; `bits` is `bitplan.real_bits` of the plan."""

    folder: Path
    method: str
    plan: BitPlan
    layers: tuple[LayerResult, ...]
    bits: dict[str, BitCount]
    seconds: float


def quantize_checkpoint(
    source: Checkpoint | Path | str,
    samples: Sequence[Sample],
    out: Path | str,
    settings: QuantizeSettings | None = None,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize a checkpoint folder into `out`, which appears whole or not at all, bitplan.json and layers.json in it.

    Finished groups lie in `out`.partial/KEY until the end: a killed run of the same settings goes on after them and
    ends in the same bytes. Those of other settings stay beside it.

    Args:
        source: a checkpoint folder, or one that is open.
        samples: calibration data (`manifest.read_manifest`); lines without an answer get the model's own.
        progress: told of every layer and every other step, and of pieces that a run of other settings has left there.

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work where they can be known then.
    """
    began, settings = time.monotonic(), settings or QuantizeSettings()
    method = stored_method(settings.method)
    _check_codebooks(settings.options)
    check_output(Path(out))
    base = open_checkpoint(source)
    request = open_request(base, settings)
    key = _key(base, samples, settings, next(request.model.parameters()).device)
    unfinished = Path(out).with_name(Path(out).name + ".partial")
    store = ObjectStore.open(unfinished, key, settings.resume, progress.note)
    request = _with_inputs(request, base, samples, settings, store, progress)
    made = (
        quantize_model(request, method.recipe, store, progress)
        if method.recipe is not None
        else _plain(request, METHODS[method.name], store, progress)
    )
    with staged_folder(out) as staging:
        calibration = {"samples": len(samples), "sha256": key["calibration"], "seed": settings.seed}
        calibration |= {"answered": sum(one.answer is None for one in samples), "answer_tokens": settings.answer_tokens}
        write_quantized(made.model, base, staging, made.plan, method=settings.method, calibration=calibration)
        layers = {"method": settings.method, "layers": [asdict(layer) for layer in made.layers]}
        write_json(staging / "layers.json", layers)
        _write_findings(made, staging)
    store.discard()
    seconds = time.monotonic() - began
    return QuantizeResult(Path(out), settings.method, made.plan, made.layers, real_bits(made.plan), seconds)


def _with_inputs(
    request: QuantizationRequest,
    base: Checkpoint,
    samples: Sequence[Sample],
    settings: QuantizeSettings,
    store: ObjectStore,
    progress: Progress,
) -> QuantizationRequest:
    """The request with its calibration inputs, lines without an answer answered by the model."""
    processor = request.family.load_processor(base.folder, base.config)
    graphs = partial(torch_graphs, request.family, request.model)
    filled = answered(processor.host, graphs, samples, settings.answer_tokens, progress, store)
    return replace(request, inputs=calibration_inputs(processor, filled))


def _check_codebooks(options: Options) -> None:
    """Refuse codebooks in the options, which no key of a store could tell from others."""
    if options.codebooks:
        raise UsageError(
            f"options.codebooks: expected none, found {len(options.codebooks)}; name their owner in the method, "
            "such as mgvq+codebooks=universal"
        )


def _key(
    base: Checkpoint, samples: Sequence[Sample], settings: QuantizeSettings, device: torch.device
) -> dict[str, Any]:
    """Everything the pieces of a run depend on, the machine's arithmetic included."""
    key = {
        "weights": {shard.name: sha256_file(shard) for shard in base.shards},
        "config": hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest(),
        "calibration": samples_hash(samples),
        "answer_tokens": settings.answer_tokens,
        "method": settings.method,
        "limits": {
            "bits": settings.bits,
            "budget_bytes": settings.budget_bytes,
            "overrides": settings.overrides,
        },
        "options": asdict(settings.options),
        "seed": settings.seed,
        "versions": {"mgvq": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "device": str(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return json.loads(json.dumps(key))


def _write_findings(made: QuantizedModel, staging: Path) -> None:
    if made.permutations:
        write_permutations(staging, made.permutations)
    if made.refinement:
        write_json(staging / "refinement.json", made.refinement)
    if made.rotations:
        write_json(staging / "rotations.json", trials_json(made.rotations))
    if made.sensitivity is not None:
        write_json(staging / "sensitivity.json", vars(made.sensitivity))


def _plain(request: QuantizationRequest, method: GroupMethod, store: ObjectStore, progress: Progress) -> QuantizedModel:
    """A baseline: the same sweep over the model, every group given its inputs' second moment and nothing else."""
    plan = plan_request(request)
    solver = MomentSolver(request, plan, method)
    layers = quantize_in_sequence(request.model, request.specs, plan, solver, store, request.seed, progress)
    return QuantizedModel(request.model, plan, layers, {}, None)


class MomentSolver:
    """Codes groups by one of `toolchain.quantize.methods`."""

    def __init__(self, request: QuantizationRequest, plan: BitPlan, method: GroupMethod) -> None:
        self.request, self.plan, self.method = request, plan, method
        self.moments: dict[str, Tensor] = {}

    def begin(self, model: nn.Module, step: Sequence[LayerSpec]) -> None:
        """Layer name → H float32[n, n], from the model as it stands: everything before this step is quantized."""
        self.moments = {}  # those of the last step must not lie beside this one's
        self.moments = layer_moments(model, self.request.inputs, step, self.request.specs)

    def solve(
        self, model: nn.Module, members: Sequence[LayerSpec], weights: list[Tensor], generator: torch.Generator
    ) -> Solved:
        moment = self.moments[members[0].name]
        return Solved(
            self.method(weights, moment, planned_code(self.plan, members[0]), self.request.options, generator)
        )
