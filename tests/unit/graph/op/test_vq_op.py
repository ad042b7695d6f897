"""One op, five implementations, the same numbers: NumPy's decoder, torch module, torch op, function body, plugin op."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from vq_samples import random_weights

from toolchain.errors import ShapeError, UnsupportedError
from toolchain.graph.op import torch_op, vq_op
from toolchain.graph.op.bodies import function_bodies
from toolchain.graph.op.plugin_op import EXACT_OPS, PLUGIN_OPS, decode_device
from toolchain.values import VQCode
from toolchain.vq import format as vq_format

CODES = ("4,8,8", "2,6,6", "2,8,8", "2,4,8", "2,3,8", "4,8,9")
SHAPES = ((256, 64), (130, 44))  # whole chunks; rows and columns that are padded
# Sums of up to 64 products in float32: 64 roundings of 6e-8 at worst, about 8 in the mean.
SUM_BUDGET = 2e-6


@pytest.fixture(params=CODES)
def code(request) -> VQCode:
    return VQCode.parse(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> tuple[int, int]:
    return request.param


def reference_node(op: str, code: VQCode, shape, rng, has_bias=False):
    """(model of one reference node, weight float32, bias or None)."""
    rows, columns = shape
    symbols, table, scales = random_weights(code, rows, columns, rng)
    weight = vq_format.decode(vq_format.pack(symbols, code), table, scales, code, rows, columns)
    bias = rng.standard_normal(rows).astype(np.float32) if has_bias else None
    arrays = {"codes": symbols, "table": table.astype(np.float32), "scales": scales.astype(np.float32)}
    arrays |= {} if bias is None else {"bias": bias}
    name = vq_op.body_name(op, code, has_bias=has_bias)
    attributes = vq_op.code_attributes(code, rows, columns)
    node = helper.make_node(name, ["x", *arrays], ["y"], "layer", domain=vq_op.DOMAIN, **attributes)
    return one_node_model(node, op, shape, arrays, function_bodies([(op, code, has_bias)])), weight, bias


def one_node_model(node, op, shape, arrays, functions=()):
    rows, columns = shape
    if op == vq_op.LINEAR:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", columns])
    else:
        x = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", "sequence"])
    width = rows if op == vq_op.LINEAR else columns
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", width])
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "one", [x], [y], initializers)
    opsets = [helper.make_opsetid("", vq_op.ONNX_OPSET), helper.make_opsetid(vq_op.DOMAIN, vq_op.OPSET_VERSION)]
    model = helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)
    vq_op.register_schemas()
    onnx.checker.check_model(model)
    return model


def activation(op: str, shape, rng):
    rows, columns = shape
    if op == vq_op.LINEAR:
        return rng.standard_normal((2, 5, columns)).astype(np.float32)
    return np.concatenate([rng.integers(0, rows, (2, 6)), [[0], [rows - 1]]], axis=1)


def expected_output(op, x, weight, bias):
    return x @ weight.T + (0 if bias is None else bias) if op == vq_op.LINEAR else weight[x]


def session(model, **options) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def check(op, found, expected):
    if op == vq_op.EMBEDDING:
        np.testing.assert_array_equal(found, expected)
    else:
        assert np.linalg.norm(found - expected) <= SUM_BUDGET * np.linalg.norm(expected)


@pytest.mark.parametrize(("op", "has_bias"), [("VQLinear", False), ("VQLinear", True), ("VQEmbedding", False)])
def test_function_body_computes_what_the_decoder_defines(op, has_bias, code, shape):
    rng = np.random.default_rng(1)
    model, weight, bias = reference_node(op, code, shape, rng, has_bias)
    x = activation(op, shape, rng)
    check(op, session(model).run(None, {"x": x})[0], expected_output(op, x, weight, bias))


@pytest.mark.parametrize("op", ["VQLinear", "VQEmbedding"])
def test_torch_op_computes_what_the_decoder_defines(op, code, shape):
    rng = np.random.default_rng(2)
    rows, columns = shape
    symbols, table, scales = random_weights(code, rows, columns, rng)
    weight = vq_format.decode(vq_format.pack(symbols, code), table, scales, code, rows, columns)
    x = activation(op, shape, rng)
    tensors = [torch.from_numpy(a) for a in (x, symbols, table.astype(np.float32), scales.astype(np.float32))]
    sizes = (rows, columns, code.vector, code.shift, code.window)
    if op == "VQLinear":
        found = torch_op.vq_linear(*tensors, None, *sizes)
    else:
        found = torch_op.vq_embedding(*tensors, *sizes)
    check(op, found.numpy(), expected_output(op, x, weight, None))


@pytest.mark.parametrize(("op", "has_bias"), [("VQLinear", False), ("VQLinear", True), ("VQEmbedding", False)])
def test_plugin_op_on_device_bytes_computes_what_the_decoder_defines(op, has_bias, code, shape):
    rng = np.random.default_rng(4)
    rows, columns = shape
    symbols, table, scales = random_weights(code, rows, columns, rng)
    packed = vq_format.pack(symbols, code)
    weight = vq_format.decode(packed, table, scales, code, rows, columns)
    device = vq_format.device_from_checkpoint(packed, code, rows, columns).view(np.int8)
    bias = rng.standard_normal(rows).astype(np.float32) if has_bias else None
    arrays = {"codes": device, "table": table, "scales": scales} | ({} if bias is None else {"bias": bias})
    attributes = vq_op.code_attributes(code, rows, columns) | {"plugin_version": "1", "plugin_namespace": ""}
    node = helper.make_node(op, ["x", *arrays], ["y"], "layer", domain=vq_op.DOMAIN, **attributes)
    x, model = activation(op, shape, rng), one_node_model(node, op, shape, arrays)
    for ops, rounded in ((PLUGIN_OPS, np.float16), (EXACT_OPS, np.float32)):
        found = ReferenceEvaluator(model, new_ops=ops).run(None, {"x": x})[0]
        seen = x if op == vq_op.EMBEDDING else x.astype(rounded).astype(np.float32)
        check(op, found, expected_output(op, seen, weight, bias))


@pytest.mark.parametrize("span", ["4,8,8", "2,4,8"])
def test_onnxruntime_keeps_weights_as_codes(span, tmp_path):
    code, shape = VQCode.parse(span), (512, 256)
    model, _, _ = reference_node("VQLinear", code, shape, np.random.default_rng(0))
    saved = tmp_path / "optimized.onnx"
    session(model, optimized_model_filepath=str(saved))
    largest = max(len(tensor.raw_data) for tensor in onnx.load(saved).graph.initializer)
    symbols = shape[0] * shape[1] // code.vector
    assert largest <= max(symbols, 4 * code.entries * code.vector)


def test_a_body_serves_every_node_of_its_kind():
    kinds = [("VQLinear", VQCode(4, 8, 8), False), ("VQLinear", VQCode(2, 6, 6), False)]
    assert [body.name for body in function_bodies(kinds)] == ["VQLinear"]
    kinds += [("VQLinear", VQCode(2, 4, 8), True), ("VQEmbedding", VQCode(2, 3, 8), False)]
    assert [body.name for body in function_bodies(kinds)] == ["VQEmbeddingSpan3", "VQLinear", "VQLinearBiasSpan2"]


def test_bodies_use_no_operator_that_tensorrt_refuses():
    kinds = [(op, VQCode.parse(code), False) for op in vq_op.CONTRACTS for code in CODES]
    used = {node.op_type for body in function_bodies(kinds) for node in body.node}
    assert not used & {"BitShift", "BitwiseAnd", "BitwiseOr", "NonZero"}


def test_checker_holds_nodes_to_the_contract():
    rng = np.random.default_rng(0)
    code = VQCode(4, 8, 8)
    _, table, scales = random_weights(code, 128, 16, rng)
    arrays = {"codes": np.zeros(code.codes_bytes(128, 16), np.int8), "table": table, "scales": scales}
    attributes = vq_op.code_attributes(code, 128, 16)
    node = helper.make_node("VQLinear", ["x", *arrays], ["y"], "layer", domain=vq_op.DOMAIN, **attributes)
    one_node_model(node, "VQLinear", (128, 16), arrays)
    del attributes["window"]
    node = helper.make_node("VQLinear", ["x", *arrays], ["y"], "layer", domain=vq_op.DOMAIN, **attributes)
    with pytest.raises(onnx.checker.ValidationError, match="window"):
        one_node_model(node, "VQLinear", (128, 16), arrays)


@pytest.mark.parametrize("allowed", [None, 0, 1])
def test_leave_to_round_to_int8_may_be_absent_and_is_linears_alone(allowed):
    rng = np.random.default_rng(0)
    code = VQCode(4, 8, 8)
    _, table, scales = random_weights(code, 128, 16, rng)
    arrays = {"codes": np.zeros(code.codes_bytes(128, 16), np.int8), "table": table, "scales": scales}
    attributes = vq_op.code_attributes(code, 128, 16) | ({} if allowed is None else {"allow_int8": allowed})
    assert vq_op.code_from_attributes(attributes, "a.b") == (code, 128, 16)
    node = helper.make_node("VQLinear", ["x", *arrays], ["y"], "layer", domain=vq_op.DOMAIN, **attributes)
    model = one_node_model(node, "VQLinear", (128, 16), arrays)
    x = rng.standard_normal((1, 2, 16)).astype(np.float32)
    # A permission: what the op is stays the same, whatever an engine may round.
    assert ReferenceEvaluator(model, new_ops=PLUGIN_OPS).run(None, {"x": x})[0].shape == (1, 2, 128)
    assert vq_op.ALLOW_INT8 not in vq_op.VQ_EMBEDDING.attributes
    assert onnx.defs.get_schema("VQLinear", 1, vq_op.DOMAIN).attributes["allow_int8"].default_value.i == 0


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("window", 10), ("format_version", 2), ("allow_int8", 2)])
def test_attributes_out_of_range_are_refused_by_name(name, value):
    attributes = vq_op.code_attributes(VQCode(4, 8, 8), 128, 16) | {name: value}
    with pytest.raises(ShapeError, match=f"node a.b: attribute {name}"):
        vq_op.code_from_attributes(attributes, "a.b")


def test_a_vector_of_three_is_refused():
    with pytest.raises(UnsupportedError, match="V in"):
        vq_op.code_from_attributes(vq_op.code_attributes(VQCode(4, 8, 8), 128, 16) | {"vector": 3}, "a.b")


def test_plugin_op_refuses_codes_of_another_size():
    code = VQCode(4, 8, 8)
    _, table, scales = random_weights(code, 128, 16, np.random.default_rng(0))
    with pytest.raises(ShapeError, match=r"expected codes int8\[512\] in device order, found int8\[500\]"):
        decode_device(np.zeros(500, np.int8), table, scales, vq_op.code_attributes(code, 128, 16), "a.b")


def test_contract_header_is_what_the_generator_writes():
    header = Path(__file__).parents[4] / "plugins" / "vq_linear" / "contract.h"
    assert header.read_text(encoding="utf-8") == vq_op.contract_header()


def test_contract_header_has_every_input_and_attribute():
    text = vq_op.contract_header()
    for contract in vq_op.CONTRACTS.values():
        assert f'"{contract.name}"' in text
        assert all(port.name.capitalize() in text for port in contract.inputs)
    assert all(f'"{attribute.name}"' in text for attribute in vq_op.VQ_LINEAR.attributes)
    assert f"kRequiredAttributes = {len(vq_op.VQ_EMBEDDING.attributes)};" in text
