"""profile.json and the table for people, from what was measured, predicted and sampled.

{"format": "mgvq-profile", "format_version": 1, "tool_version", "measured": true,
 "source": what was profiled, "bundle": its manifest's SHA-256 or null, "backend": name,
 "runtime": {name: version or setting}, "machine": {"name", "l4t", "jetpack", "cuda", "gpu": {"name", "sm"} or null},
 "question": {"prompt", "image": [width, height] or null, "prompt_tokens", "image_tokens"},
 "settings": {"repeats", "warmup", "tokens"},
 "phases": [{"phase", "median", "mad", "p10", "p90", "least", "count", "graph_ms",    milliseconds; decode one token
             "predicted_ms", "predicted_low_ms", "predicted_high_ms", "ratio"}],      measured / predicted, or null
 "first_token": {"median", "mad", "p10", "p90", "least", "count"}, "tokens_per_s": from decode's median,
 "prediction": {"target", "power_mode", "same_device": was it measured on that board} or null,
 "layers": {phase: {"total_ms", "runs", "slowdown", "parts", "blocks", "modules"}},
             rows {"name", "part", "ms", "share", "layers"} that sum to total_ms, "unattributed" and "host" last;
             means over `runs` recorded runs (decode: the first tokens of an answer), `slowdown` times as long as the
             same runs took without recording
             "mad" is not scaled, percentiles are interpolated, decode pools all tokens of all answers: `Spread`
 "telemetry": Telemetry.to_json() or null, "warnings": [sentences]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain import __version__
from toolchain.device.profile.layers import HOST, UNATTRIBUTED, Row, Tally
from toolchain.device.profile.measure import PHASES, Measured, Question, Spread
from toolchain.device.runtime.board import Gpu
from toolchain.plan.latency import LatencyPlan

FORMAT = "mgvq-profile"
FORMAT_VERSION = 1
UNSTEADY = 0.05  # median absolute deviation over median from which a figure is called unsteady
COSTLY = 1.25  # slowdown from which the layer rows are called distorted
_PHASE_TITLES = {
    "prepare": "image and prompt to inputs",
    "vision": "image through the tower",
    "embed": "ids and features merged",
    "prefill": "prompt through the decoder",
    "decode": "one more token",
}


@dataclass(frozen=True)
class Prediction:
    """The latency model's answer, and whether the measurement was made on the board it is for."""

    plan: LatencyPlan
    same_device: bool


@dataclass(frozen=True)
class Machine:
    """Where it ran; None where it was not found."""

    name: str
    l4t: str | None = None
    jetpack: str | None = None
    cuda: str | None = None
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Source:
    """What was profiled and where: its name for people, its manifest's hash if it is a bundle."""

    name: str
    bundle: str | None
    machine: Machine


def profile_json(
    measured: Measured,
    question: Question,
    *,
    source: Source,
    backend: str,
    runtime: Mapping[str, Any],
    prediction: Prediction | None,
    telemetry: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of profile.json. `notes` are warnings found elsewhere; telemetry's own are added."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool_version": __version__,
        "measured": True,
        "source": source.name,
        "bundle": source.bundle,
        "machine": dataclasses.asdict(source.machine),
        "backend": backend,
        "runtime": dict(runtime),
        "question": {
            "prompt": question.prompt,
            "image": list(question.image_size) if question.image_size else None,
            "prompt_tokens": measured.prompt_tokens,
            "image_tokens": measured.image_tokens,
        },
        "settings": dataclasses.asdict(measured.settings),
        "phases": [_phase(name, measured, prediction) for name in PHASES if name in measured.phases],
        "first_token": dataclasses.asdict(measured.first_token),
        "tokens_per_s": measured.tokens_per_s,
        "prediction": _prediction(prediction),
        "layers": {name: _layers(found, measured.slowdown[name]) for name, found in measured.tallies.items()},
        "telemetry": dict(telemetry) if telemetry else None,
    }
    found = _unsteady(measured) + _costly(measured) + _off_the_model(data)
    return data | {"warnings": [*notes, *found, *((telemetry or {}).get("warnings", []))]}


def _phase(name: str, measured: Measured, prediction: Prediction | None) -> dict[str, Any]:
    spread = measured.phases[name]
    row = {"phase": name, **dataclasses.asdict(spread), "graph_ms": measured.graph_ms.get(name)}
    expected = next((x for x in prediction.plan.phases if x.name == name), None) if prediction else None
    return row | {
        "predicted_ms": expected.ms if expected else None,
        "predicted_low_ms": expected.low_ms if expected else None,
        "predicted_high_ms": expected.high_ms if expected else None,
        "ratio": spread.median / expected.ms if expected else None,
    }


