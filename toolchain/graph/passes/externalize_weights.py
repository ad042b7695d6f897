"""Codes, tables and scales leave the graph: they become inputs, bound from one sidecar that all graphs share.

The builder never sees the weights, so it never copies them, and a tensor that two graphs use (a tied head and
embedding) is stored once. Codes go to device order as INT8: TensorRT's parser refuses or widens a UINT8 initializer.
Tables and scales take their stored dtype back, exactly. Biases and what belongs to other nodes stay in the graph.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from toolchain.errors import MgvqError
from toolchain.graph.op import vq_op
from toolchain.graph.passes import PassResult, Refusal
from toolchain.values import VQCode
from toolchain.vq import format as vq_format


class Sidecar:
    """Named tensors, each content once: the name under which a content came first is its name."""

    def __init__(self) -> None:
        self.tensors: dict[str, NDArray] = {}
        self._names: dict[tuple, str] = {}

    def add(self, name: str, array: NDArray) -> str:
        """The name under which the array is stored.

        Raises:
            MgvqError: `name` already stands for another content.
        """
        array = np.ascontiguousarray(array)
        key = (str(array.dtype), array.shape, hashlib.sha256(array.data).hexdigest())
        if key in self._names:
            return self._names[key]
        if name in self.tensors:
            raise MgvqError(f"sidecar tensor {name}: two graphs give it different contents; export them from one model")
        self.tensors[name] = array
        self._names[key] = name
        return name

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())


def externalize_weights(graph: gs.Graph, sidecar: Sidecar) -> PassResult:
    """Turn inputs 1 to 3 of every node of ours into graph inputs that stand in `sidecar` under their names."""
    inputs: dict[str, gs.Variable] = {}
    done, refused = [], []
    for node in graph.nodes:
        if not vq_op.is_vq_op(node.op, node.domain):
            continue
        code, rows, columns = vq_op.code_from_attributes(node.attrs, node.name)
        reason = _reason_against(node, code, rows, columns)
        if reason:
            refused.append(Refusal(node.name, reason))
            continue
        for place, array in enumerate(_device_arrays(node, code, rows, columns), start=1):
            name = sidecar.add(node.inputs[place].name, array)
            if name not in inputs:
                inputs[name] = gs.Variable(name, dtype=array.dtype, shape=list(array.shape))
            node.inputs[place] = inputs[name]
        done.append(node.name)
    graph.inputs += list(inputs.values())
    graph.cleanup()
    return PassResult("externalize_weights", tuple(done), tuple(refused))


def _reason_against(node: gs.Node, code: VQCode, rows: int, columns: int) -> str | None:
    codes, table, scales = node.inputs[1:4]
    if any(not isinstance(tensor, gs.Constant) for tensor in (codes, table, scales)):
        return "a weight is computed in the graph; expected initializers"
    symbols = (*code.chunk_shape(rows, columns), 16)
    if codes.dtype != np.uint8 or tuple(codes.shape) != symbols:
        return f"expected codes uint8{list(symbols)}, found {codes.dtype}{list(codes.shape)}"
    stored = table.values.astype(code.codebook_dtype)
    if not np.array_equal(stored.astype(np.float32), table.values):
        return f"the table does not fit {code.codebook_dtype} exactly; it is not a table of code {code}"
    if not np.array_equal(scales.values.astype(np.float16).astype(np.float32), scales.values):
        return "scales do not fit float16 exactly"
    return None


def _device_arrays(node: gs.Node, code: VQCode, rows: int, columns: int) -> tuple[NDArray, NDArray, NDArray]:
    codes, table, scales = (tensor.values for tensor in node.inputs[1:4])
    packed = vq_format.pack(codes, code)
    device = vq_format.device_from_checkpoint(packed, code, rows, columns).view(np.int8)
    return device, table.astype(code.codebook_dtype), scales.astype(np.float16)
