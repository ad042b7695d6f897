"""The whole line, from a checkpoint to a validated bundle: the stages in order, each with what it is made from.

10-plan  20-quantize  21-baseline-METHOD  25-evaluate  30-export  40-rewrite  50-validate  → bundle/  report.html
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.bundle.manifest import Bundle, write_bundle
from toolchain.calibration.manifest import read_manifest, samples_hash
from toolchain.checkpoint.folder import Checkpoint, open_checkpoint
from toolchain.errors import BudgetError, InputDataError
from toolchain.evaluate.answers import refuse_overlap
from toolchain.files.folders import read_json, sha256_file, write_json
from toolchain.models.configs import chat_template, read_config
from toolchain.models.family import Family, limited_settings
from toolchain.models.registry import family_for
from toolchain.plan.target import Target, load_target
from toolchain.quantize.methods import stored_method
from toolchain.report import write_report
from toolchain.report.data import report_data
from toolchain.run.board_kit import carry_libraries, kit_summary, write_kit
from toolchain.run.folder import RunFolder, StageResult
from toolchain.run.planning import ModelPlan, parse_image, plan_model
from toolchain.run.settings import Settings
from toolchain.values import BitPlan, Progress, Sample

PROCESSOR = "60-processor"


@dataclass(frozen=True)
class CheckedRun:
    """Everything that was looked at before any work began."""

    settings: Settings
    target: Target
    family: Family
    checkpoint: Checkpoint
    calibration: list[Sample]
    evaluation: list[Sample]
    plan: ModelPlan


def check(settings: Settings) -> CheckedRun:
    """Refuse before any work whatever can be refused: target, architecture, files, manifests, memory, in this order.

    Raises:
        UnsupportedError, InputDataError, BudgetError: the first thing that is wrong.
    """
    target = load_target(settings.target)
    config = read_config(settings.model)
    family, method = family_for(config), stored_method(settings.quantize.method)
    checkpoint = open_checkpoint(settings.model, config)
    calibration = read_manifest(settings.calib)[: settings.quantize.samples]
    evaluation = read_manifest(settings.data) if settings.data else []
    refuse_overlap(calibration, evaluation)
    plan = plan_model(
        settings.model,
        target,
        settings.quantize.bits,
        settings.plan.context,
        parse_image(settings.plan.image),
        settings.budget_bytes,
        tuple(settings.quantize.codes.items()),
        overlapping=method.overlaps,
        codebooks=method.codebooks,
        config=config,
    )
    if plan.problems:
        advice = "; ".join(a.text for a in plan.advice) or "choose a larger target (mgvq targets)"
        raise BudgetError(f"{settings.model} does not fit {settings.target}: {plan.problems[0]}; {advice}")
    return CheckedRun(settings, target, family, checkpoint, calibration, evaluation, plan)


def run_line(checked: CheckedRun, run: RunFolder, progress: Progress, baselines: Sequence[str] = ()) -> dict[str, Any]:
    """Run every stage that is not already there; the facts that `mgvq all` and `mgvq demo` print.

    Raises:
        NumericGateError: a stage does not compute what it should; the report is in 50-validate.
        InputDataError: a file broke on the way.
    """
    facts: dict[str, Any] = {}
    _plan_stage(checked, run, progress)
    quantized = _quantize_stage(checked, run, progress, "20-quantize", checked.settings.quantize.method)
    facts["bits"] = quantized.summary["bits"]
    others = {m: _quantize_stage(checked, run, progress, f"21-baseline-{m}", m) for m in baselines}
    if checked.evaluation:
        evaluated = _evaluate_stage(checked, run, progress, quantized, others)
        facts["accuracy"] = evaluated.summary["accuracy"]
    exported = _export_stage(checked, run, progress, quantized)
    rewritten = _rewrite_stage(checked, run, progress, exported)
    validated = _validate_stage(checked, run, progress, quantized, exported, rewritten)
    facts["validation"] = validated.summary
    facts["bundle"] = str(_bundle(checked, run, progress))
    facts["report"] = str(report_from_run(run.folder, facts))
    return facts


def _plan_stage(checked: CheckedRun, run: RunFolder, progress: Progress) -> StageResult:
    def work(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        write_json(folder / "bitplan.json", checked.plan.bits.to_json())
        write_json(folder / "memory.json", _plain(checked.plan.to_json()))
        write_json(folder / "target.json", checked.target.to_json())
        return {"peak_bytes": checked.plan.memory.peak_bytes, "fits": True}

    progress.stage(f"plan       {checked.settings.model} on {checked.target.title}")
    settings = checked.settings
    inputs: dict[str, Any] = {"config": sha256_file(settings.model / "config.json")}
    inputs["target"] = checked.target.to_json()
    inputs |= {"method": settings.quantize.method, "budget_bytes": settings.budget_bytes}
    inputs |= {"bits": settings.quantize.bits, "codes": settings.quantize.codes, "plan": settings.plan.model_dump()}
    result = run.stage("10-plan", inputs, work)
    usable = checked.plan.memory.usable_bytes / 2**20
    progress.done(f"{_note(result)}peak {result.summary['peak_bytes'] / 2**20:.0f} of {usable:.0f} MiB usable")
    return result


def _quantize_stage(checked: CheckedRun, run: RunFolder, progress: Progress, name: str, method: str) -> StageResult:
    from toolchain.quantize.checkpoint import quantize_checkpoint
    from toolchain.quantize.driver.request import QuantizeSettings
    from toolchain.run.inspection import quantize_summary

    settings = checked.settings

    def work(folder: Path) -> dict[str, Any]:
        result = quantize_checkpoint(
            checked.checkpoint,
            checked.calibration,
            folder,
            QuantizeSettings(
                method=method,
                bits=settings.quantize.bits,
                budget_bytes=settings.budget_bytes if settings.quantize.bits is None else None,
                overrides=tuple(settings.quantize.codes.items()),
                seed=settings.quantize.seed,
                answer_tokens=settings.quantize.answer_tokens,
            ),
            progress,
        )
        return quantize_summary(result)

    bits = settings.quantize.bits
    limit = f"{settings.budget_bytes:,} bytes" if bits is None else f"{bits:g} index bits"
    progress.stage(f"quantize   {method}, {limit}, {len(checked.calibration)} samples")
    shards = {path.name: sha256_file(path) for path in checked.checkpoint.shards}
    inputs: dict[str, Any] = {"weights": shards, "calibration": samples_hash(checked.calibration), "method": method}
    inputs |= {"settings": settings.quantize.model_dump(exclude={"method"}), "budget_bytes": settings.budget_bytes}
    result = run.stage(name, inputs, work)
    progress.done(
        f"{_note(result)}{result.summary['layers']} layers, "
        f"{result.summary['bits']['model']:.2f} real bits a weight over the model"
    )
    return result


def _evaluate_stage(checked, run: RunFolder, progress: Progress, quantized: StageResult, others) -> StageResult:
    from toolchain.checkpoint.loading import load_model, load_quantized
    from toolchain.checkpoint.modules import keep_decoded
    from toolchain.evaluate.answers import answer_all
    from toolchain.models.runner import torch_graphs

    settings = checked.settings
    host = checked.family.load_host(checked.checkpoint.config, settings.model)

    def answers(model) -> dict[str, Any]:
        with keep_decoded(model):
            found = answer_all(
                host,
                torch_graphs(checked.family, model),
                checked.evaluation,
                progress=progress,
            )
        given = [
            {"image": a.sample.image.name, "prompt": a.sample.prompt, "answer": a.sample.answer, "given": a.given}
            for a in found.answers
        ]
        return {"accuracy": found.accuracy, "answers": given}

    def work(folder: Path) -> dict[str, Any]:
        results = {
            "fp": answers(load_model(checked.checkpoint)),
            settings.quantize.method: answers(load_quantized(quantized.folder)),
        }
        for method, stage in others.items():
            results[method] = answers(load_quantized(stage.folder))
        folder.mkdir()
        write_json(folder / "answers.json", results)
        return {"accuracy": {name: result["accuracy"] for name, result in results.items()}}

    progress.stage(f"evaluate   {len(checked.evaluation)} held-out questions")
    inputs = {"evaluation": samples_hash(checked.evaluation), "baselines": [s.key for s in others.values()]}
    result = run.stage("25-evaluate", inputs, work)
    progress.done(_note(result) + ", ".join(f"{k} {100 * v:.1f} %" for k, v in result.summary["accuracy"].items()))
    return result


def _export_stage(checked: CheckedRun, run: RunFolder, progress: Progress, quantized: StageResult) -> StageResult:
    from toolchain.checkpoint.loading import load_quantized
    from toolchain.graph.export import reference_graphs_from_model

    def work(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        graphs = reference_graphs_from_model(load_quantized(quantized.folder), checked.family, folder)
        return {"graphs": [_plain(dataclasses.asdict(g) | {"path": g.path.name}) for g in graphs]}

    progress.stage("export     reference graphs with mgvq nodes")
    result = run.stage("30-export", {}, work)
    progress.done(
        _note(result)
        + ", ".join(f"{g['name']} {g['nodes']} nodes ({g['vq_nodes']} VQ)" for g in result.summary["graphs"])
    )
    return result


def _rewrite_stage(checked: CheckedRun, run: RunFolder, progress: Progress, exported: StageResult) -> StageResult:
    from toolchain.graph.rewrite import RewriteOptions, device_form, portable_form

    config, source = checked.checkpoint.config, checked.settings.model
    profiles = checked.family.profiles(config, source, _host_settings(checked))
    block = checked.target.largest_block_default_bytes
    int8 = checked.settings.rewrite.int8_activations
    options = RewriteOptions.for_profiles(profiles, block_bytes=block, int8_activations=int8)

    def work(folder: Path) -> dict[str, Any]:
        for name in ("device", "portable"):
            (folder / name).mkdir(parents=True)
        portable_form(exported.folder, folder / "portable", options)
        return device_form(exported.folder, folder / "device", options).to_json()

    progress.stage("rewrite    device graphs with plugin nodes, portable graphs with bodies")
    inputs = {"block_bytes": block, "largest": _plain(options.largest), "int8_activations": int8}
    result = run.stage("40-rewrite", inputs, work)
    graphs, sidecar = result.summary["graphs"], result.summary["sidecar"]
    nodes = ", ".join(f"{g['name']} {g['nodes_before']} → {g['nodes_after']}" for g in graphs)
    progress.done(f"{_note(result)}{nodes} nodes; weights outside the graphs {sidecar['bytes'] / 2**20:.2f} MiB")
    return result


def _validate_stage(checked, run: RunFolder, progress: Progress, quantized, exported, rewritten) -> StageResult:
    from toolchain.graph.validate import validate_line

    settings = checked.settings

    def work(folder: Path) -> dict[str, Any]:
        folder.mkdir()
        report = validate_line(
            checked.family,
            settings.model,
            quantized.folder,
            exported.folder,
            rewritten.folder / "device",
            checked.calibration[:: max(1, len(checked.calibration) // settings.validation.samples)][
                : settings.validation.samples
            ],
            folder,
            steps=settings.validation.steps,
            provider=settings.validation.provider,
        )
        return report.summary()

    progress.stage("validate   torch, reference graphs, device graphs at every tap")
    result = run.stage("50-validate", settings.validation.model_dump(), work)
    progress.done(_note(result) + result.summary["text"])
    return result


def _bundle(checked: CheckedRun, run: RunFolder, progress: Progress) -> Path:
    progress.stage("bundle")
    write_processor(checked, run.folder / "stages" / PROCESSOR)
    bundle = bundle_from_run(run.folder, run.folder / "bundle")
    kit = kit_summary(bundle.files)
    progress.done(f"{len(bundle.files)} files, {bundle.bytes / 2**20:.1f} MiB: {bundle.folder}; {kit}")
    return bundle.folder


def bundle_from_run(run: Path, out: Path, libraries: Mapping[Path, Mapping[str, Any]] | None = None) -> Bundle:
    """A bundle at `out` from the stages of a finished run; the same stages and package give the same bytes.

    Args:
        libraries: plugin libraries that are built already: file → {"machine", "sm": [...], "tensorrt"}.

    Raises:
        InputDataError: a stage or a library is missing; it names the folder.
        UsageError: `out` is in use by something that is no bundle.
    """
    stages = run / "stages"
    pieces = {
        "device": stages / "40-rewrite" / "device",
        "portable": stages / "40-rewrite" / "portable",
        "processor": stages / PROCESSOR,
        "reference": stages / "50-validate",
        "bitplan.json": stages / "20-quantize" / "bitplan.json",
        "memory.json": stages / "10-plan" / "memory.json",
        "target.json": stages / "10-plan" / "target.json",
    }
    for name, piece in pieces.items():
        if not piece.exists():
            raise InputDataError(
                f"run {run}: {piece} is missing, which the bundle needs for {name}; finish the run first"
            )
    keys = {name: read_json(stages / f"{name}.json")["key"] for name in ("20-quantize", "40-rewrite", "50-validate")}
    target, memory = (read_json(pieces[name]) for name in ("target.json", "memory.json"))
    settings = read_json(pieces["processor"] / "host.json")
    plan = BitPlan.from_json(read_json(pieces["bitplan.json"]))
    with tempfile.TemporaryDirectory(prefix="mgvq-kit-") as scratch:
        pieces |= write_kit(Path(scratch), plan, target, memory, settings)
        pieces |= carry_libraries(libraries or {}, Path(scratch))
        return write_bundle(pieces, out, target=target, created_from={"stages": keys})


def write_processor(checked: CheckedRun, folder: Path) -> Path:
    """tokenizer.json, chat_template.jinja and host.json (with the engine profiles) in `folder`; the folder.

    Images and context are limited to what the memory plan counted, as the rewritten graphs are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, config = checked.settings.model, checked.checkpoint.config
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text(chat_template(source), encoding="utf-8")
    settings = _host_settings(checked)
    profiles = checked.family.profiles(config, source, settings)
    write_json(folder / "host.json", settings | {"profiles": {"graphs": profiles}})
    return folder


def _host_settings(checked: CheckedRun) -> dict[str, Any]:
    """host.json's content, limited to the images and the context that the memory plan counted."""
    workload = checked.plan.memory.workload
    settings = checked.family.host_settings(checked.checkpoint.config, checked.settings.model)
    return limited_settings(settings, workload.max_pixels, workload.context_tokens)


def _note(result: StageResult) -> str:
    return "reused, " if result.reused else ""


def _plain(data: Any) -> Any:
    """`data` with dataclasses, paths and tuples turned into what JSON has."""

    def default(value: Any) -> Any:
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)  # type: ignore[arg-type]

    return json.loads(json.dumps(data, default=default))


def report_from_run(run: Path, facts: dict[str, Any]) -> Path:
    """report.html of a run whose stages are done; its path. `facts` is what `run_line` returned (run.json's result)."""
    path = run / "report.html"
    write_report(report_data(run, facts), path)
    return path
