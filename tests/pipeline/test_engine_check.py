"""Engines against the calls that a bundle stores, on a simulated device: right ones pass, wrong ones are named."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_cuda import SimulatedCuda
from simulated_engines import device_functions, graphs_of_folder, loaded_engines

from toolchain.bundle.manifest import write_bundle
from toolchain.device.engines import engine_check
from toolchain.device.runtime.cuda import Cuda
from toolchain.errors import InputDataError, NumericGateError
from toolchain.graph.validate import validate_line
from toolchain.models.configs import read_config


@pytest.fixture(scope="module")
def bundle(line, tmp_path_factory):
    """A line's device graphs with the calls and budgets that its validation stored. Read only."""
    folder = tmp_path_factory.mktemp("checked")
    (folder / "reference").mkdir()
    stages = (line.model, line.root / "quantized", line.root / "reference", line.root / "device")
    validate_line(line.family, *stages, line.samples[:2], folder / "reference", steps=2)
    return write_bundle({"device": line.root / "device", "reference": folder / "reference"}, folder / "bundle")


@pytest.fixture
def functions(line):
    return device_functions(line.root / "device")


def check(line, bundle, functions):
    cuda = SimulatedCuda()
    profiles = line.family.profiles(read_config(line.model), line.model, line.host.settings)
    engines = loaded_engines(graphs_of_folder(line.root / "device", functions, profiles), cuda)
    try:
        return engine_check.check_engines(bundle, engines, Cuda(cuda)), engines
    finally:
        assert not cuda.sizes, "all memory was given back"


def test_right_engines_pass_at_every_output_and_profile(line, bundle, functions):
    report, engines = check(line, bundle, functions)
    report.require()
    outputs = {name for engine in engines.values() for name, x in engine.tensors.items() if not x.is_input}
    assert {tap.tap for tap in report.taps} == outputs
    assert all(tap.budget for tap in report.taps)
    decoder = engines["decoder"]._engine
    assert [bool(context.shapes) for context in decoder.contexts] == [True, True], "prefill, and decode's own profile"
    assert decoder.contexts[1].shapes["inputs_embeds"][1] == 1
    said = engine_check.summary(report)
    assert (said["passed"], said["against"], said["calls"]) == (True, "pytorch-quantized", 3)
    # An engine's room is wider than the device graphs', who have used some of theirs.
    assert 0 < said["relative_error"] < said["allowed"] / engine_check.ENGINE_FACTOR


@pytest.mark.parametrize(("graph", "tap"), [("vision", "image_features"), ("decoder", "logits")])
def test_an_engine_that_computes_something_else_is_named(line, bundle, functions, graph, tap):
    def wrong(feeds, right=functions[graph]):
        outputs = right(feeds)
        return outputs | {tap: np.roll(outputs[tap], 1, axis=-1)}

    report, _ = check(line, bundle, functions | {graph: wrong})
    with pytest.raises(NumericGateError, match=rf"engines against pytorch-quantized: first tap .* is {graph}/{tap} at"):
        report.require()


def test_weights_in_the_wrong_place_are_found(line, bundle, functions):
    """What binds by name may still bind the wrong one: two tensors of one shape, exchanged."""
    graph = functions["decoder"]

    def exchanged(feeds):
        codes = [name for name, x in feeds.items() if x.dtype == np.int8 and x.ndim == 1]
        a, b = next((a, b) for a in codes for b in codes if a < b and feeds[a].shape == feeds[b].shape)
        return graph(feeds | {a: feeds[b], b: feeds[a]})

    report, _ = check(line, bundle, functions | {"decoder": exchanged})
    assert not report.passed


def test_a_bundle_without_calls_or_budgets(line, bundle, functions, tmp_path):
    assert engine_check.has_calls(bundle)
    bare = write_bundle({"device": line.root / "device"}, tmp_path / "bare")
    assert not engine_check.has_calls(bare)
    (tmp_path / "reference").mkdir()
    for name in ("reference.json", "reference.safetensors"):
        (tmp_path / "reference" / name).write_bytes(bundle.path(f"reference/{name}").read_bytes())
    (tmp_path / "reference" / "validation.json").write_text('{"reports": []}')
    pieces = {"device": line.root / "device", "reference": tmp_path / "reference"}
    with pytest.raises(InputDataError, match=r"validation.json: expected the budgets of onnx-device"):
        check(line, write_bundle(pieces, tmp_path / "b"), functions)
