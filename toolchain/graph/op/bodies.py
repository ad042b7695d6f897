"""Function bodies of the reference form, in standard operators of opset 18, so that stock runtimes run the graph.

What shapes them:

* The weights must stay codes in memory. onnxruntime folds every node whose inputs are all constant, which would expand
  the weights to float32 when the session is made; so the codes pass through a Reshape whose target holds an empty slice
  of the activation. It costs nothing and makes nothing constant.
* TensorRT for RTX compiles them: codes are uint8 and go straight into a Cast; there is no BitShift, BitwiseAnd or
  NonZero. Windows of overlapping codes are integer Mul, Add and Div.
* Padded columns meet zeros of a padded x, padded rows are cut while they are still codes, and the row scale multiplies
  the output: nothing the size of the weight is copied but the weight itself.
* Sizes come from the node's attributes by reference, so that one body serves every node of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from toolchain.graph.op import vq_op
from toolchain.values import CHUNK_ROWS, COLUMN_GROUP, ROW_GROUP, ROW_STRIDE, VQCode

_POWERS = "powers_of_two"


class _Body:
    """Nodes in order; `add` names the result after its role."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def add(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def integers(self, name: str, values: list[int]) -> str:
        """A constant int64[len(values)]."""
        return self.add("Constant", [], name, value_ints=values)

    def attribute(self, name: str) -> str:
        """int64[1] of a node attribute; made once, however often it is asked for."""
        if any(f"{name}_1d" in node.output for node in self.nodes):
            return f"{name}_1d"
        node = helper.make_node("Constant", [], [f"{name}_0d"], name=f"{name}_0d")
        node.attribute.append(AttributeProto(name="value_int", ref_attr_name=name, type=AttributeProto.INT))
        self.nodes.append(node)
        return self.add("Reshape", [f"{name}_0d", self.integers(f"{name}_shape", [1])], f"{name}_1d")


def function_bodies(kinds: Iterable[tuple[str, VQCode, bool]]) -> list[FunctionProto]:
    """One body for each distinct `vq_op.body_name` of (op, code, has_bias), sorted by name."""
    wanted = {
        vq_op.body_name(op, code, has_bias=bias): (op, vq_op.symbols_per_window(code), bias) for op, code, bias in kinds
    }
    return [
        linear_body(name, span, has_bias=bias) if op == vq_op.LINEAR else embedding_body(name, span)
        for name, (op, span, bias) in sorted(wanted.items())
    ]


def linear_body(name: str, span: int, *, has_bias: bool) -> FunctionProto:
    """y = pad(x) Tᵀ · scales (+ bias), T the decoded weight before its row scale, float32[rows, padded columns]."""
    body = _Body()
    inputs = ["x", "codes", "table", "scales", *(["bias"] if has_bias else [])]
    zero = body.integers("zero", [0])
    body.add("Reshape", ["x", body.integers("flat", [-1])], "x_flat")
    body.add("Slice", ["x_flat", zero, zero], "x_nothing")
    body.add("Cast", ["x_nothing"], "no_sizes", to=TensorProto.INT64)
    body.add("Concat", ["no_sizes", body.integers("same", [0, 0, 0, 0])], "codes_shape", axis=0)
    body.add("Reshape", ["codes", "codes_shape"], "codes_now")
    body.add("Cast", ["codes_now"], "symbols", to=TensorProto.INT32)
    body.add("Transpose", ["symbols"], "symbols_by_row", perm=[0, 3, 1, 2])  # [R, 16, 8, C]: rows in order
    windows = _windows(body, "symbols_by_row", span, axis=1)
    body.add("Flatten", [windows], "windows_padded", axis=3)  # [padded rows, C]
    body.add("Slice", ["windows_padded", zero, body.attribute("rows"), zero], "windows_of_rows")
    body.add("Gather", ["table", "windows_of_rows"], "entries", axis=0)
    body.add("Flatten", ["entries"], "weight", axis=1)
    body.add("Transpose", ["weight"], "weight_t", perm=[1, 0])
    body.add("MatMul", [_padded_input(body, zero), "weight_t"], "product")
    body.add("Mul", ["product", "scales"], "scaled" if has_bias else "y")
    if has_bias:
        body.add("Add", ["scaled", "bias"], "y")
    return _function(name, inputs, body)


