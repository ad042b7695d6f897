"""The route for ONNX files from elsewhere: what is quantized, what is refused and why, and that the result runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.cli import main
from toolchain.device.generation.ort_graphs import open_session, session_graph
from toolchain.errors import InputDataError, UnsupportedError
from toolchain.graph.dense import decoded_weight
from toolchain.graph.op import vq_op
from toolchain.graph.op.plugin_op import device_graphs
from toolchain.graph.passes.vq_from_dense import find_linears
from toolchain.graph.rewrite import device_form, import_graph, portable_form
from toolchain.graph.third_party import quantize_third_party, second_moments
from toolchain.vq.weights import Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1000)
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def saved(folder: Path, nodes, initializers, width: int = 64, outputs=("y",), opset: int = 18, kind=FLOAT) -> Path:
    """A model of input x [batch, width], written to folder/model.onnx."""
    values = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    inputs = [helper.make_tensor_value_info("x", kind, ["batch", width])]
    results = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "foreign", inputs, results, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def node(op: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=output, **attributes)


@pytest.fixture
def network(tmp_path) -> Path:
    """gate and up read one tensor; down has a bias behind it; the head is a Gemm. Names are the outputs'."""
    nodes = [
        node("MatMul", "x w_gate", "gate"),
        node("MatMul", "x w_up", "up"),
        node("Sigmoid", "gate", "open"),
        node("Mul", "open up", "inner"),
        node("MatMul", "inner w_down", "down"),
        node("Add", "b_down down", "moved"),
        node("Gemm", "moved w_head b_head", "y", transB=1),
    ]
    weights = {
        "w_gate": normal(64, 128) / 8,
        "w_up": normal(64, 128, seed=1) / 8,
        "w_down": normal(128, 192, seed=2) / 9,
    }
    weights |= {"b_down": normal(192, seed=3), "w_head": normal(128, 192, seed=4) / 9, "b_head": normal(128, seed=5)}
    return saved(tmp_path, nodes, weights)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return session_graph(open_session(path))({"x": x})["y"]


def reasons(path: Path) -> dict[str, str]:
    return {refusal.where: refusal.reason for refusal in find_linears(import_graph(path)[0])[1]}


def rewritten(path: Path, folder: Path, **options) -> tuple:
    for name in ("reference", "device", "portable"):
        (folder / name).mkdir()
    report = quantize_third_party(path, folder / "reference" / "model.onnx", options=FAST, **options)
    portable_form(folder / "reference", folder / "portable")
    return report, device_form(folder / "reference", folder / "device")


def test_every_layer_becomes_a_node_and_the_graph_computes_its_decoded_weights(network, tmp_path):
    """The outputs equal the original graph's with each weight replaced by what its codes decode to."""
    report, _ = rewritten(network, tmp_path)
    assert {layer.name for layer in report.layers} == {"gate", "up", "down", "y"}
    assert not report.refused
    model = onnx.load(tmp_path / "reference" / "model.onnx")
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    decoded = {
        each.name: decoded_weight(each, arrays)
        for each in model.graph.node
        if vq_op.is_vq_op(each.op_type, each.domain)
    }
    x = normal(5, 64, seed=9)
    original = {t.name: numpy_helper.to_array(t) for t in onnx.load(network).graph.initializer}
    inner = x @ decoded["up"].T / (1 + np.exp(-(x @ decoded["gate"].T)))
    expected = (inner @ decoded["down"].T + original["b_down"]) @ decoded["y"].T + original["b_head"]
    found = run(tmp_path / "portable" / "model.onnx", x)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    error = np.linalg.norm(decoded["down"].T - original["w_down"]) / np.linalg.norm(original["w_down"])
    assert error == pytest.approx(next(x.relative_error for x in report.layers if x.name == "down"), rel=1e-3)
    assert error < 0.35  # 2 bits of a Gaussian: 0.079 of its variance at best


def test_layers_of_one_input_share_a_table_and_fuse(network, tmp_path):
    _, device = rewritten(network, tmp_path)
    (graph,) = device.graphs
    assert next(each for each in graph.passes if each.name == "fuse_shared_input").done == ("gate+up",)
    x = normal(5, 64, seed=9)
    expected = run(tmp_path / "portable" / "model.onnx", x)
    found = device_graphs(tmp_path / "device", "float32")["model"]({"x": x})["y"]
    assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