def _prediction(prediction: Prediction | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    plan = prediction.plan
    return {"target": plan.target, "power_mode": plan.power_mode, "same_device": prediction.same_device}


def _layers(found: Tally, slowdown: float) -> dict[str, Any]:
    def rows(each: Sequence[Row]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(row) | {"share": row.ms / found.total_ms if found.total_ms else 0.0} for row in each]

    return {
        "total_ms": found.total_ms,
        "runs": found.runs,
        "slowdown": slowdown,
        "parts": rows(found.by_part),
        "blocks": rows(found.by_block),
        "modules": rows(found.by_module),
    }


def _unsteady(measured: Measured) -> list[str]:
    def text(name: str, spread: Spread) -> str:
        return (
            f"{name}: the median absolute deviation is {100 * spread.mad / spread.median:.0f} % of the median; run "
            "more --repeats on a quiet machine with fixed clocks"
        )

    watched = {"vision", "prefill", "decode"} & set(measured.phases)
    return [
        text(name, measured.phases[name])
        for name in PHASES
        if name in watched and measured.phases[name].mad > UNSTEADY * measured.phases[name].median
    ]


def _costly(measured: Measured) -> list[str]:
    slow = {name: factor for name, factor in measured.slowdown.items() if factor > COSTLY}
    if not slow:
        return []
    worst = max(slow, key=lambda name: slow[name])
    return [
        f"recording layers made {worst} take {slow[worst]:.1f} times as long: many small layers weigh too much in the "
        f"rows, and the recording itself is in {UNATTRIBUTED}; the phases' own figures were taken without it"
    ]


def _off_the_model(data: Mapping[str, Any]) -> list[str]:
    about = data["prediction"]
    if about is None:
        return []
    if not about["same_device"]:
        return [
            f"predicted figures are for {about['target']} in {about['power_mode']}, and this was measured elsewhere: "
            "the ratios compare two machines, not the model with the truth"
        ]
    return [
        f"{row['phase']}: measured {row['median']:.3g} ms, the latency model says {row['predicted_low_ms']:.3g} to "
        f"{row['predicted_high_ms']:.3g} ms; please report it with profile.json"
        for row in data["phases"]
        if row["predicted_ms"] and not row["predicted_low_ms"] <= row["median"] <= row["predicted_high_ms"]
    ]


def profile_text(data: Mapping[str, Any]) -> str:
    """profile.json for people: phases, then where their time went by part, then warnings."""
    lines = [
        _head(data),
        "",
        f"{'phase':<10}{'median':>10}{'mad':>9}{'p10':>9}{'p90':>9}{'predicted':>12}{'ratio':>8}",
    ]
    for row in data["phases"]:
        guess = f"{row['predicted_ms']:>12.2f}{row['ratio']:>8.2f}" if row["predicted_ms"] else f"{'–':>12}{'–':>8}"
        lines.append(
            f"{row['phase']:<10}{row['median']:>10.2f}{row['mad']:>9.2f}{row['p10']:>9.2f}{row['p90']:>9.2f}{guess}"
            f"   ms, {_PHASE_TITLES[row['phase']]}"
        )
    lines.append(f"first token after {data['first_token']['median']:.1f} ms, then {data['tokens_per_s']:.1f} tokens/s")
    for name, found in data["layers"].items():
        shares = ", ".join(f"{row['name']} {100 * row['share']:.0f} %" for row in _worth_showing(found["parts"]))
        lines.append(f"{name:<10}{shares}")
    telemetry = data["telemetry"]
    if telemetry:
        lines.append(telemetry["summary"])
    return "\n".join(lines + [f"warning: {text}" for text in data["warnings"]])


def _head(data: Mapping[str, Any]) -> str:
    question = data["question"]
    image = "{}x{} image".format(*question["image"]) if question["image"] else "no image"
    versions = ", ".join(f"{key} {value}" for key, value in data["runtime"].items())
    return (
        f"{data['source']} on {data['machine']['name']} with {data['backend']} ({versions}):\n"
        f"{question['prompt_tokens']} prompt tokens, {image}, "
        f"{data['settings']['tokens']} new tokens, {data['settings']['repeats']} repeats"
    )


def _worth_showing(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in parts if abs(row["share"]) >= 0.01 or row["name"] in (UNATTRIBUTED, HOST)]
