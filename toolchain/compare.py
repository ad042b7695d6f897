"""Methods beside one another on one model: how far each moves the answers, and the bits it really needs for that."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.answering import answered
from toolchain.baselines.dense import quantize_dense
from toolchain.bitplan import BitCount
from toolchain.bitplan import plan as plan_bits
from toolchain.calibration import CalibrationInput, calibration_inputs
from toolchain.checkpoint import load_model, load_quantized, open_checkpoint
from toolchain.compare_rows import Measured, Pictures, full_precision_row, no_pair, pair_with, row_of
from toolchain.errors import UsageError
from toolchain.evaluate import (
    answer_all,
    check_answers,
    divergences_from,
    log_probabilities_of,
    picture_clusters,
    refuse_overlap,
)
from toolchain.folders import DTYPE_BYTES
from toolchain.layer_errors import layer_errors
from toolchain.methods import COMPARED, METHODS
from toolchain.mgvq.dealing import load_dealt, read_orders
from toolchain.mgvq.recipe import NAME as OURS
from toolchain.mgvq.recipe import parse_recipe
from toolchain.models.family import Family, Processor, family_for, read_config
from toolchain.models.runner import torch_graphs
from toolchain.modules import keep_decoded
from toolchain.pace import layer_progress
from toolchain.quantize import quantize_checkpoint
from toolchain.reporter import Reporter, Silent
from toolchain.sequence import LayerResult
from toolchain.values import ANSWER_TOKENS, LayerSpec, Sample

# They draw nothing: one seed says all.
SEEDLESS = ("rtn", "gptq")


@dataclass(frozen=True)
class Quantized:
    """A model a method has quantized: ready to run, what it costs, how its layers came out, the seconds it took."""

    model: nn.Module
    bits: dict[str, BitCount]
    layers: tuple[LayerResult, ...]
    seconds: float
    orders: Mapping[str, Tensor] = field(default_factory=dict)


def is_known(name: str) -> bool:
    """Whether a method of that name can be compared.

    Raises:
        UsageError: it begins like one of ours and names parts that there are none of.
    """
    if name in METHODS or name in COMPARED:
        return True
    if not name.startswith(OURS):
        return False
    parse_recipe(name)
    return True


def check_methods(methods: Sequence[str], against: str | None = None) -> str | None:
    """The method that the others are held against: `against`, else the first of ours, None where there is none.

    Raises:
        UsageError: a name that is no method, one given twice, or `against` is not among them.
    """
    known = ", ".join([OURS, *METHODS, *COMPARED])
    for name in methods:
        if not is_known(name):
            raise UsageError(f"method {name!r} is not known; compare any of {known}")
        if list(methods).count(name) > 1:
            raise UsageError(f"method {name!r} is named twice; name it once")
    if not methods:
        raise UsageError(f"no method to compare; name some of {known}")
    if against is not None and against not in methods:
        raise UsageError(f"against {against!r}: expected one of the methods compared, {', '.join(methods)}")
    return against or next((name for name in methods if name.startswith(OURS)), None)


@dataclass(frozen=True)
class _Bench:
    """What every method is measured with: the full-precision model, what it says, and the samples of both kinds."""

    folder: Path
    family: Family
    processor: Processor
    specs: tuple[LayerSpec, ...]
    calibration: list[Sample]
    evaluation: list[Sample]
    inputs: list[CalibrationInput]
    dense: nn.Module
    reference: list[Tensor]
    report: Reporter


def compare_methods(
    model: Path | str,
    calibration: list[Sample],
    evaluation: list[Sample],
    bits: float | Sequence[float],
    methods: Sequence[str],
    seeds: Sequence[int] = (0,),
    against: str | None = None,
    progress: Reporter | None = None,
    answer_tokens: int = ANSWER_TOKENS,
) -> list[dict[str, Any]]:
    """One row for full precision ("fp", first), then one for every method at every average of index bits asked for.

    Every method gets the same calibration samples and its default options; models are quantized one after the other
    into a temporary folder. Figures of a row are means over the seeds, intervals 95 % bootstrap intervals over
    pictures; a row:

        method            as asked for
        bits              real bits a weight over the model: codes, padding, tables, scales, and all that stays
        language_bits     the same over the language model alone
        index_bits        of the quantized weights; null for full precision
        requested_bits    what was asked for; null for full precision
        bytes             of all weights as stored
        kl, kl_low, kl_high   KL(full precision ‖ method), nats per answer token of the manifest's answers, stop token
                              included
        against           the method this row is held against at the same average; null where there is none
        kl_ratio, kl_ratio_low, kl_ratio_high   this row's KL over that method's, both over the same drawn pictures;
                              above 1 is worse; null where that method's KL is zero
        kl_difference, kl_difference_low, kl_difference_high   this row's KL less that method's
        accuracy          share of greedy answers that equal the expected ones, 0 to 1
        seconds           quantization took
        seeds             that it was quantized with; the first alone for methods that draw nothing
        per_seed          [{seed, bits, language_bits, index_bits, bytes, kl, kl_low, kl_high, accuracy, seconds}]
        layers            [{name, part, code, relative_error, error_text, error_image, error_both, tied_to}], the first
                          error on the calibration inputs as the sweep met them, the rest by `layer_errors` on the
                          evaluation inputs; null where there is none, as for the first of a tied head

    Args:
        model: folder of a float checkpoint.
        bits: as for `bitplan.plan`, or several of them.
        seeds: of the quantization; the first of the bootstrap too.
        against: the method the others are held against; the first of ours when absent.
        answer_tokens: of the model's own answers to calibration lines without one (`answering.answered`), made once
            for all methods.

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work: a method or an average that is not possible,
            samples without answers, a picture that stands in both manifests.
    """
    averages = tuple(bits) if isinstance(bits, Sequence) else (bits,)
    against = check_methods(methods, against)
    check_seeds(seeds)
    folder = Path(model)
    family = family_for(read_config(folder))
    specs = family.layers(read_config(folder))
    check_averages(specs, averages, methods)
    check_answers(evaluation)
    refuse_overlap(calibration, evaluation)
    bench = _open(folder, family, specs, calibration, evaluation, progress or Silent(), answer_tokens)
    pictures = Pictures(picture_clusters(evaluation), seeds[0])
    rows = [_measure_full_precision(bench)]
    for average in averages:
        found = {
            method: [_measure(bench, method, average, seed) for seed in (seeds[:1] if method in SEEDLESS else seeds)]
            for method in methods
        }
        for method, measured in found.items():
            pair = pair_with(against, found[against], measured, pictures) if against else no_pair()
            rows.append(row_of(method, average, measured, pictures, pair))
    return rows


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds at all, and a seed given twice.

    Raises:
        UsageError: saying which.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds {list(seeds)}: expected at least one, each once; such as 0,1,2")


def check_averages(specs: Sequence[LayerSpec], averages: Sequence[float], methods: Sequence[str]) -> None:
    """Refuse an average of index bits that some method has no codes for.

    Raises:
        UsageError: as `bitplan.plan`.
    """
    overlaps = {name.startswith(OURS) and parse_recipe(name).overlap for name in methods}
    for average in averages:
        for overlapping in overlaps:
            plan_bits(specs, {}, bits=average, overlapping=overlapping)


def _open(
    folder: Path,
    family: Family,
    specs: tuple[LayerSpec, ...],
    calibration: list[Sample],
    evaluation: list[Sample],
    report: Reporter,
    answer_tokens: int,
) -> _Bench:
    processor = family.load_processor(folder)
    report.stage(f"fp         {len(evaluation)} questions")
    dense = load_model(folder)
    reference = log_probabilities_of(dense, processor, evaluation, report.step)
    inputs = calibration_inputs(processor, evaluation)
    graphs = partial(torch_graphs, family, dense)
    told = partial(report.step, what="answers")
    filled = answered(processor.host, graphs, calibration, answer_tokens, told)
    return _Bench(folder, family, processor, specs, filled, evaluation, inputs, dense, reference, report)


def _measure_full_precision(bench: _Bench) -> dict[str, Any]:
    tensors = open_checkpoint(bench.folder).tensors.values()
    size = sum(info.elements * DTYPE_BYTES[info.dtype] for info in tensors)
    accuracy = _accuracy(bench, bench.dense)
    bench.report.done(f"accuracy {100 * accuracy:.1f} %")
    return full_precision_row(8 * size / sum(info.elements for info in tensors), size, accuracy)


def _measure(bench: _Bench, method: str, bits: float, seed: int) -> Measured:
    """Quantize by a method with one seed, and ask the model everything that a row says."""
    report, samples = bench.report, bench.evaluation
    report.stage(f"{method:<10} {bits:g} index bits, seed {seed}, {len(bench.calibration)} samples")
    found = _quantize(bench, method, bits, seed)
    with keep_decoded(found.model):
        divergences = divergences_from(bench.reference, found.model, bench.processor, samples, report.step)
        accuracy = _accuracy(bench, found.model)
        layers = _layers(bench, found)
    mean = float(torch.cat(divergences).mean())
    report.done(f"KL {mean:.4f} nats a token, accuracy {100 * accuracy:.1f} %")
    return Measured(seed, found.bits, layers, found.seconds, accuracy, divergences)


def _quantize(bench: _Bench, method: str, bits: float, seed: int) -> Quantized:
    """The model as the method leaves it, read back from the checkpoint where the format can hold it."""

    step = layer_progress(bench.report, bench.specs)

    def watch(what: str, done: int, total: int) -> None:
        bench.report.step(done, total, what)

    folder, samples = bench.folder, bench.calibration
    if method in COMPARED:
        dense = quantize_dense(folder, samples, method=COMPARED[method], bits=bits, seed=seed, progress=step)
        return Quantized(dense.model, dense.bits, dense.layers, dense.seconds)
    with tempfile.TemporaryDirectory(prefix="mgvq-compare-") as temporary:
        out = Path(temporary) / method
        result = quantize_checkpoint(
            folder,
            samples,
            out,
            method=method,
            bits=bits,
            seed=seed,
            progress=step,
            watch=watch,
            answer_tokens=0,  # answered already, where they are to be
        )
        return Quantized(load_quantized(out), result.bits, result.layers, result.seconds, read_orders(out))


def _layers(bench: _Bench, found: Quantized) -> tuple[dict[str, Any], ...]:
    """`layers` of a row: the layers as they were quantized, then those whose codes are tied to one of them."""
    dense = bench.dense
    if found.orders:
        dense = load_dealt(bench.folder, bench.family, read_config(bench.folder), found.orders)
    errors = layer_errors(dense, found.model, bench.inputs, bench.specs, _stepper(bench))
    measured = {error.name: error.to_json() for error in errors}
    tied_to = {spec.name: spec.tied_to for spec in bench.specs}
    known = {layer.name: {k: v for k, v in asdict(layer).items() if k != "seconds"} for layer in found.layers}
    for spec in bench.specs:
        if spec.tied_to:
            code = known[spec.tied_to]["code"]
            known[spec.name] = {"name": spec.name, "part": spec.part, "code": code, "relative_error": None}
    return tuple(layer | measured[name] | {"tied_to": tied_to[name]} for name, layer in known.items())


def _stepper(bench: _Bench) -> Callable[[int], None]:
    return lambda done: bench.report.step(done, len(bench.inputs), "layer errors")


def _accuracy(bench: _Bench, model: nn.Module) -> float:
    graphs = torch_graphs(bench.family, model)
    return answer_all(bench.processor.host, graphs, bench.evaluation, progress=bench.report.step).accuracy
