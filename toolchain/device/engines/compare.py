"""Comparison at named taps, graph call by graph call, on the same inputs.

A run of the generation loop is recorded once; every other source then answers the recorded calls. So an error is seen
at the tap where it arises, and does not reach the graphs and steps after it.

Error of a tap in one call: max |a − b|, and relative ‖a − b‖ / ‖a‖ over the positions that count. Positions of left
padding attend to nothing and hold whatever the kernel leaves there, so they are excluded from hidden states and keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.device.engines.recorded_calls import Call
from toolchain.device.generation.answer import Graphs
from toolchain.device.generation.ort_graphs import GRAPH_NAMES
from toolchain.errors import NumericGateError, UsageError

# float32 against float32: the kernels of two runtimes sum in different orders. Measured on exports of 2 to 6 decoder
# layers: at most 1.4e-6 relative (logits). If it grows with the square root of depth, 80 layers reach 5e-6; the rest is
# room for longer sums. Rows or tables in the wrong place give an error of the size of the output itself.
FLOAT32_BUDGET = 1e-4
# Float16 against float32: twice what the plain implementation, the full-precision model run in float16, is off by.
HALF_FACTOR = 2.0

Budget = float | Mapping[tuple[str, str], float] | None  # one for all taps; by (graph, tap); None gates nothing

TAP_ORDER = ("vision.blocks.", "image_features", "inputs_embeds", "decoder.layers.", "logits", "present.")


@dataclass(frozen=True)
class Source:
    """One way to compute the graphs, and what reports call it."""

    name: str
    graphs: Graphs


@dataclass(frozen=True)
class TapError:
    """The worst call of one tap, of `calls` in all; `share` is relative / budget. Both are None where nothing gates."""

    graph: str
    tap: str
    step: str
    calls: int
    max_abs: float
    relative: float
    budget: float | None

    @property
    def share(self) -> float | None:
        return None if self.budget is None else self.relative / self.budget

    @property
    def verdict(self) -> str:
        """pass, fail, or reported where nothing gates; a NaN fails."""
        if self.budget is None:
            return "reported"
        return "pass" if self.relative <= self.budget else "fail"

    def to_json(self) -> dict[str, Any]:
        verdict = {"verdict": self.verdict, "passed": self.verdict != "fail"}
        return dataclasses.asdict(self) | {"share": self.share} | verdict


@dataclass(frozen=True)
class ValidationReport:
    """`b` against `a`, taps in the order of the forward pass."""

    a: str
    b: str
    taps: tuple[TapError, ...]

    @property
    def first_failure(self) -> TapError | None:
        return next((tap for tap in self.taps if tap.verdict == "fail"), None)

    @property
    def passed(self) -> bool:
        return self.first_failure is None

    @property
    def worst(self) -> TapError:
        """The tap that uses most of its budget; where nothing gates, the one of largest relative error."""

        def badness(tap: TapError) -> float:
            found = tap.relative if tap.share is None else tap.share
            return np.inf if np.isnan(found) else found

        return max(self.taps, key=badness)

    def require(self) -> None:
        """Raises NumericGateError naming the first tap beyond its budget."""
        tap = self.first_failure
        if tap is not None:
            raise NumericGateError(
                f"{self.b} against {self.a}: first tap beyond its budget is {tap.graph}/{tap.tap} at {tap.step}: "
                f"expected a relative error of at most {tap.budget:g}, found {tap.relative:.3g} (max abs "
                f"{tap.max_abs:.3g}); the taps before it agree, so look at what computes this one"
            )

    def to_json(self) -> dict[str, Any]:
        first = self.first_failure
        return {
            "a": self.a,
            "b": self.b,
            "passed": self.passed,
            "first_failure": None if first is None else f"{first.graph}/{first.tap}",
            "taps": [tap.to_json() for tap in self.taps],
        }


def answered(source: Source, calls: Iterable[Call]) -> list[Call]:
    """The calls with the source's own outputs."""
    return [dataclasses.replace(call, outputs=source.graphs[call.graph](call.feeds)) for call in calls]


