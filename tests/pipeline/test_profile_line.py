"""A tiny model profiled in onnxruntime and in torch: same answer, every phase, every quantized layer named."""

from __future__ import annotations

import pytest

from toolchain.bench.profile_onnx import named_calls
from toolchain.bench.profile_torch import TorchBackend
from toolchain.checkpoint.modules import vq_modules
from toolchain.device.families.base import open_image
from toolchain.device.profile.measure import Question, Settings, measure
from toolchain.device.profile.ort import OrtBackend

SETTINGS = Settings(2, 1, 3)


@pytest.fixture(scope="module")
def question(line) -> Question:
    sample = line.samples[0]
    return Question(sample.prompt, open_image(sample.image))


@pytest.fixture(scope="module")
def profiles(line, question):
    ort = OrtBackend(line.root / "portable", line.host, "cpu", named_calls)
    torch = TorchBackend(line.root / "quantized")
    return {b.name: measure(b, line.host, question, SETTINGS) for b in (ort, torch)}


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_every_phase_is_measured_and_every_row_counted(profiles, backend):
    found = profiles[backend]
    assert list(found.phases) == ["prepare", "vision", "embed", "prefill", "decode"]
    assert all(spread.least > 0 for spread in found.phases.values())
    for tally in found.tallies.values():
        for rows in (tally.by_module, tally.by_block, tally.by_part):
            assert sum(row.ms for row in rows) == pytest.approx(tally.total_ms)
        assert all(row.ms >= 0 for row in tally.by_module)


def test_backends_answer_alike(profiles):
    assert profiles["ort"].answer == profiles["torch"].answer


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_every_quantized_layer_has_a_row_of_its_own(line, profiles, backend):
    tallies = profiles[backend].tallies
    rows = {row.name for phase in ("vision", "embed", "prefill", "decode") for row in tallies[phase].by_module}
    missing = {name for name in vq_modules(line.quantized) if name not in rows}
    assert not missing


def test_parts_are_where_they_belong(profiles):
    for found in profiles.values():
        parts = {phase: {row.name for row in tally.by_part} for phase, tally in found.tallies.items()}
        assert {"vision attention", "vision mlp", "projector"} <= parts["vision"]
        assert {"attention", "mlp", "norm", "head", "embedding"} <= parts["decode"]
        assert "attention" not in parts["vision"]
        assert "vision attention" not in parts["decode"]