def test_a_finer_code_by_pattern_has_a_smaller_error(network, tmp_path):
    report, _ = rewritten(network, tmp_path, codes=[("*", "2,4,8"), ("do*", "2,8,8")])
    found = {layer.name: layer for layer in report.layers}
    assert found["down"].code == "2,8,8"
    assert found["down"].relative_error < 0.5 * found["y"].relative_error


def test_moments_of_inputs_lower_the_error_of_the_outputs(network, tmp_path):
    """Two loud input columns: codes that know of them answer better than codes for white noise."""
    loud = normal(400, 64, seed=6) * np.where(np.arange(64) < 2, 30, 1).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=loud[:200])
    np.savez(tmp_path / "b.npz", x=loud[200:])
    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    knowing = quantize_third_party(network, tmp_path / "knowing.onnx", files, options=FAST)
    quantize_third_party(network, tmp_path / "blind.onnx", options=FAST)
    assert knowing.samples == 2
    fresh = loud[:1] * 0 + normal(100, 64, seed=7) * np.where(np.arange(64) < 2, 30, 1).astype(np.float32)
    expected = run(network, fresh)
    errors = [np.linalg.norm(run(tmp_path / f"{name}.onnx", fresh) - expected) for name in ("knowing", "blind")]
    assert errors[0] < 0.8 * errors[1]
    on_last = run(network, loud[200:])
    measured = np.linalg.norm(run(tmp_path / "knowing.onnx", loud[200:]) - on_last) / np.linalg.norm(on_last)
    assert knowing.output_errors == {"y": pytest.approx(measured, rel=1e-4)}


def test_second_moments_are_those_of_all_runs_together(network):
    runs = [{"x": normal(3, 64, seed=1)}, {"x": normal(5, 64, seed=2)}]
    found = second_moments(network, ["x", "inner"], runs)
    both = np.concatenate([each["x"] for each in runs]).astype(np.float64)
    np.testing.assert_allclose(found["x"], both.T @ both / 8, rtol=1e-12)
    assert found["inner"].shape == (128, 128)


def test_what_cannot_be_quantized_is_refused_with_its_reason(tmp_path):
    nodes = [
        node("MatMul", "x w_tied", "tied"),
        node("Gather", "w_tied index", "looked_up", axis=1),
        node("Transpose", "x", "x_t", perm=[1, 0]),
        node("MatMul", "w_left x_t", "left"),
        node("MatMul", "x x_t", "scores"),
        node("MatMul", "x w_batched", "batched"),
        node("Gemm", "x w_gemm", "scaled", alpha=0.5),
        node("Gemm", "x w_gemm c_full", "full"),
        node("Identity", "tied", "kept"),
        node("Relu", "w_computed", "computed"),
        node("MatMul", "x computed", "moving"),
        node("MatMul", "x w_small", "small"),
    ]
    square = ("w_gemm", "w_computed", "w_tied")
    weights = {name: normal(64, 128) for name in square}
    weights |= {"index": np.array([0], np.int64), "w_left": normal(128, 64), "w_small": normal(64, 8)}
    weights |= {"w_batched": normal(2, 64, 128), "c_full": normal(7, 128)}
    outputs = [each.name for each in nodes if each.name not in ("x_t", "computed", "tied")]
    path = saved(tmp_path, nodes, weights, outputs=outputs)
    found = reasons(path)
    assert "is read by Gather looked_up too" in found["tied"]
    assert "left factor" in found["left"]
    assert "both factors are computed: the right one comes from Transpose" in found["scores"]
    assert "batched, [2, 64, 128]" in found["batched"]
    assert "alpha': 0.5" in found["scaled"]
    assert "C is no constant of 128 values" in found["full"]
    assert "comes from Relu" in found["moving"]
    with pytest.raises(
        UnsupportedError, match=r"no layer can be quantized: .*small: too small: codes, table and scales"
    ):
        quantize_third_party(path, tmp_path / "out.onnx", options=FAST)