def compare(a: Source, b: Source, calls: Sequence[Call], budget: Budget = FLOAT32_BUDGET) -> ValidationReport:
    """Both sources answer the inputs of every call; `budget` None, or one that lacks a tap, reports without a gate.

    Raises:
        UsageError: nothing was compared: no calls, or no output that both have.
        NumericGateError: an output has another shape in `b`.
    """
    return compare_calls(a.name, answered(a, calls), b.name, answered(b, calls), budget)


def compare_calls(
    a: str, a_calls: Sequence[Call], b: str, b_calls: Sequence[Call], budget: Budget = FLOAT32_BUDGET
) -> ValidationReport:
    """As `compare`, on outputs that are there already; call n of both has the same inputs."""
    worst: dict[tuple[str, str], TapError] = {}
    for expected, found in zip(a_calls, b_calls, strict=True):
        for tap in (name for name in expected.outputs if name in found.outputs):
            own = budget.get((expected.graph, tap)) if isinstance(budget, Mapping) else budget
            error = _tap_error(expected, tap, found.outputs[tap], own)
            before = worst.get((expected.graph, tap))
            worst[expected.graph, tap] = error if before is None else _worse(before, error)
    if not worst:
        raise UsageError(f"validation of {b} against {a}: nothing was compared; expected at least one call")
    return ValidationReport(a, b, tuple(sorted(worst.values(), key=_place)))


def half_budgets(full: Sequence[Call], half: Sequence[Call]) -> dict[tuple[str, str], float]:
    """(graph, tap) → budget for float16 work, from one model's calls in float32 and in float16.

    Calls with padding are left out: in float16 a wholly masked row of a plain implementation is NaN.
    """
    pairs = [(a, b) for a, b in zip(full, half, strict=True) if not _is_padded(a)]
    report = compare_calls("float32", [a for a, _ in pairs], "float16", [b for _, b in pairs], budget=None)
    return {(tap.graph, tap.tap): max(FLOAT32_BUDGET, HALF_FACTOR * tap.relative) for tap in report.taps}


def _is_padded(call: Call) -> bool:
    mask = call.feeds.get("attention_mask")
    return mask is not None and not np.asarray(mask).all()


def _place(tap: TapError) -> tuple[int, int]:
    """Rank in the forward pass: block outputs come before what is computed from them."""
    kind = next((i for i, start in enumerate(TAP_ORDER) if tap.tap.startswith(start)), len(TAP_ORDER))
    return GRAPH_NAMES.index(tap.graph) if tap.graph in GRAPH_NAMES else len(GRAPH_NAMES), kind


def _tap_error(call: Call, tap: str, found: NDArray, budget: float | None) -> TapError:
    expected = call.outputs[tap]
    if expected.shape != found.shape:
        raise NumericGateError(
            f"{call.graph}/{tap} at {call.step}: expected shape {list(expected.shape)}, found {list(found.shape)}; "
            "compare graphs of the same model"
        )
    keep = _positions_that_count(call, tap)
    a, b = (np.asarray(x, dtype=np.float64)[keep] for x in (expected, found))
    norm, length = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    max_abs = float(np.abs(a - b).max(initial=0.0))
    relative = length / norm if norm else (0.0 if length == 0 else float("inf"))
    return TapError(call.graph, tap, call.step, 1, max_abs, relative, budget)


def _positions_that_count(call: Call, tap: str) -> Any:
    """An index: everything, or the real tokens of hidden states [B, S, H] and of keys and values [S, B, heads, D]."""
    mask = call.feeds.get("attention_mask")
    if mask is None or not tap.startswith(("decoder.layers.", "present.")):
        return slice(None)
    length = call.feeds["inputs_embeds"].shape[1]
    real = np.asarray(mask)[:, -length:] > 0
    return real.T if tap.startswith("present.") else real


def _worse(before: TapError, now: TapError) -> TapError:
    """The one of larger relative error, a NaN before all; the count and the largest absolute error of both."""
    worst = before if now.relative <= before.relative or np.isnan(before.relative) else now
    max_abs = float(np.maximum(before.max_abs, now.max_abs))
    return dataclasses.replace(worst, calls=before.calls + 1, max_abs=max_abs)