def embedding_body(name: str, span: int) -> FunctionProto:
    """y = T[ids] · scales[ids]. Row r stands in chunk (r div 128, r mod 8), window (r div 8) mod 16."""
    body = _Body()
    zero = body.integers("zero", [0])
    stride, group = body.integers("stride", [ROW_STRIDE]), body.integers("group", [ROW_GROUP])
    body.add("Shape", ["codes"], "codes_shape")
    body.add("Slice", ["codes_shape", body.integers("two", [2]), body.integers("four", [4])], "chunk_shape")
    body.add("Concat", [body.integers("any", [-1]), "chunk_shape"], "by_chunk_shape", axis=0)
    body.add("Reshape", ["codes", "by_chunk_shape"], "codes_by_chunk")  # [8 R, C, 16]
    body.add("Div", ["ids", group], "row_group")
    body.add("Mul", ["row_group", group], "group_start")
    body.add("Sub", ["ids", "group_start"], "row_in_group")
    body.add("Div", ["row_in_group", stride], "place")  # the window, 0…15
    body.add("Mul", ["place", stride], "place_start")
    body.add("Sub", ["row_in_group", "place_start"], "chunk_in_group")
    body.add("Mul", ["row_group", stride], "chunk_start")
    body.add("Add", ["chunk_start", "chunk_in_group"], "chunk")
    body.add("Gather", ["codes_by_chunk", "chunk"], "codes_now", axis=0)  # [..., C, 16]
    body.add("Cast", ["codes_now"], "symbols", to=TensorProto.INT32)
    windows = _windows(body, "symbols", span, axis=-1)
    body.add("Unsqueeze", ["place", body.integers("last_two", [-2, -1])], "place_column")
    body.add("Equal", ["place_column", body.integers("places", list(range(CHUNK_ROWS)))], "is_place")  # [..., 1, 16]
    body.add("Cast", ["is_place"], "at_place", to=TensorProto.INT32)
    body.add("Mul", [windows, "at_place"], "window_or_zero")
    last = body.integers("last", [-1])
    body.add("ReduceSum", ["window_or_zero", last], "window", keepdims=0)  # [..., C]
    body.add("Gather", ["table", "window"], "entries", axis=0)
    body.add("Shape", ["ids"], "ids_shape")
    body.add("Concat", ["ids_shape", _padded_columns(body)], "rows_shape", axis=0)
    body.add("Reshape", ["entries", "rows_shape"], "rows_padded")
    body.add("Slice", ["rows_padded", zero, body.attribute("columns"), last], "unit_rows")
    body.add("Gather", ["scales", "ids"], "row_scales", axis=0)
    body.add("Unsqueeze", ["row_scales", last], "row_scales_column")
    body.add("Mul", ["unit_rows", "row_scales_column"], "y")
    return _function(name, ["ids", "codes", "table", "scales"], body)


def _windows(body: _Body, symbols: str, span: int, axis: int) -> str:
    """int32 windows from int32 symbols whose place in the chunk runs along `axis`, by Horner's rule."""
    if span == 1:
        return symbols
    powers = [1 << n for n in range(31)]
    body.add("Constant", [], _POWERS, value=helper.make_tensor("", TensorProto.INT32, [len(powers)], powers))
    shift, window = body.attribute("shift"), body.attribute("window")
    body.add("Gather", [_POWERS, shift], "radix", axis=0)
    body.add("Mul", [shift, body.integers("span", [span])], "bits_read")
    body.add("Sub", ["bits_read", window], "bits_over")
    body.add("Gather", [_POWERS, "bits_over"], "remainder", axis=0)
    at, first = body.integers("window_axis", [axis]), body.integers("from_start", [0])
    stream, end = symbols, body.integers("to_end", [CHUNK_ROWS])
    for step in range(1, span):
        cut = body.integers(f"cut_{step}", [step])
        body.add("Slice", [symbols, cut, end, at], f"after_{step}")
        body.add("Slice", [symbols, first, cut, at], f"wrapped_{step}")
        body.add("Concat", [f"after_{step}", f"wrapped_{step}"], f"next_{step}", axis=axis)
        body.add("Mul", [stream, "radix"], f"raised_{step}")
        stream = body.add("Add", [f"raised_{step}", f"next_{step}"], f"stream_{step}")
    return body.add("Div", [stream, "remainder"], "windows")


def _padded_columns(body: _Body) -> str:
    """int64[1]: columns up to a multiple of 16."""
    group = body.integers("column_group", [COLUMN_GROUP])
    body.add("Add", [body.attribute("columns"), body.integers("round_up", [COLUMN_GROUP - 1])], "columns_over")
    body.add("Div", ["columns_over", group], "column_groups")
    return body.add("Mul", ["column_groups", group], "columns_padded")


def _padded_input(body: _Body, zero: str) -> str:
    """x with zeros after its last column, up to a multiple of 16 columns."""
    body.add("Sub", [_padded_columns(body), "columns_1d"], "columns_added")
    body.add("Concat", [zero, "columns_added"], "pads", axis=0)
    return body.add("Pad", ["x", "pads", "", body.integers("last", [-1])], "x_padded")


def _function(name: str, inputs: list[str], body: _Body) -> FunctionProto:
    names = [attribute.name for attribute in vq_op.ATTRIBUTES]
    opset = [helper.make_opsetid("", vq_op.ONNX_OPSET)]
    return helper.make_function(vq_op.DOMAIN, name, inputs, ["y"], body.nodes, opset, attributes=names)
