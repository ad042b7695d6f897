"""Float checkpoint to quantized checkpoint: whole or not at all, and where it was after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain import __version__
from toolchain.answering import answered
from toolchain.bitplan import BitCount, real_bits
from toolchain.bitplan import plan as plan_bits
from toolchain.calibration import calibration_inputs, layer_moments, samples_hash
from toolchain.checkpoint import kept_dtype, load_model, write_quantized
from toolchain.errors import UsageError
from toolchain.folders import Checkpoint, check_output, open_checkpoint, staged_folder
from toolchain.methods import method_named
from toolchain.mgvq.dealing import write_orders
from toolchain.mgvq.job import Job
from toolchain.mgvq.mending import Watch
from toolchain.mgvq.recipe import Recipe
from toolchain.mgvq.rotation_choice import trials_json
from toolchain.mgvq.whole import Made, quantize_model
from toolchain.models.family import family_for
from toolchain.models.inventory import kept_parameters
from toolchain.models.runner import torch_graphs
from toolchain.objects import ObjectStore
from toolchain.sequence import LayerResult, Progress, Solved, planned_code, quantize_in_sequence
from toolchain.values import ANSWER_TOKENS, BitPlan, LayerSpec, Sample, sha256_file, write_json
from toolchain.vq.weights import Method, Options


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
    folder: Path | str,
    samples: list[Sample],
    out: Path | str,
    *,
    method: str = "mgvq",
    bits: float | None = 2.0,
    budget_bytes: int | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    seed: int = 0,
    options: Options | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
    resume: str = "auto",
    answer_tokens: int = ANSWER_TOKENS,
) -> QuantizeResult:
    """Quantize a checkpoint folder into `out`, which appears whole or not at all, bitplan.json and layers.json in it.

    Finished groups lie in `out`.partial/KEY until the end: a killed run of the same settings goes on after them and
    ends in the same bytes. Those of other settings stay beside it.

    Args:
        samples: calibration data (`calibration.read_manifest`); lines without an answer get the model's own.
        method: a recipe of mgvq (`toolchain.mgvq.recipe`) or a baseline (`toolchain.methods`).
        bits, budget_bytes, overrides: as for `bitplan.plan`.
        seed: everything random is drawn from it and a group's name; same machine and threads, same bytes.
        progress: called after every layer with (its result, layers done, layers in all).
        watch: called with (what, done, total) during everything else that takes time.
        note: told of pieces that a run of other settings has left there.
        resume: "auto", "required" or "never" (`objects.ObjectStore.open`).
        answer_tokens: of the answers that the model gives itself (`answering.answered`); 0 for none.

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work where they can be known then.
    """
    began = time.monotonic()
    chosen = method_named(method)
    _check_tables(options)
    check_output(Path(out))
    base = open_checkpoint(folder)
    family = family_for(base.config)
    specs = family.layers(base.config)
    model, processor = load_model(folder), family.load_processor(Path(folder))
    limits = (bits, budget_bytes, tuple(overrides))
    job = Job(model, family, base.config, specs, [], *limits, options or Options(), seed, kept_dtype(base))
    key = _key(base, samples, method, job) | {"answer_tokens": answer_tokens}
    store = ObjectStore.open(Path(out).with_name(Path(out).name + ".partial"), key, resume, note)
    say = watch or (lambda what, done, total: None)
    filled = answered(
        processor.host,
        lambda: torch_graphs(family, model),
        samples,
        answer_tokens,
        lambda done, total: say("answers", done, total),
        store,
    )
    job = replace(job, inputs=calibration_inputs(processor, filled))
    made = (
        quantize_model(job, chosen, store, progress, watch)
        if isinstance(chosen, Recipe)
        else _plain(job, chosen, store, progress)
    )
    with staged_folder(out) as staging:
        calibration = {"samples": len(samples), "sha256": key["calibration"], "seed": seed}
        calibration |= {"answered": sum(one.answer is None for one in samples), "answer_tokens": answer_tokens}
        write_quantized(made.model, base, staging, made.plan, method=method, calibration=calibration)
        write_json(staging / "layers.json", {"method": method, "layers": [asdict(layer) for layer in made.layers]})
        _write_findings(made, staging)
    store.discard()
    return QuantizeResult(Path(out), method, made.plan, made.layers, real_bits(made.plan), time.monotonic() - began)


def _check_tables(options: Options | None) -> None:
    """Refuse tables in the options, which no key of a store could tell from others."""
    if options is not None and options.tables:
        raise UsageError(
            f"options.tables: expected none, found {len(options.tables)}; whose the tables are is said by the method, "
            "such as mgvq+tables=universal"
        )


def _key(base: Checkpoint, samples: list[Sample], method: str, job: Job) -> dict[str, Any]:
    """Everything the pieces of a run depend on, the machine's arithmetic included."""
    limits = {"bits": job.bits, "budget_bytes": job.budget_bytes, "overrides": job.overrides}
    key = {
        "weights": {shard.name: sha256_file(shard) for shard in base.shards},
        "config": hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest(),
        "calibration": samples_hash(samples),
        "method": method,
        "limits": limits,
        "options": asdict(job.options),
        "seed": job.seed,
        "versions": {"mgvq": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "device": str(next(job.model.parameters()).device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return json.loads(json.dumps(key))


def _write_findings(made: Made, staging: Path) -> None:
    if made.orders:
        write_orders(staging, made.orders)
    if made.mended:
        write_json(staging / "mended.json", made.mended)
    if made.rotations:
        write_json(staging / "rotations.json", trials_json(made.rotations))
    if made.sensitivity is not None:
        write_json(staging / "sensitivity.json", vars(made.sensitivity))


def _plain(job: Job, method: Method, store: ObjectStore, progress: Progress | None) -> Made:
    """A baseline: the same sweep over the model, every group given its inputs' second moment and nothing else."""
    plan = plan_bits(
        job.specs,
        kept_parameters(job.model, job.specs),
        bits=job.bits,
        budget_bytes=job.budget_bytes,
        overrides=job.overrides,
    )
    solver = MomentSolver(job, plan, method)
    layers = quantize_in_sequence(job.model, job.specs, plan, solver, store, job.seed, progress)
    return Made(job.model, plan, layers, {}, None)


class MomentSolver:
    """Codes groups by one of `toolchain.methods`."""

    def __init__(self, job: Job, plan: BitPlan, method: Method) -> None:
        self.job, self.plan, self.method = job, plan, method
        self.moments: dict[str, Tensor] = {}

    def begin(self, model: nn.Module, step: Sequence[LayerSpec]) -> None:
        """Layer name → H float32[n, n], from the model as it stands: everything before this step is quantized."""
        self.moments = {}  # those of the last step must not lie beside this one's
        self.moments = layer_moments(model, self.job.inputs, step, self.job.specs)

    def solve(
        self, model: nn.Module, members: Sequence[LayerSpec], weights: list[Tensor], generator: torch.Generator
    ) -> Solved:
        moment = self.moments[members[0].name]
        return Solved(self.method(weights, moment, planned_code(self.plan, members[0]), self.job.options, generator))
