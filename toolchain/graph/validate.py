"""The validation stage: every form that a model takes on its way, compared at every tap, and what the answers are.

    PyTorch fp         → PyTorch quantized     reported without a gate: what quantization costs, tap by tap
    PyTorch quantized  → reference graphs      gated: the export changed nothing
    PyTorch quantized  → device, float32       gated: the rewrite and the stored bytes changed nothing
    PyTorch quantized  → device graphs         gated: float16 matrix work costs no more than twice what the
                                               full-precision model loses when it runs in float16
    generate           = reference graphs      gated: greedy answers equal token for token

on one prompt alone, with the cache as it is and in a device's buckets, and on pairs padded on the left; prefill and
decode steps, images of several sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_quantized
from toolchain.checkpoint.modules import keep_decoded
from toolchain.checkpoint.permuted import load_permuted, read_permutations
from toolchain.device.engines.compare import Source, ValidationReport, answered, compare_calls, half_budgets
from toolchain.device.engines.recorded_calls import Call, record_calls, store_reference
from toolchain.device.families import Prepared
from toolchain.device.families.base import open_image
from toolchain.device.generation.answer import CachePlan, greedy
from toolchain.device.generation.ort_graphs import ort_graphs
from toolchain.errors import NumericGateError
from toolchain.files.folders import write_json
from toolchain.graph.op.plugin_op import device_graphs
from toolchain.models.family import Family, Processor
from toolchain.models.runner import torch_graphs
from toolchain.values import FORMAT_VERSION, Sample

FLOAT, QUANTIZED, REFERENCE = "pytorch-fp", "pytorch-quantized", "onnx-reference"
EXACT_DEVICE, DEVICE = "onnx-device-float32", "onnx-device"
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class AnswerCheck:
    """Greedy token ids of one prompt: from transformers' generate, and from the three reference graphs."""

    prompt: str
    expected: tuple[int, ...]
    found: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.expected == self.found


@dataclass(frozen=True)
class LineValidation:
    """All comparisons, in the order of this module's list, over `calls` graph calls."""

    reports: tuple[ValidationReport, ...]
    answers: tuple[AnswerCheck, ...]
    calls: int

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports) and all(answer.passed for answer in self.answers)

    def require(self) -> None:
        """Raises NumericGateError naming the first tap beyond its budget, or the first answer that differs."""
        for report in self.reports:
            report.require()
        for answer in self.answers:
            if not answer.passed:
                raise NumericGateError(
                    f"greedy tokens of {answer.prompt!r}: generate gives {list(answer.expected)}, the reference graphs "
                    f"{list(answer.found)}; every tap agreed, so look at positions and masks in the generation loop"
                )

    def summary(self) -> dict[str, Any]:
        """What the stage says of itself; `text` is one line for people."""
        worst = {f"{report.b} against {report.a}": report.worst.relative for report in self.reports}
        gated = [report for report in self.reports if report.worst.budget is not None]
        parts = [f"{r.b} {r.worst.relative:.1e} of {r.worst.budget:.0e} at {r.worst.tap}" for r in gated]
        equal, taps = sum(answer.passed for answer in self.answers), sum(len(r.taps) for r in gated)
        answers = f"{equal} of {len(self.answers)} answers equal generate"
        return {
            "passed": self.passed,
            "taps": taps,
            "worst_relative_error": worst,
            "answers_equal": equal,
            "answers": len(self.answers),
            "text": f"{taps} taps over {self.calls} calls, worst relative error {', '.join(parts)}; {answers}",
        }

    def text(self) -> str:
        """One line a tap of every comparison, then the summary."""
        lines = []
        for report in self.reports:
            lines.append(f"{report.b} against {report.a}")
            for tap in report.taps:
                used = "not gated" if tap.share is None else f"{tap.verdict}, {100 * tap.share:.1f} % of budget"
                lines.append(f"  {tap.tap:<24} relative {tap.relative:.2e}  max abs {tap.max_abs:.2e}  {used}")
        return "\n".join([*lines, self.summary()["text"]])

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "calls": self.calls,
            "reports": [report.to_json() for report in self.reports],
            "answers": [asdict(answer) | {"passed": answer.passed} for answer in self.answers],
        }


