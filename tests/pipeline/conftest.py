"""Both families' tiny checkpoints, quantized, exported and rewritten once, and every call of a run recorded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from recorded_lines import made_line, prompts_of

from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.modules import keep_decoded
from toolchain.device.engines.recorded_calls import record_calls
from toolchain.graph.validate import mixed_batches
from toolchain.models.runner import torch_graphs


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
