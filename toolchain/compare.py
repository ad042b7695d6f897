"""Methods beside one another on one model: how far each moves the answers, and the bits it really needs for that."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from toolchain.baselines.dense import quantize_dense
from toolchain.bitplan import BitCount
from toolchain.bitplan import plan as plan_bits
from toolchain.checkpoint import load_any, load_model, load_quantized, open_checkpoint
from toolchain.errors import InputDataError, UsageError
from toolchain.evaluate import answer_all, refuse_overlap
from toolchain.folders import DTYPE_BYTES
from toolchain.kl import Interval, bootstrap, log_probabilities, token_divergences
from toolchain.methods import COMPARED, METHODS
from toolchain.models.family import Family, Processor, family_for, read_config
from toolchain.models.runner import torch_graphs
from toolchain.modules import keep_decoded
from toolchain.quantize import LayerResult, quantize_checkpoint
from toolchain.values import Sample, sha256_file

FULL_PRECISION = "fp"


class Reporter(Protocol):
    """Where progress goes."""

    def stage(self, title: str) -> None: ...
    def step(self, done: int, total: int, what: str = "") -> None: ...
    def done(self, summary: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, what: str = "") -> None:
        """Nothing."""

    def done(self, summary: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Quantized:
    """A model a method has quantized: ready to run, what it costs, how its layers came out, the seconds it took."""

    model: nn.Module
    bits: dict[str, BitCount]
    layers: tuple[LayerResult, ...]
    seconds: float


def check_methods(methods: Sequence[str]) -> None:
    """Refuse names that are no methods, and names given twice.

    Raises:
        UsageError: saying which.
    """
    known = [*METHODS, *COMPARED]
    for name in methods:
        if name not in known:
            raise UsageError(f"method {name!r} is not known; compare any of {', '.join(known)}")
        if list(methods).count(name) > 1:
            raise UsageError(f"method {name!r} is named twice; name it once")
    if not methods:
        raise UsageError(f"no method to compare; name some of {', '.join(known)}")


def check_answers(samples: Sequence[Sample]) -> None:
    """Refuse samples that the divergence of an answer cannot be measured on.

    Raises:
        InputDataError: no samples, or one without an answer.
    """
    if not samples:
        raise InputDataError("evaluation manifest: expected at least one line, found none")
    for number, sample in enumerate(samples, start=1):
        if not sample.answer:
            raise InputDataError(
                f'evaluation manifest: sample {number} ({sample.image.name} {sample.prompt!r}) has no "answer" whose '
                "tokens could be compared; add one to every line"
            )


def answer_log_probabilities(model: nn.Module, processor: Processor, sample: Sample) -> Tensor:
    """float32[t, v]: what the model says at each token of the sample's answer, its stop token included, given the rest.

    The answer is the manifest's, not the model's own, so that two models are asked about the same tokens.
    """
    inputs = processor.model_inputs(sample, with_answer=True)
    tokens = len(processor.host.encode(sample.answer or "")) + 1
    with torch.inference_mode():
        # The last position says what follows the stop token; nothing does.
        logits = model(**inputs, use_cache=False, logits_to_keep=tokens + 1).logits[0, :-1]
    return log_probabilities(logits)


def log_probabilities_of(
    model: nn.Module, processor: Processor, samples: Sequence[Sample], progress: Callable[[int, int], None]
) -> list[Tensor]:
    """`answer_log_probabilities` of every sample: 4 · v bytes a token, held in memory."""
    found = []
    for sample in samples:
        found.append(answer_log_probabilities(model, processor, sample))
        progress(len(found), len(samples))
    return found


def checkpoint_log_probabilities(
    folder: Path, processor: Processor, samples: Sequence[Sample], progress: Callable[[int, int], None]
) -> list[Tensor]:
    """`log_probabilities_of` the checkpoint in a folder, quantized or not, which is gone from memory afterwards.

    Raises:
        InputDataError: the checkpoint is broken, or a sample has no answer.
    """
    check_answers(samples)
    model = load_any(folder)
    with keep_decoded(model):
        return log_probabilities_of(model, processor, samples, progress)


def divergence_from(
    reference: Sequence[Tensor],
    model: nn.Module,
    processor: Processor,
    samples: Sequence[Sample],
    seed: int,
    progress: Callable[[int, int], None],
) -> Interval:
    """KL(reference ‖ model) in nats per answer token with its bootstrap interval, pictures as clusters.

    Args:
        reference: `log_probabilities_of` the reference model on the same samples.

    Raises:
        UsageError: the models have different vocabularies.
    """
    divergences = []
    for expected, sample in zip(reference, samples, strict=True):
        found = answer_log_probabilities(model, processor, sample)
        if found.shape != expected.shape:
            raise UsageError(
                f"the reference model has a vocabulary of {expected.shape[-1]} tokens, this one of "
                f"{found.shape[-1]}; compare a model with the checkpoint it was quantized from"
            )
        divergences.append(token_divergences(expected, found))
        progress(len(divergences), len(samples))
    pictures = {path: sha256_file(path) for path in {sample.image for sample in samples}}
    return bootstrap(divergences, [pictures[sample.image] for sample in samples], seed)


def compare_methods(
    model: Path | str,
    calibration: list[Sample],
    evaluation: list[Sample],
    bits: float | Sequence[float],
    methods: Sequence[str],
    seed: int = 0,
    progress: Reporter | None = None,
) -> list[dict[str, Any]]:
    """One row for full precision ("fp", first), then one for every method at every average of index bits asked for.

    Every method gets the same calibration samples, the same plan of bits, and its default options; models are quantized
    one after the other into a temporary folder. A row:

        method            as asked for
        bits              real bits a weight over the model: codes, padding, tables, scales, and all that stays
        language_bits     the same over the language model alone
        index_bits        of the quantized weights; null for full precision
        requested_bits    what was asked for; null for full precision
        bytes             of all weights as stored
        kl, kl_low, kl_high   KL(full precision ‖ method), nats per answer token of the manifest's answers, stop token
                              included, and its 95 % bootstrap interval over pictures
        accuracy          share of greedy answers that equal the expected ones, 0 to 1
        seconds           quantization took
        layers            [{name, part, code, relative_error}] on the calibration inputs

    Args:
        model: folder of a float checkpoint.
        bits: as for `bitplan.plan`, or several of them.
        seed: of the quantization and of the bootstrap.

    Raises:
        UsageError, UnsupportedError, InputDataError: before any work: a method or an average that is not possible,
            samples without answers, a picture that stands in both manifests.
    """
    averages = tuple(bits) if isinstance(bits, Sequence) else (bits,)
    check_methods(methods)
    folder, report = Path(model), progress or Silent()
    config = read_config(folder)
    family = family_for(config)
    for average in averages:
        plan_bits(family.layers(config), {}, bits=average)
    check_answers(evaluation)
    refuse_overlap(calibration, evaluation)
    processor = family.load_processor(folder)
    report.stage(f"fp         {len(evaluation)} questions")
    dense = load_model(folder)
    reference = log_probabilities_of(dense, processor, evaluation, report.step)
    rows = [_full_precision_row(folder) | {"accuracy": _accuracy(family, processor, dense, evaluation, report)}]
    report.done(f"accuracy {100 * rows[0]['accuracy']:.1f} %")
    del dense
    for average in averages:
        for method in methods:
            report.stage(f"{method:<10} {average:g} index bits, {len(calibration)} samples")
            found = _quantize(folder, calibration, method, average, seed, report)
            with keep_decoded(found.model):
                interval = divergence_from(reference, found.model, processor, evaluation, seed, report.step)
                accuracy = _accuracy(family, processor, found.model, evaluation, report)
            rows.append(_row(method, average, found, interval, accuracy))
            report.done(f"KL {interval.mean:.4f} nats a token, accuracy {100 * accuracy:.1f} %")
    return rows


def _quantize(
    folder: Path, calibration: list[Sample], method: str, bits: float, seed: int, report: Reporter
) -> Quantized:
    """The model as the method leaves it, read back from the checkpoint where the format can hold it."""

    def step(layer: LayerResult, done: int, total: int) -> None:
        report.step(done, total, layer.name)

    if method in COMPARED:
        dense = quantize_dense(folder, calibration, method=COMPARED[method], bits=bits, seed=seed, progress=step)
        return Quantized(dense.model, dense.bits, dense.layers, dense.seconds)
    with tempfile.TemporaryDirectory(prefix="mgvq-compare-") as temporary:
        out = Path(temporary) / method
        result = quantize_checkpoint(folder, calibration, out, method=method, bits=bits, seed=seed, progress=step)
        return Quantized(load_quantized(out), result.bits, result.layers, result.seconds)


def _accuracy(
    family: Family, processor: Processor, model: nn.Module, samples: Sequence[Sample], report: Reporter
) -> float:
    return answer_all(processor.host, torch_graphs(family, model), samples, progress=report.step).accuracy


def _full_precision_row(folder: Path) -> dict[str, Any]:
    """Everything of the first row that needs no model: bits and bytes are those of the file."""
    tensors = open_checkpoint(folder).tensors.values()
    size = sum(info.elements * DTYPE_BYTES[info.dtype] for info in tensors)
    bits = 8 * size / sum(info.elements for info in tensors)
    none: dict[str, Any] = {"index_bits": None, "requested_bits": None, "seconds": 0.0, "layers": []}
    costs = {"bits": bits, "language_bits": bits, "bytes": size}
    return {"method": FULL_PRECISION} | costs | none | Interval(0.0, 0.0, 0.0).to_json()


def _row(method: str, requested: float, found: Quantized, kl: Interval, accuracy: float) -> dict[str, Any]:
    total = found.bits["total"]
    layers = [{k: v for k, v in asdict(layer).items() if k != "seconds"} for layer in found.layers]
    return {
        "method": method,
        "bits": total.real,
        "language_bits": found.bits["language"].real,
        "index_bits": total.index,
        "requested_bits": requested,
        "bytes": total.bytes,
        **kl.to_json(),
        "accuracy": accuracy,
        "seconds": found.seconds,
        "layers": layers,
    }
