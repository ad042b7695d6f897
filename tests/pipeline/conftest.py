"""Both families' tiny checkpoints, quantized, exported and rewritten once, and every call of a run recorded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from recorded_lines import made_line, prompts_of

from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.modules import keep_decoded
from toolchain.cli import main
from toolchain.device.engines.recorded_calls import record_calls
from toolchain.graph.validate import mixed_batches
from toolchain.models.runner import torch_graphs

DEMO = Path(__file__).parents[2] / "toolchain" / "demo"
LINES = 12  # of calibration: round-to-nearest only looks at them to have been given some


@pytest.fixture(scope="session", params=["tiny_qwen2_vl", "tiny_internvl"])
def line(request, tiny_manifest, tmp_path_factory) -> SimpleNamespace:
    """One family's stage folders, made once. Read only."""
    samples = read_manifest(tiny_manifest)
    root = tmp_path_factory.mktemp(request.param)
    return made_line(request.getfixturevalue(request.param), samples, root, method="rtn")


@pytest.fixture(scope="session")
def recorded(line):
    """Every call of the quantized torch model over prefill and three decode steps."""
    with keep_decoded(line.quantized):
        graphs = torch_graphs(line.family, line.quantized)
        return record_calls(line.host, graphs, mixed_batches(prompts_of(line, 4)), 3)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory) -> Path:
    """The demo model's bundle for an 8 GB Orin Nano, coded by the quickest method. Read only."""
    folder = tmp_path_factory.mktemp("demo")
    lines = (DEMO / "pictures" / "calib.jsonl").read_text(encoding="utf-8").splitlines()[:LINES]
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry["image"] = str(DEMO / "pictures" / entry["image"])
    (folder / "calib.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    command = ["all", "-m", DEMO / "model", "--calib", folder / "calib.jsonl", "-o", folder / "run"]
    assert main([*map(str, command), "--target", "orin-nano-8gb", "--set", "quantize.method=rtn"]) == 0
    return folder / "run" / "bundle"