def test_a_layer_in_a_branch_is_refused(tmp_path):
    branch = helper.make_graph(
        [node("MatMul", "x w", "inside")], "then", [], [helper.make_tensor_value_info("inside", FLOAT, None)]
    )
    other = helper.make_graph(
        [node("MatMul", "x w", "outside")], "else", [], [helper.make_tensor_value_info("outside", FLOAT, None)]
    )
    choice = helper.make_node("If", ["flag"], ["y"], name="choice", then_branch=branch, else_branch=other)
    path = saved(tmp_path, [choice], {"w": normal(64, 128), "flag": np.array(True)})
    assert reasons(path) == {"inside": "stands in a body of choice", "outside": "stands in a body of choice"}


def test_one_weight_behind_views_and_twice_is_coded_once(tmp_path):
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(128, 64), "value"))
    nodes = [
        constant,
        node("Transpose", "w", "w_t", perm=[1, 0]),
        node("MatMul", "x w_t", "first"),
        node("Sin", "x", "other"),
        node("MatMul", "other w_t", "second"),
        node("Add", "first second", "y"),
    ]
    path = saved(tmp_path, nodes, {})
    report = quantize_third_party(path, tmp_path / "out.onnx", options=FAST)
    assert [layer.name for layer in report.layers] == ["first"]
    ours = [each for each in onnx.load(tmp_path / "out.onnx").graph.node if each.domain == vq_op.DOMAIN]
    assert [each.name for each in ours] == ["first", "second"]
    assert ours[0].input[1:] == ours[1].input[1:]
    assert run(tmp_path / "out.onnx", normal(3, 64)).shape == (3, 128)


@pytest.mark.parametrize("opset", [13, 17, 20, 21])
def test_older_and_newer_opsets_run(tmp_path, opset):
    path = saved(tmp_path, [node("MatMul", "x w", "y")], {"w": normal(64, 128)}, opset=opset)
    quantize_third_party(path, tmp_path / "out.onnx", options=FAST)
    x = normal(3, 64, seed=1)
    error = np.linalg.norm(run(tmp_path / "out.onnx", x) - run(path, x)) / np.linalg.norm(run(path, x))
    assert 0.05 < error < 0.5


def test_float16_layers_keep_their_type_outside(tmp_path):
    path = saved(tmp_path, [node("MatMul", "x w", "y")], {"w": normal(64, 128).astype(np.float16)}, kind=HALF)
    quantize_third_party(path, tmp_path / "out.onnx", options=FAST)
    found = run(tmp_path / "out.onnx", normal(3, 64).astype(np.float16))
    assert found.dtype == np.float16
    assert 0.05 < np.linalg.norm(found - run(path, normal(3, 64).astype(np.float16))) / np.linalg.norm(found) < 0.5


def test_inputs_that_do_not_fit_are_refused(network, tmp_path):
    np.savez(tmp_path / "wrong.npz", z=normal(3, 64))
    with pytest.raises(InputDataError, match=r"expected arrays \['x'\], found \['z'\]"):
        quantize_third_party(network, tmp_path / "out.onnx", [tmp_path / "wrong.npz"], options=FAST)
    (tmp_path / "broken.npz").write_bytes(b"not an archive")
    with pytest.raises(InputDataError, match=r"expected an \.npz of arrays"):
        quantize_third_party(network, tmp_path / "out.onnx", [tmp_path / "broken.npz"], options=FAST)


def test_the_verb_writes_all_forms_and_a_report(network, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["rewrite", "--onnx", str(network), "-o", str(out), "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads((out / "third_party.json").read_text()) == data["third_party"]
    assert {layer["name"] for layer in data["third_party"]["layers"]} == {"gate", "up", "down", "y"}
    assert data["graphs"][0]["vq_nodes"] == 3
    assert run(out / "portable" / "model.onnx", normal(2, 64)).shape == (2, 128)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "one of the two"),
        (["GRAPHS", "--seed", "1"], "--seed: no effect without --onnx"),
        (["--onnx", "FILE", "-m", "MODEL"], "--model: no effect without a folder of graphs"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, capsys, flags, said):
    assert main(["rewrite", *flags, "-o", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
