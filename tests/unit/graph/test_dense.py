"""Dense twins of VQ graphs compute the same, in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import InputDataError
from toolchain.graph.dense import dense_graph
from toolchain.graph.op import vq_op
from toolchain.graph.op.bodies import function_bodies
from toolchain.values import VQCode

ROWS, COLUMNS = 200, 50  # neither fills its padding


def vq_model(code: VQCode, *, bias: bool = True, free: bool = True) -> onnx.ModelProto:
    """ids → VQEmbedding → VQLinear(Bias) back to [.., ROWS], one set of codes for both as in a tied head."""
    rng = np.random.default_rng(0)
    entries = rng.integers(-100, 100, (code.entries, code.vector)).astype(np.float32)
    weights = {
        "w.codes": rng.integers(0, 1 << code.shift, (*code.chunk_shape(ROWS, COLUMNS), 16)).astype(np.uint8),
        "t0": entries / np.float32(128),
        "w.scales": rng.random(ROWS).astype(np.float16).astype(np.float32),
        "w.bias": rng.standard_normal(ROWS).astype(np.float32),
    }
    attributes = vq_op.code_attributes(code, ROWS, COLUMNS)
    shared = ["w.codes", "t0", "w.scales"]
    linear, embedding = vq_op.body_name(vq_op.LINEAR, code, has_bias=bias), vq_op.body_name(vq_op.EMBEDDING, code)
    nodes = [
        helper.make_node(embedding, ["ids", *shared], ["h"], domain=vq_op.DOMAIN, name="embed", **attributes),
        helper.make_node(
            linear, ["h", *shared, *(["w.bias"] if bias else [])], ["y"], domain=vq_op.DOMAIN, name="head", **attributes
        ),
    ]
    length = "s" if free else 3
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [length])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [length, ROWS])],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if bias or name != "w.bias"],
    )
    functions = function_bodies([(vq_op.LINEAR, code, bias), (vq_op.EMBEDDING, code, False)])
    opsets = [helper.make_opsetid("", vq_op.ONNX_OPSET), helper.make_opsetid(vq_op.DOMAIN, vq_op.OPSET_VERSION)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def run(path, ids):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]


@pytest.mark.parametrize("code", ["4,8,8", "2,6,6", "2,4,8"])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_twin_computes_the_same(tmp_path, code, bias):
    onnx.save(vq_model(VQCode.parse(code), bias=bias), tmp_path / "vq.onnx")
    ids = np.array([0, 1, 7, 8, 127, 128, ROWS - 1])
    expected = run(tmp_path / "vq.onnx", ids)
    exact = dense_graph(tmp_path / "vq.onnx", tmp_path / "exact.onnx", "float32")
    half = dense_graph(tmp_path / "vq.onnx", tmp_path / "half.onnx")
    scale = np.abs(expected).max()
    assert np.abs(run(exact, ids) - expected).max() <= 1e-5 * scale
    assert np.abs(run(half, ids) - expected).max() <= 5e-3 * scale
    model = onnx.load(half)
    assert not model.functions
    assert [x.domain for x in model.opset_import] == [""]
    sizes = {x.name: (x.data_type, tuple(x.dims)) for x in model.graph.initializer}
    assert sizes["head.dense"] == (TensorProto.FLOAT16, (COLUMNS, ROWS))
    assert sizes["embed.dense"] == (TensorProto.FLOAT16, (ROWS, COLUMNS))
    assert not {"w.codes", "t0", "w.scales"} & set(sizes)


def test_written_twice_is_the_same(tmp_path):
    onnx.save(vq_model(VQCode(4, 8, 8)), tmp_path / "vq.onnx")
    dense_graph(tmp_path / "vq.onnx", tmp_path / "d.onnx")
    size = (tmp_path / "d.onnx.data").stat().st_size
    dense_graph(tmp_path / "vq.onnx", tmp_path / "d.onnx")
    assert (tmp_path / "d.onnx.data").stat().st_size == size  # external data is not appended to


def test_codes_that_are_no_initializer_are_named(tmp_path):
    model = vq_model(VQCode(4, 8, 8))
    model.graph.initializer.remove(next(x for x in model.graph.initializer if x.name == "w.codes"))
    onnx.save(model, tmp_path / "vq.onnx")
    with pytest.raises(InputDataError, match=r"node embed: expected initializers \['w.codes'\]"):
        dense_graph(tmp_path / "vq.onnx", tmp_path / "d.onnx")
