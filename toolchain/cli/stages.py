"""One verb per stage, each repeatable alone from what the stage before it wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.common import (
    AnswerTokensOption,
    BitsOption,
    BudgetOption,
    CalibOption,
    Format,
    FormatOption,
    ModelOption,
    OutputOption,
    Provider,
    ProviderOption,
    SeedOption,
    TerminalProgress,
    bits_or_budget,
    emit,
    size,
    table,
)
from toolchain.errors import BudgetError, UsageError
from toolchain.values import ANSWER_TOKENS


def parse_codes(assignments: list[str]) -> list[tuple[str, str]]:
    """(pattern, code) of each "PATTERN=V,k,L"."""
    pairs = [text.rpartition("=") for text in assignments]
    for text, (pattern, _, _) in zip(assignments, pairs):
        if not pattern:
            raise UsageError(f"--code {text!r}: expected PATTERN=V,k,L, such as '*.o_proj=2,6,6'")
    return [(pattern, code) for pattern, _, code in pairs]


def quantize(
    model: ModelOption,
    calib: CalibOption,
    output: OutputOption,
    bits: BitsOption = None,
    budget: BudgetOption = None,
    method: Annotated[
        str,
        typer.Option(help="mgvq (-PART, +PART and +codebooks=CHOICE change its recipe), gptq, gptvq, nearest or rtn."),
    ] = "mgvq",
    code: Annotated[
        list[str] | None,
        typer.Option(help="Code of the layers whose names match: PATTERN=V,k,L. Repeatable; the last match wins."),
    ] = None,
    seed: SeedOption = 0,
    answer_tokens: AnswerTokensOption = ANSWER_TOKENS,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: resume a stopped run of these settings, if any; required: only resume; never: start again."
        ),
    ] = "auto",
    form: FormatOption = Format.text,
) -> None:
    """Quantize a checkpoint. The result loads in transformers after `import toolchain.checkpoint.hf`.

    Example: mgvq quantize -m MODEL --calib calib.jsonl -o runs/q --bits 2.0
    """
    from toolchain.calibration.manifest import read_manifest
    from toolchain.checkpoint.folder import open_checkpoint
    from toolchain.files.folders import check_output
    from toolchain.models.configs import read_config
    from toolchain.models.registry import family_for
    from toolchain.quantize.checkpoint import quantize_checkpoint
    from toolchain.quantize.driver.request import QuantizeSettings
    from toolchain.run.inspection import quantize_summary

    overrides = parse_codes(code or [])
    check_output(output)
    config = read_config(model)
    family_for(config)
    limits = _limits(model, config, bits, budget, overrides, method)
    progress = TerminalProgress()
    progress.stage(f"quantize   {model}")
    samples = read_manifest(calib)
    result = quantize_checkpoint(
        open_checkpoint(model, config),
        samples,
        output,
        QuantizeSettings(method, *limits, tuple(overrides), seed, resume=resume, answer_tokens=answer_tokens),
        progress,
    )
    summary = quantize_summary(result)
    rows = [
        {"layer": x["name"], "code": x["code"], "relative error": f"{x['relative_error']:.4f}"}
        for x in summary["per_layer"]
    ]
    text = table(rows, ["layer", "code", "relative error"])
    emit(
        summary, f"{text}\n{output}: {summary['bits']['model']:.3f} real bits a weight, {size(summary['bytes'])}", form
    )


def _limits(
    model: Path,
    config: dict[str, Any],
    bits: float | None,
    budget: str | None,
    overrides: list[tuple[str, str]],
    name: str,
) -> tuple[float | None, int | None]:
    """(bits, budget_bytes) that `quantize_checkpoint` is to keep to; a budget that cannot be kept is refused now."""
    from toolchain.quantize.methods import stored_method
    from toolchain.run.planning import over_budget, plan_formats

    average, budget_bytes = bits_or_budget(bits, budget)
    method = stored_method(name)
    if budget_bytes is not None:
        formats = plan_formats(
            model, average, budget_bytes, tuple(overrides), method.overlaps, method.codebooks, config
        )
        if problem := over_budget(formats, budget_bytes):
            raise BudgetError(f"{model}: {problem}")
    return (average, None) if average is not None else (None, budget_bytes)


def export(model: ModelOption, output: OutputOption, form: FormatOption = Format.text) -> None:
    """Export a checkpoint, quantized or not, to ONNX: vision, embed and decoder reference graphs."""
    from toolchain.checkpoint.folder import open_checkpoint
    from toolchain.checkpoint.loading import load_any
    from toolchain.files.folders import staged_folder
    from toolchain.graph.export import reference_graphs_from_model
    from toolchain.models.configs import read_config
    from toolchain.models.registry import family_for

    config = read_config(model)
    family = family_for(config)
    with staged_folder(output) as folder:
        graphs = reference_graphs_from_model(load_any(open_checkpoint(model, config)), family, folder)
    rows = [dataclasses.asdict(g) | {"path": str(output / g.path.name), "seconds": round(g.seconds, 1)} for g in graphs]
    emit({"graphs": rows}, table(rows, ["name", "nodes", "vq_nodes", "weight_bytes", "seconds", "path"]), form)


INT8_HELP = (
    "Allow engines to round inputs of linears with codes 4,k,L to int8 where that is faster. This changes answers, and "
    "mgvq validate does not cover it."
)


def rewrite(
    output: OutputOption,
    graphs: Annotated[
        Path | None, typer.Argument(help="Folder of reference graphs, as mgvq export writes it.", show_default=False)
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="A third-party ONNX file: its weights are quantized here, then it is rewritten.")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(help="With --onnx: .npz with the inputs of one run, for second moments. Repeatable."),
    ] = None,
    code: Annotated[
        list[str] | None,
        typer.Option(
            help="With --onnx: code of the layers whose names match, PATTERN=V,k,L. Repeatable; the last match wins."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --onnx: seed of codebook training. Default: 0.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="With GRAPHS: checkpoint whose largest image sets the size of attention tiles."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Board whose largest memory block no weight may exceed; see mgvq targets.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Precision of matrix products in the device form: mixed (float16) or float32.")
    ] = "mixed",
    int8_activations: Annotated[bool, typer.Option("--int8-activations", help=INT8_HELP)] = False,
    form: FormatOption = Format.text,
) -> None:
    """Rewrite reference graphs, or a third-party ONNX file, to the device form (plugin nodes, weights in a sidecar)
    and the portable form (standard operators).
    """
    from toolchain.files.folders import check_output, staged_folder

    if (graphs is None) == (onnx is None):
        raise UsageError("give a folder of reference graphs, or --onnx FILE, one of the two")
    _refuse_idle("--onnx", onnx, {"--inputs": inputs, "--code": code, "--seed": seed})
    _refuse_idle("a folder of graphs", graphs, {"--model": model})
    options = _rewrite_options(model, target, precision, int8_activations)
    check_output(output)
    with staged_folder(output) as folder:
        third_party = _quantize_third_party(onnx, folder, inputs or [], code or [], seed or 0) if onnx else None
        data = _rewrite_into(graphs or folder / "reference", folder, options)
    if third_party is not None:
        data["third_party"] = third_party
    emit(data, _rewrite_text(data), form)


def _refuse_idle(needed: str, given: object, flags: dict[str, Any]) -> None:
    """Refuse flags that have no effect without what they belong to."""
    if given is None and (idle := [name for name, value in flags.items() if value is not None]):
        raise UsageError(f"{', '.join(idle)}: no effect without {needed}; leave it out")


def _rewrite_options(model: Path | None, target: str | None, precision: str, int8_activations: bool):
    from toolchain.graph.rewrite import RewriteOptions
    from toolchain.models.configs import read_config
    from toolchain.models.family import limited_settings
    from toolchain.models.registry import family_for
    from toolchain.plan.target import load_target

    board = None if target is None else load_target(target)
    block = None if board is None else board.largest_block_default_bytes
    profiles = {}
    if model is not None:
        config = read_config(model)
        family = family_for(config)
        settings = family.host_settings(config, model)
        if board is not None:
            settings = limited_settings(settings, board.max_image_pixels, board.default_context_tokens)
        profiles = family.profiles(config, model, settings)
    return RewriteOptions.for_profiles(
        profiles, block_bytes=block, precision=precision, int8_activations=int8_activations
    )


def _quantize_third_party(
    source: Path, folder: Path, inputs: list[Path], codes: list[str], seed: int
) -> dict[str, Any]:
    from toolchain.files.folders import write_json
    from toolchain.graph.third_party import quantize_third_party

    (folder / "reference").mkdir()
    report = quantize_third_party(
        source, folder / "reference" / source.name, inputs, parse_codes(codes), seed
    ).to_json()
    write_json(folder / "third_party.json", report)
    return report


def _rewrite_into(graphs: Path, folder: Path, options: Any) -> dict[str, Any]:
    from toolchain.graph.rewrite import device_form, portable_form, reference_paths

    reference_paths(graphs)
    for name in ("device", "portable"):
        (folder / name).mkdir()
    portable_form(graphs, folder / "portable", options)
    return device_form(graphs, folder / "device", options).to_json()


def _rewrite_text(data: dict[str, Any]) -> str:
    rows = [
        {"graph": g["name"], "nodes": f"{g['nodes_before']} → {g['nodes_after']}", "VQ nodes": g["vq_nodes"]}
        for g in data["graphs"]
    ]
    lines = [table(rows, ["graph", "nodes", "VQ nodes"]), f"weights outside: {size(data['sidecar']['bytes'])}"]
    if third_party := data.get("third_party"):
        layers = [
            {"layer": x["name"], "code": x["code"], "relative error": f"{x['relative_error']:.4f}"}
            for x in third_party["layers"]
        ]
        lines.append(table(layers, ["layer", "code", "relative error"]))
        lines += [f"left as it is: {x['where']}: {x['reason']}" for x in third_party["refused"]]
        lines += [f"output {name}: relative error {error:.4f}" for name, error in third_party["output_errors"].items()]
    return "\n".join(lines)


def validate(
    model: ModelOption,
    quantized: Annotated[Path, typer.Option(help="The quantized checkpoint.")],
    graphs: Annotated[Path, typer.Option(help="Folder of reference graphs.")],
    device: Annotated[Path, typer.Option(help="Folder of device graphs.")],
    calib: CalibOption,
    output: OutputOption,
    steps: Annotated[int, typer.Option(min=1, help="Number of greedy decode steps to compare.")] = 4,
    samples: Annotated[int, typer.Option(min=2, help="Number of manifest lines to compare on.")] = 3,
    provider: ProviderOption = Provider.cpu,
    form: FormatOption = Format.text,
) -> None:
    """Compare torch, reference graphs and device graphs at every tap. Exit code 4 names the first beyond its budget."""
    from toolchain.calibration.manifest import read_manifest
    from toolchain.files.folders import staged_folder
    from toolchain.graph.validate import validate_line
    from toolchain.models.configs import read_config
    from toolchain.models.registry import family_for

    family = family_for(read_config(model))
    chosen = read_manifest(calib)[:samples]
    with staged_folder(output) as folder:
        report = validate_line(
            family, model, quantized, graphs, device, chosen, folder, steps=steps, provider=provider.value
        )
    emit(report.to_json(), report.text(), form)
