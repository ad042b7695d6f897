"""The report's data, gathered from a run folder: only what the stages wrote, nothing computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.files.folders import read_json
from toolchain.report.html import NONE, NOT_GATED
from toolchain.values import BitPlan

QUESTIONS_SHOWN = 12


def report_data(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `render_report` takes, for the run in `folder`; `facts` is what `run_line` has found so far."""
    stages = folder / "stages"
    resolved = read_json(folder / "config.resolved.json")["settings"]
    record = read_json(folder / "run.json")
    plan = BitPlan.from_json(read_json(stages / "20-quantize" / "bitplan.json"))
    data: dict[str, Any] = {
        "title": f"{Path(resolved['model']).name} for {resolved['target']}",
        "parts": _parts(facts["bits"]["parts"]),
        "layers": _layers(plan, read_json(stages / "20-quantize" / "layers.json")["layers"]),
        "kept": dict(plan.kept),
        "validation": _taps(read_json(stages / "50-validate" / "validation.json")),
        "versions": {
            "run began": record["started"],
            "mgvq": record["tool_version"],
            **record["host"],
            **record["versions"],
        },
        "commands": [record["command"]],
    }
    planned = read_json(stages / "10-plan" / "memory.json")
    data["latency"] = planned.pop("latency")
    data["memory"] = planned
    if "accuracy" in facts:
        answers = read_json(stages / "25-evaluate" / "answers.json")
        data["headline"] = _headline(facts, answers)
        data["questions"] = _questions(answers, Path(resolved["data"]))
    return data


_MODELS = {"fp": "fp is the model as given", "rtn": "rtn rounds each weight to nearest at the same bits"}


def _names(accuracy: Mapping[str, Any]) -> str:
    """What the short names of models mean, as a sentence."""
    return "; ".join([*(text for name, text in _MODELS.items() if name in accuracy), "mgvq is this bundle"]) + "."


def _headline(facts: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
    bits = facts["bits"]
    return {
        "accuracy": facts["accuracy"],
        "samples": len(answers["fp"]["answers"]),
        "bits": {
            "of the indices alone": bits["index"],
            "of the whole model, all counted": bits["model"],
            "of the decoder, all counted": bits["language"],
        },
        "note": f"{_names(facts['accuracy'])} Counted are codes, padding, tables, scales and 16-bit tensors.",
    }


def _parts(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "part": name,
            "index_bits": p["index"],
            "real_bits": p["real"],
            "bytes": p["bytes"],
            "bytes_fp16": 2 * p["weights"],
        }
        for name, p in parts.items()
    ]


def _layers(plan: BitPlan, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for entry in measured:
        layer = plan.layer(entry["name"])
        rows.append(
            {
                "name": layer.name,
                "part": layer.part,
                "code": layer.code,
                "bits": layer.index_bits,
                "bytes": layer.codes_bytes + layer.scales_bytes,
                "error": entry["relative_error"],
            }
        )
    return rows


def _taps(validation: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for report in validation["reports"]:
        for tap in report["taps"]:
            gated = tap["budget"] is not None
            rows.append(
                {
                    "compared": f"{report['b']} against {report['a']}",
                    "tap": tap["tap"],
                    "relative error": f"{tap['relative']:.2e}",
                    "max abs": f"{tap['max_abs']:.2e}",
                    "budget": f"{tap['budget']:g}" if gated else NONE,
                    "verdict": ("pass" if tap["passed"] else "fail") if gated else NOT_GATED,
                }
            )
    for answer in validation["answers"]:
        verdict = "pass" if answer["passed"] else "fail"
        rows.append({"compared": "graphs against generate", "tap": answer["prompt"], "verdict": verdict})
    return rows


def _questions(answers: Mapping[str, Any], manifest: Path) -> list[dict[str, Any]]:
    """A spread of the questions asked, with every model's answer."""
    images = [json.loads(line)["image"] for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    asked = answers["fp"]["answers"]
    shown = range(0, len(asked), max(1, len(asked) // QUESTIONS_SHOWN))
    return [
        {
            "image": manifest.parent / images[i],
            "prompt": asked[i]["prompt"],
            "expected": asked[i]["answer"],
            "answers": {name: found["answers"][i]["given"] for name, found in answers.items()},
        }
        for i in list(shown)[:QUESTIONS_SHOWN]
    ]
