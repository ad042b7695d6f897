"""Methods beside one another on one model: how far each moves the answers, and the bits it really needs for that."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.bits.bitplan import BitCount
from toolchain.bits.bitplan import plan as plan_bits
from toolchain.calibration.inputs import CalibrationInput, calibration_inputs
from toolchain.calibration.self_answers import answered
from toolchain.checkpoint.folder import DTYPE_BYTES, Checkpoint, open_checkpoint
from toolchain.checkpoint.loading import load_model, load_quantized
from toolchain.checkpoint.modules import keep_decoded
from toolchain.checkpoint.permuted import load_permuted, read_permutations
from toolchain.errors import UsageError
from toolchain.evaluate.answers import (
    answer_all,
    check_answers,
    divergences_from,
    image_clusters,
    log_probabilities_of,
    refuse_overlap,
)
from toolchain.evaluate.compare_rows import Images, Measured, full_precision_row, no_pair, pair_with, row_of
from toolchain.evaluate.layer_errors import layer_errors
from toolchain.models.family import Family, Processor
from toolchain.models.registry import family_for
from toolchain.models.runner import torch_graphs
from toolchain.quantize.baselines.dense import quantize_dense
from toolchain.quantize.baselines.registry import COMPARED
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings, open_request
from toolchain.quantize.driver.sequence import LayerResult
from toolchain.quantize.methods import Method, parse_method
from toolchain.values import ANSWER_TOKENS, SILENT, LayerSpec, Progress, Sample


@dataclass(frozen=True)
class Quantized:
    """A model a method has quantized: ready to run, what it costs, how its layers came out, the seconds it took."""

    model: nn.Module
    bits: dict[str, BitCount]
    layers: tuple[LayerResult, ...]
    seconds: float
    permutations: Mapping[str, Tensor] = field(default_factory=dict)


def check_methods(names: Sequence[str], against: str | None = None) -> tuple[tuple[Method, ...], str | None]:
    """(the methods, the name of the one that the others are held against: `against`, else the first of ours, None
    where there is none).

    Raises:
        UsageError: a name that is no method, one given twice, or `against` is not among them.
    """
    methods = tuple(parse_method(name) for name in names)
    for name in names:
        if list(names).count(name) > 1:
            raise UsageError(f"method {name!r} is named twice; name it once")
    if not methods:
        raise UsageError("no method to compare; name some, such as rtn,gptq,gptvq,vptq,mgvq")
    if against is not None and against not in names:
        raise UsageError(f"against {against!r}: expected one of the methods compared, {', '.join(names)}")
    return methods, against or next((method.name for method in methods if method.recipe), None)


@dataclass(frozen=True)
class CompareSettings:
    """What is compared.

    bits: averages of index bits, as for `bitplan.plan`.
    seeds: of the quantization; the first of the bootstrap too.
    against: the method the others are held against; the first of ours when absent.
    answer_tokens: of the model's own answers to calibration lines without one (`self_answers.answered`), made once for
        all methods.
    """

    bits: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    against: str | None = None
    answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class _Bench:
    """What every method is measured with: the full-precision model, what it says, and the samples of both kinds."""

    base: Checkpoint
    family: Family
    processor: Processor
    specs: tuple[LayerSpec, ...]
    calibration: list[Sample]
    evaluation: list[Sample]
    inputs: list[CalibrationInput]
    dense: nn.Module
    reference: list[Tensor]
    progress: Progress


def compare_methods(
    model: Path | str,
    calibration: list[Sample],
    evaluation: list[Sample],
    settings: CompareSettings,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """One row for full precision ("fp", first), then one for every method at every average of index bits asked for.

    Every method gets the same calibration samples and its default options; models are quantized one after the other
    into a temporary folder. Figures of a row are means over the seeds, intervals 95 % bootstrap intervals over
    images; a row:

        method            as asked for
        bits              real bits a weight over the model: codes, padding, codebooks, scales, and all that stays
        language_bits     the same over the language model alone
        index_bits        of the quantized weights; null for full precision
        requested_bits    what was asked for; null for full precision
        bytes             of all weights as stored
        kl, kl_low, kl_high   KL(full precision ‖ method), nats per answer token of the manifest's answers, stop token
                              included
        against           the method this row is held against at the same average; null where there is none
        kl_ratio, kl_ratio_low, kl_ratio_high   this row's KL over that method's, both over the same drawn images;
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

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work: a method or an average that is not possible,
            samples without answers, an image that stands in both manifests.
    """
    methods, against = check_methods(settings.methods, settings.against)
    check_seeds(settings.seeds)
    base = open_checkpoint(model)
    family = family_for(base.config)
    specs = family.layers(base.config)
    check_averages(specs, settings.bits, methods)
    check_answers(evaluation)
    refuse_overlap(calibration, evaluation)
    bench = _open(base, family, calibration, evaluation, settings.answer_tokens, progress)
    images = Images(image_clusters(evaluation), settings.seeds[0])
    rows = [_measure_full_precision(bench)]
    for average in settings.bits:
        found = {
            method.name: [
                _measure(bench, method, average, seed)
                for seed in (settings.seeds if method.draws else settings.seeds[:1])
            ]
            for method in methods
        }
        for name, measured in found.items():
            pair = pair_with(against, found[against], measured, images) if against else no_pair()
            rows.append(row_of(name, average, measured, images, pair))
    return rows


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no seeds at all, and a seed given twice.

    Raises:
        UsageError: saying which.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds {list(seeds)}: expected at least one, each once; such as 0,1,2")


def check_averages(specs: Sequence[LayerSpec], averages: Sequence[float], methods: Sequence[Method]) -> None:
    """Refuse an average of index bits that some method has no codes for.

    Raises:
        UsageError: as `bitplan.plan`.
    """
    for average in averages:
        for overlapping in {method.overlaps for method in methods}:
            plan_bits(specs, {}, bits=average, overlapping=overlapping)


def _open(
    base: Checkpoint,
    family: Family,
    calibration: list[Sample],
    evaluation: list[Sample],
    answer_tokens: int,
    progress: Progress,
) -> _Bench:
    processor = family.load_processor(base.folder, base.config)
    progress.stage(f"fp         {len(evaluation)} questions")
    dense = load_model(base)
    reference = log_probabilities_of(dense, processor, evaluation, progress)
    inputs = calibration_inputs(processor, evaluation)
    filled = answered(processor.host, partial(torch_graphs, family, dense), calibration, answer_tokens, progress)
    specs = family.layers(base.config)
    return _Bench(base, family, processor, specs, filled, evaluation, inputs, dense, reference, progress)


def _measure_full_precision(bench: _Bench) -> dict[str, Any]:
    tensors = bench.base.tensors.values()
    size = sum(info.elements * DTYPE_BYTES[info.dtype] for info in tensors)
    accuracy = _accuracy(bench, bench.dense)
    bench.progress.done(f"accuracy {100 * accuracy:.1f} %")
    return full_precision_row(8 * size / sum(info.elements for info in tensors), size, accuracy)


def _measure(bench: _Bench, method: Method, bits: float, seed: int) -> Measured:
    """Quantize by a method with one seed, and ask the model everything that a row says."""
    progress, samples = bench.progress, bench.evaluation
    progress.stage(f"{method.name:<10} {bits:g} index bits, seed {seed}, {len(bench.calibration)} samples")
    found = _quantize(bench, method, bits, seed)
    with keep_decoded(found.model):
        divergences = divergences_from(bench.reference, found.model, bench.processor, samples, progress)
        accuracy = _accuracy(bench, found.model)
        layers = _layers(bench, found)
    mean = float(torch.cat(divergences).mean())
    progress.done(f"KL {mean:.4f} nats a token, accuracy {100 * accuracy:.1f} %")
    return Measured(seed, found.bits, layers, found.seconds, accuracy, divergences)


def _quantize(bench: _Bench, method: Method, bits: float, seed: int) -> Quantized:
    """The model as the method leaves it, read back from the checkpoint where the format can hold it."""
    # Lines without an answer are answered already, where they are to be.
    settings = QuantizeSettings(method.name, bits, seed=seed, answer_tokens=0)
    if not method.fits_checkpoint:
        request = replace(
            open_request(bench.base, settings), inputs=calibration_inputs(bench.processor, bench.calibration)
        )
        dense = quantize_dense(request, COMPARED[method.name], bench.progress)
        return Quantized(dense.model, dense.bits, dense.layers, dense.seconds)
    with tempfile.TemporaryDirectory(prefix="mgvq-compare-") as temporary:
        out = Path(temporary) / method.name
        result = quantize_checkpoint(bench.base, bench.calibration, out, settings, bench.progress)
        return Quantized(load_quantized(out), result.bits, result.layers, result.seconds, read_permutations(out))


def _layers(bench: _Bench, found: Quantized) -> tuple[dict[str, Any], ...]:
    """`layers` of a row: the layers as they were quantized, then those whose codes are tied to one of them."""
    dense = bench.dense
    if found.permutations:
        dense = load_permuted(bench.base, bench.family, found.permutations)
    errors = layer_errors(dense, found.model, bench.inputs, bench.specs, bench.progress)
    measured = {error.name: error.to_json() for error in errors}
    tied_to = {spec.name: spec.tied_to for spec in bench.specs}
    known = {layer.name: {k: v for k, v in asdict(layer).items() if k != "seconds"} for layer in found.layers}
    for spec in bench.specs:
        if spec.tied_to:
            code = known[spec.tied_to]["code"]
            known[spec.name] = {"name": spec.name, "part": spec.part, "code": code, "relative_error": None}
    return tuple(layer | measured[name] | {"tied_to": tied_to[name]} for name, layer in known.items())


def _accuracy(bench: _Bench, model: nn.Module) -> float:
    graphs = torch_graphs(bench.family, model)
    return answer_all(bench.processor.host, graphs, bench.evaluation, progress=bench.progress).accuracy