def validate_line(
    family: Family,
    model: Path,
    quantized: Path,
    reference: Path,
    device: Path,
    samples: Sequence[Sample],
    folder: Path,
    *,
    steps: int = 4,
    provider: str = "cpu",
) -> LineValidation:
    """Compare all forms on `samples`; write validation.json, reference.safetensors and reference.json into `folder`.

    Args:
        model, quantized: checkpoint folders. reference, device: folders of graphs.
        samples: one is enough; two or more also run as pairs of different length, with left padding.
        steps: greedy tokens after prefill that taps are compared on.

    Raises:
        NumericGateError: a gate failed; everything is written first.
        EnvironmentMismatch: onnxruntime lacks the provider.
        InputDataError: a checkpoint, graph or image is missing or broken.
    """
    processor = family.load_processor(model)
    host = processor.host
    prompts = [host.prepare(open_image(sample.image), sample.prompt) for sample in samples]
    graphs = Source(REFERENCE, ort_graphs(reference, provider))
    loaded = load_quantized(quantized)
    with keep_decoded(loaded):
        calls = _recorded(host, torch_graphs(family, loaded), prompts, steps)
        expected = [_generate(loaded, processor, sample) for sample in samples]
    full = load_permuted(open_checkpoint(model), family, read_permutations(quantized))
    floating = answered(Source(FLOAT, torch_graphs(family, full)), calls)
    half = answered(Source(FLOAT, torch_graphs(family, full.half())), calls)
    exact = answered(Source(EXACT_DEVICE, device_graphs(device, "float32")), calls)
    rewritten = answered(Source(DEVICE, device_graphs(device)), calls)
    reports = (
        compare_calls(FLOAT, floating, QUANTIZED, calls, budget=None),
        compare_calls(QUANTIZED, calls, REFERENCE, answered(graphs, calls)),
        compare_calls(QUANTIZED, calls, EXACT_DEVICE, exact),
        compare_calls(QUANTIZED, calls, DEVICE, rewritten, half_budgets(floating, half)),
    )
    found = [greedy(host, graphs.graphs, [prompt], ANSWER_TOKENS)[0] for prompt in prompts]
    answers = tuple(AnswerCheck(s.prompt, tuple(e), tuple(f)) for s, e, f in zip(samples, expected, found))
    result = LineValidation(reports, answers, len(calls))
    write_json(folder / "validation.json", result.to_json())
    store_reference(folder, _without_taps(calls, family, loaded), QUANTIZED)
    result.require()
    return result


def mixed_batches(prompts: Sequence[Prepared]) -> list[list[Prepared]]:
    """The shortest prompt alone, then pairs of short and long ones, so that padding and mixed sizes both occur."""
    ordered = sorted(prompts, key=lambda prompt: prompt.length)
    half = len(ordered) // 2
    return [ordered[:1], *([a, b] for a, b in zip(ordered[:half], reversed(ordered[len(ordered) - half :])))]


def _recorded(host: Any, graphs: Any, prompts: Sequence[Prepared], steps: int) -> list[Call]:
    """Calls of mixed batches with an exact cache, and of the shortest prompt with the cache a device is built for."""
    batches = mixed_batches(prompts)
    plan = CachePlan.from_settings(host.settings["decoder"])
    return [
        *record_calls(host, graphs, batches, steps),
        *record_calls(host, graphs, batches[:1], steps, plan),
    ]


def _generate(model: Any, processor: Processor, sample: Sample) -> list[int]:
    inputs = processor.model_inputs(sample)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def _without_taps(calls: Sequence[Call], family: Family, model: torch.nn.Module) -> list[Call]:
    """The calls with the outputs that graphs without taps have, which a device can repeat."""
    taps = {name for spec in family.graphs(model) for name in spec.taps}
    return [
        Call(call.step, call.graph, call.feeds, {k: v for k, v in call.outputs.items() if k not in taps})
        for call in calls
    ]
