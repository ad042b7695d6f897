"""Both families' tiny checkpoints, quantized, exported and rewritten once, and every call of a run recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from recorded_lines import prompts_of

from toolchain.calibration import read_manifest
from toolchain.checkpoint import load_quantized
from toolchain.graph.export import reference_graphs_from_model
from toolchain.graph.pipeline import device_form, portable_form
from toolchain.graph.reference import record_calls
from toolchain.graph.validate import mixed_batches
from toolchain.models.family import family_for, read_config
from toolchain.models.runner import torch_graphs
from toolchain.modules import keep_decoded
from toolchain.quantize import quantize_checkpoint


@pytest.fixture(scope="session", params=["tiny_qwen2_vl", "tiny_internvl"])
def line(request, tiny_manifest, tmp_path_factory) -> SimpleNamespace:
    """One family's stage folders, made once. Read only."""
    model: Path = request.getfixturevalue(request.param)
    root = tmp_path_factory.mktemp(request.param)
    samples = read_manifest(tiny_manifest)
    quantize_checkpoint(model, samples[:2], root / "quantized", method="rtn")
    quantized = load_quantized(root / "quantized")
    family = family_for(read_config(model))
    for name in ("reference", "device", "portable"):
        (root / name).mkdir()
    exported = reference_graphs_from_model(quantized, family, root / "reference")
    report = device_form(root / "reference", root / "device")
    portable_form(root / "reference", root / "portable")
    host = family.load_host(read_config(model), model)
    return SimpleNamespace(
        root=root, model=model, quantized=quantized, family=family, exported=exported, report=report, host=host,
        samples=samples,
    )  # fmt: skip


@pytest.fixture(scope="session")
def recorded(line):
    """Every call of the quantized torch model over prefill and three decode steps."""
    with keep_decoded(line.quantized):
        graphs = torch_graphs(line.family, line.quantized)
        return record_calls(line.host, graphs, mixed_batches(prompts_of(line, 4)), 3)
