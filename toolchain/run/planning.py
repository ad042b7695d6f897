"""From a checkpoint's config to a verdict: formats by part, memory on the board, latency, and what to turn down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.bits import bitplan
from toolchain.bits.codebook_sharing import GROUP
from toolchain.errors import UsageError
from toolchain.models.configs import Config, read_config
from toolchain.models.inventory import kept_elements
from toolchain.models.registry import family_for
from toolchain.plan import advice
from toolchain.plan import latency as roofline
from toolchain.plan import memory as budget
from toolchain.plan.target import Target
from toolchain.values import BitPlan


@dataclass(frozen=True)
class ModelPlan:
    """Everything `mgvq plan` says. `problems` is empty when the model fits."""

    bits: BitPlan
    memory: budget.MemoryPlan
    latency: roofline.LatencyPlan
    advice: tuple[advice.Advice, ...]
    largest: dict[str, Any]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return self.memory.to_json() | {
            "fits": not self.problems,
            "problems": list(self.problems),
            "bits": {name: dataclasses.asdict(count) for name, count in bitplan.real_bits(self.bits).items()},
            "advice": [item.to_json() for item in self.advice],
            "largest": self.largest,
            "latency": self.latency.to_json(),
        }

    def text(self) -> str:
        """The plan for people: one line a part, the verdict, what to change."""
        memory = self.memory
        lines = [f"{'part':<24}{'MiB':>10}"]
        lines += [f"{name:<24}{size / 2**20:>10.1f}" for name, size in memory.parts.items()]
        lines += [
            f"{'peak':<24}{memory.peak_bytes / 2**20:>10.1f}   of {memory.usable_bytes / 2**20:.0f} usable on "
            f"{memory.target}",
            f"{'build peak':<24}{memory.build_peak_bytes / 2**20:>10.1f}",
            f"{'largest block':<24}{memory.largest_block_bytes / 2**20:>10.1f}   {memory.largest_block[0]}",
        ]
        for phase in self.latency.phases:
            lines.append(
                f"{phase.name:<24}{phase.ms:>10.1f} ms (between {phase.low_ms:.1f} and {phase.high_ms:.1f}, estimated)"
            )
        lines.append("verdict: " + ("does not fit" if self.problems else "fits"))
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  advice: {a.text}" for a in self.advice]
        lines.append("largest that fits: " + ", ".join(f"{key} {value}" for key, value in self.largest.items()))
        return "\n".join(lines)


def parse_image(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "1280x720"; None of None.

    Raises:
        UsageError: not two positive whole numbers.
    """
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UsageError(f"image {text!r}: expected WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(width), int(height)


def plan_formats(
    folder: Path,
    bits: float | None,
    budget_bytes: int | None = None,
    overrides: tuple[tuple[str, str], ...] = (),
    overlapping: bool = False,
    codebooks: str = GROUP,
    config: Config | None = None,
) -> BitPlan:
    """The codes of a checkpoint folder for an average, or for a budget where `bits` is None; only config.json is read.

    With both, `budget_bytes` changes nothing: compare it with `bitplan.real_bits`.

    Raises:
        UsageError: as `bitplan.plan`.
        BudgetError: bits is None and the smallest plan is larger than the budget.
        UnsupportedError, InputDataError: the architecture is not known; config.json is missing or broken.
    """
    config = read_config(folder) if config is None else config
    specs = family_for(config).layers(config)
    return bitplan.plan(
        specs,
        kept_elements(folder, specs),
        bits=bits,
        budget_bytes=budget_bytes if bits is None else None,
        overrides=list(overrides),
        overlapping=overlapping,
        codebooks=codebooks,
    )


def over_budget(formats: BitPlan, budget_bytes: int | None) -> str | None:
    """What is wrong with the size of a plan, None where it is within the budget or there is none."""
    weights = bitplan.real_bits(formats)["total"].bytes
    if budget_bytes is None or weights <= budget_bytes:
        return None
    return (
        f"all weights take {weights:,} bytes, more than the budget of {budget_bytes:,}; leave --bits out to spend the "
        "budget, or raise it"
    )


def plan_model(
    folder: Path,
    target: Target,
    bits: float | None,
    context_tokens: int | None = None,
    image: tuple[int, int] | None = None,
    budget_bytes: int | None = None,
    overrides: tuple[tuple[str, str], ...] = (),
    overlapping: bool = False,
    codebooks: str = GROUP,
    config: Config | None = None,
) -> ModelPlan:
    """The plan of a checkpoint folder on a board; only its config.json is read.

    Args:
        bits: index bits on average; None spends `budget_bytes` instead.
        budget_bytes: of all weights; with `bits`, a limit that makes a problem.
        overlapping: codes with overlapping windows (`methods.Method.overlaps`).
        codebooks: whose they are (`methods.Method.codebooks`).
        config: its config.json, where that is read already.

    Raises:
        As `plan_formats`.
    """
    config = read_config(folder) if config is None else config
    formats = plan_formats(folder, bits, budget_bytes, overrides, overlapping, codebooks, config)
    family = family_for(config)
    geometry = family.geometry(config)
    workload = budget.default_workload(target, image, context_tokens)
    memory = budget.plan_memory(formats, geometry, target, workload)
    problem = over_budget(formats, budget_bytes)
    problems = (*memory.problems, problem) if problem else memory.problems
    largest = {
        "image_side": advice.largest_image(formats, geometry, target, workload),
        "context": advice.largest_context(formats, geometry, target, workload),
        "bits": advice.largest_bits(formats, geometry, target, workload),
    }
    latency = roofline.plan_latency(formats, geometry, target, workload)
    return ModelPlan(formats, memory, latency, advice.advise(formats, geometry, target, memory), largest, problems)
