"""The comparison: first tap beyond its budget, padding left out, NaN never passes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from toolchain.device.engines.compare import FLOAT32_BUDGET, Source, compare, compare_calls, half_budgets
from toolchain.device.engines.recorded_calls import Call, load_reference, store_reference
from toolchain.errors import InputDataError, NumericGateError, UsageError


def decoder_call(rng, past: int = 2) -> Call:
    """Batch of 2, three new tokens; the second row's first two positions of five are padding."""
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    feeds = {"inputs_embeds": rng.standard_normal((2, 5 - past, 4)).astype(np.float32), "attention_mask": mask}
    outputs = {
        "logits": rng.standard_normal((2, 6)).astype(np.float32),
        "present.0.key": rng.standard_normal((5 - past, 2, 1, 4)).astype(np.float32),
        "decoder.layers.0": rng.standard_normal((2, 5 - past, 4)).astype(np.float32),
        "decoder.layers.1": rng.standard_normal((2, 5 - past, 4)).astype(np.float32),
    }
    return Call("batch2.0.prefill", "decoder", feeds, outputs)


def vision_call(rng) -> Call:
    outputs = {"image_features": np.ones((4, 4), np.float32), "vision.blocks.0": np.ones((4, 4), np.float32)}
    return Call("batch2.0.prefill", "vision", {"pixel_values": np.zeros(3, np.float32)}, outputs)


def changed(call: Call, **outputs) -> Call:
    return dataclasses.replace(call, outputs=call.outputs | outputs)


@pytest.fixture
def call() -> Call:
    return decoder_call(np.random.default_rng(0))


def test_equal_outputs_have_no_error_and_stand_in_forward_order(call):
    calls = [call, vision_call(None)]
    report = compare_calls("a", calls, "b", calls)
    order = ["vision.blocks.0", "image_features", "decoder.layers.0", "decoder.layers.1", "logits", "present.0.key"]
    assert [tap.tap for tap in report.taps] == order
    assert report.passed
    assert all(tap.max_abs == 0 and tap.share == 0 and tap.verdict == "pass" for tap in report.taps)
    report.require()


def test_the_first_tap_beyond_its_budget_is_named(call):
    wrong = changed(call, **{name: call.outputs[name] * 1.01 for name in ("decoder.layers.1", "logits")})
    report = compare_calls("torch", [call], "onnx", [wrong])
    assert report.first_failure.tap == "decoder.layers.1"
    assert report.first_failure.relative == pytest.approx(0.01, rel=1e-3)
    assert report.first_failure.share == pytest.approx(0.01 / FLOAT32_BUDGET, rel=1e-3)
    with pytest.raises(
        NumericGateError, match=r"onnx against torch: first tap .* is decoder/decoder\.layers\.1 at batch2"
    ):
        report.require()
    assert report.to_json()["first_failure"] == "decoder/decoder.layers.1"


def test_padding_is_left_out_of_hidden_states_and_keys(call):
    hidden, keys = call.outputs["decoder.layers.0"].copy(), call.outputs["present.0.key"].copy()
    hidden[1, 0] = np.nan  # position 2 of 5: padding of row 1
    keys[0, 1] = 99
    report = compare_calls("a", [call], "b", [changed(call, **{"decoder.layers.0": hidden, "present.0.key": keys})])
    assert all(tap.max_abs == 0 for tap in report.taps)
    hidden[1, 1] = 99  # position 3 is a token
    report = compare_calls("a", [call], "b", [changed(call, **{"decoder.layers.0": hidden})])
    assert report.first_failure.tap == "decoder.layers.0"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails(call, bad):
    logits = call.outputs["logits"].copy()
    logits[0, 0] = bad
    good = compare_calls("a", [call, call], "b", [call, changed(call, logits=logits)])
    assert good.first_failure.tap == "logits"
    assert compare_calls("a", [call, call], "b", [changed(call, logits=logits), call]).first_failure.tap == "logits"


def test_the_worst_call_is_reported_with_the_number_of_calls(call):
    later = dataclasses.replace(call, step="batch2.0.decode1")
    worse = changed(later, logits=call.outputs["logits"] * 1.5)
    tap = next(t for t in compare_calls("a", [call, later, call], "b", [call, worse, call]).taps if t.tap == "logits")
    assert (tap.step, tap.calls) == ("batch2.0.decode1", 3)


def test_without_a_budget_nothing_gates(call):
    report = compare_calls("a", [call], "b", [changed(call, logits=call.outputs["logits"] * 9)], budget=None)
    report.require()
    assert {tap.verdict for tap in report.taps} == {"reported"}
    assert report.worst.tap == "logits"


def test_budgets_by_tap_gate_each_tap_by_its_own(call):
    wrong = changed(call, **{name: call.outputs[name] * 1.01 for name in ("decoder.layers.1", "logits")})
    budgets = {("decoder", "decoder.layers.1"): 0.02, ("decoder", "logits"): 0.005, ("vision", "present.0.key"): 0.0}
    report = compare_calls("a", [call], "b", [wrong], budgets)
    assert {tap.tap: tap.verdict for tap in report.taps} == {
        "decoder.layers.0": "reported",
        "decoder.layers.1": "pass",
        "logits": "fail",
        "present.0.key": "reported",
    }
    assert (report.worst.tap, report.worst.share) == ("logits", pytest.approx(2, rel=1e-3))


def test_half_budgets_are_twice_what_float16_costs_and_leave_padding_out(call):
    whole = dataclasses.replace(call, feeds=call.feeds | {"attention_mask": np.ones((2, 5), np.int64)})
    half = changed(whole, logits=whole.outputs["logits"] * 1.003)
    masked = changed(call, **{name: x * np.nan for name, x in call.outputs.items()})  # what a masked row becomes
    found = half_budgets([whole, call], [half, masked])
    assert found["decoder", "logits"] == pytest.approx(0.006, rel=1e-3)
    assert found["decoder", "present.0.key"] == FLOAT32_BUDGET


def test_other_shapes_and_empty_comparisons_are_refused(call):
    with pytest.raises(NumericGateError, match=r"expected shape \[2, 6\], found \[2, 5\]"):
        compare_calls("a", [call], "b", [changed(call, logits=np.zeros((2, 5), np.float32))])
    with pytest.raises(UsageError, match="nothing was compared"):
        compare_calls("a", [], "b", [])


def test_both_sources_answer_the_same_inputs(call):
    double, triple = (
        Source(name, {"decoder": lambda feeds, factor=factor: {"logits": factor * feeds["inputs_embeds"]}})
        for name, factor in (("double", 2), ("triple", 3))
    )
    report = compare(double, triple, [call])
    assert (report.a, report.b) == ("double", "triple")
    assert report.first_failure.relative == pytest.approx(0.5)


def test_stored_calls_are_read_back_bit_for_bit(call, tmp_path):
    calls = [call, vision_call(None)]
    store_reference(tmp_path, calls, "torch")
    for before, after in zip(calls, load_reference(tmp_path), strict=True):
        assert (before.step, before.graph) == (after.step, after.graph)
        for old, new in ((before.feeds, after.feeds), (before.outputs, after.outputs)):
            assert list(old) == list(new)
            assert all(np.array_equal(old[name], new[name]) for name in old)


def test_half_a_reference_is_refused(call, tmp_path):
    store_reference(tmp_path, [call], "torch")
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(InputDataError, match=r"expected reference\.json and reference\.safetensors"):
        load_reference(tmp_path)
