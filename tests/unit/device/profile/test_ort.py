"""onnxruntime's profiling events as layers of calls, and functions that can be told apart."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from toolchain.bench.profile_onnx import named_calls
from toolchain.device.profile.ort import OrtBackend, layers_from_events, node_name
from toolchain.errors import EnvironmentMismatch, InputDataError


def run_event(ts: int, dur: int) -> dict:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def node(name: str, ts: int, dur: int) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}


EVENTS = [
    {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 50},
    node("warming/Up_0", 60, 5),  # before any call
    run_event(100, 50),
    node("a.b/Add_0", 110, 10),
    node("_inlfunc_VQLinear_call4_weight", 120, 20),
    {"cat": "Session", "name": "SequentialExecutor::Execute", "ts": 105, "dur": 40},
    node("a.b/If_0", 200, 30),
    node("a.b/Inside_0", 205, 10),  # of the If's body: its time is in the If's
    run_event(190, 60),
]


def test_layers_belong_to_the_call_they_ran_in():
    found = layers_from_events(EVENTS, 2, {"VQLinear_call4": "a.q_proj"})
    assert [[(layer.name, layer.ms) for layer in call] for call in found] == [
        [("a.b/Add_0", 0.01), ("a.q_proj", 0.02)],
        [("a.b/If_0", 0.03)],
    ]


def test_order_of_events_does_not_matter():
    names = {"VQLinear_call4": "a.q_proj"}
    assert layers_from_events(EVENTS[::-1], 2, names) == layers_from_events(EVENTS, 2, names)


def test_a_cut_profile_is_refused():
    with pytest.raises(EnvironmentMismatch, match=r"2 calls, expected 3.*fewer --repeats"):
        layers_from_events(EVENTS, 3, {})


def test_node_names():
    names = {"VQLinear_call1": "a.q", "VQLinear_call12": "a.k"}
    assert node_name("_inlfunc_VQLinear_call1_weight", names) == "a.q"
    assert node_name("_inlfunc_VQLinear_call12_y/Fusion/", names) == "a.k"
    assert node_name("_inlfunc_VQLinear_token_3_y", names) == "_inlfunc_VQLinear_token_3_y"
    assert node_name("a.b/Add_0", names) == "a.b/Add_0"


@pytest.fixture
def twice(tmp_path):
    """A graph that calls one function twice, and adds: (x + 1) * 2, then again."""
    function = helper.make_function(
        "mgvq", "Body", ["x"], ["y"],
        [
            helper.make_node("Constant", [], ["one"], name="one", value_float=1.0),
            helper.make_node("Add", ["x", "one"], ["raised"], name="raised"),
            helper.make_node("Add", ["raised", "raised"], ["y"], name="y"),
        ],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Body", ["x"], ["h"], name="model.layers.0.q_proj", domain="mgvq"),
        helper.make_node("Sigmoid", ["h"], ["s"], name="model.layers.0/Sigmoid_0"),
        helper.make_node("Body", ["s"], ["z"], name="model.layers.0.k_proj", domain="mgvq"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mgvq", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8)
    path = tmp_path / "decoder.onnx"
    onnx.save(model, path)
    return path


def test_named_calls_computes_the_same_and_names_every_piece(twice, tmp_path):
    named = named_calls(twice)
    assert sorted(named.calls.values()) == ["model.layers.0.k_proj", "model.layers.0.q_proj"]
    onnx.checker.check_model(onnx.load_from_string(named.model))
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(named.model, options, providers=["CPUExecutionProvider"])
    plain = onnxruntime.InferenceSession(twice, providers=["CPUExecutionProvider"])
    x = np.arange(4, dtype=np.float32)
    for _ in range(3):
        assert np.array_equal(session.run(None, {"x": x})[0], plain.run(None, {"x": x})[0])
    with open(session.end_profiling(), encoding="utf-8") as file:
        layers = layers_from_events(json.load(file), 3, named.calls)
    for call in layers:
        assert {layer.name for layer in call} == {
            "model.layers.0.q_proj", "model.layers.0/Sigmoid_0", "model.layers.0.k_proj"
        }  # fmt: skip


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "decoder.onnx").write_bytes(b"\xff\xfe nothing")
    with pytest.raises(InputDataError, match="cannot be read"):
        named_calls(tmp_path / "decoder.onnx")


@pytest.mark.parametrize(("provider", "uses"), [("cpu", False), ("cuda", True)])
def test_a_gpus_clocks_are_of_interest_where_it_computes(tmp_path, provider, uses):
    assert OrtBackend(tmp_path, None, provider, None).uses_gpu is uses
