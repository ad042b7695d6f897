"""The contract of `mgvq::VQLinear` and `mgvq::VQEmbedding`, written once: names, inputs, attributes, shapes, version.

Everything that has to agree with it is made from it: the ONNX schema, the torch op's translation, the function bodies
(bodies.py), the CPU implementation of the plugin (plugin_op.py) and the header that the plugin compiles against
(plugins/vq_linear/contract.h, regenerated with `python -m toolchain.graph.op.vq_op > plugins/vq_linear/contract.h`).

A node takes one of two forms.

    reference form   codes uint8[R, 8, C, 16], one symbol a byte; table and scales float32, exact copies of the stored
                     values. The op_type names the function body that stock onnxruntime runs, `body_name`.
    device form      codes int8[bytes] in device order; table int8 or float16, scales float16, as stored. The op_type is
                     the plugin's name, and the attributes plugin_version and plugin_namespace are there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import onnx

from toolchain.errors import ShapeError
from toolchain.values import CHUNK_ROWS, COLUMN_GROUP, FORMAT_VERSION, ROW_GROUP, ROW_STRIDE, VQCode

DOMAIN = "mgvq"
OPSET_VERSION = 1
ONNX_OPSET = 18
LINEAR = "VQLinear"
EMBEDDING = "VQEmbedding"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""


@dataclass(frozen=True)
class Port:
    """An input or output: `shape` as text; the ONNX types of the reference form and of the device form."""

    name: str
    shape: str
    reference: tuple[str, ...]
    device: tuple[str, ...]
    optional: bool = False

    @property
    def types(self) -> list[str]:
        return sorted({f"tensor({name})" for name in self.reference + self.device})


@dataclass(frozen=True)
class Attribute:
    """An integer attribute and its range, both ends included; one with a default may be absent."""

    name: str
    lowest: int
    highest: int
    meaning: str
    default: int | None = None


@dataclass(frozen=True)
class OpContract:
    name: str
    inputs: tuple[Port, ...]
    output: Port
    attributes: tuple[Attribute, ...]
    meaning: str


FLOATING = ("float", "float16")
WEIGHT_PORTS = (
    Port("codes", "[bytes] in device order ([R, 8, C, 16] in the reference form)", ("uint8",), ("int8",)),
    Port("table", "[2^window, vector]", ("float",), ("int8", "float16")),
    Port("scales", "[rows]", ("float",), ("float16",)),
)
INT32_MAX = 2**31 - 1
ATTRIBUTES = (
    Attribute("rows", 1, INT32_MAX, "outputs of the weight before padding to 128"),
    Attribute("columns", 1, INT32_MAX, "inputs of the weight before padding to 16"),
    Attribute("vector", 2, 4, "V: weights a lookup, 2 (float16 table) or 4 (int8 table)"),
    Attribute("shift", 1, 8, "k: stream bits a lookup"),
    Attribute("window", 1, 9, "L: window bits, at least shift"),
    Attribute("format_version", FORMAT_VERSION, FORMAT_VERSION, "version of the weight format"),
)
# A permission, not an order: an engine may then pick kernels that round x to int8, which changes results.
ALLOW_INT8 = Attribute("allow_int8", 0, 1, "tactics may round x to int8 (vector = 4 has them)", 0)
VQ_LINEAR = OpContract(
    LINEAR,
    (
        Port("x", "[..., columns]", ("float",), FLOATING),
        *WEIGHT_PORTS,
        Port("bias", "[rows]", ("float",), FLOATING, optional=True),
    ),
    Port("y", "[..., rows]", ("float",), FLOATING),
    (*ATTRIBUTES, ALLOW_INT8),
    "y = x Wᵀ + bias, W[i, block] = scales[i] · table[window] (toolchain/vq/format.py); the plugin rounds x to float16",
)
VQ_EMBEDDING = OpContract(
    EMBEDDING,
    (Port("ids", "[...], 0 <= id < rows", ("int64",), ("int64", "int32")), *WEIGHT_PORTS),
    Port("y", "[..., columns]", ("float",), FLOATING),
    ATTRIBUTES,
    "y[..., :] = W[ids[...], :] with the W of VQLinear; only the rows asked for are decoded",
)
CONTRACTS = {LINEAR: VQ_LINEAR, EMBEDDING: VQ_EMBEDDING}


def code_attributes(code: VQCode, rows: int, columns: int) -> dict[str, int]:
    """The required attributes of a node, in the contract's order."""
    values = (rows, columns, code.vector, code.shift, code.window, FORMAT_VERSION)
    return {attribute.name: value for attribute, value in zip(ATTRIBUTES, values)}


def code_from_attributes(attributes: dict[str, int], where: str) -> tuple[VQCode, int, int]:
    """(code, rows, columns) of a node named `where`.

    Raises:
        ShapeError: an attribute is missing or out of its range.
        UnsupportedError: the three numbers are not a legal code.
    """
    for attribute in VQ_LINEAR.attributes:
        value = attributes.get(attribute.name, attribute.default)
        if value is None or not attribute.lowest <= int(value) <= attribute.highest:
            raise ShapeError(
                f"node {where}: attribute {attribute.name} ({attribute.meaning}) must be in "
                f"{attribute.lowest}..{attribute.highest}, found {value}"
            )
    code = VQCode(int(attributes["vector"]), int(attributes["shift"]), int(attributes["window"]))
    return code, int(attributes["rows"]), int(attributes["columns"])


def body_name(op: str, code: VQCode, *, has_bias: bool = False) -> str:
    """The op_type of a reference node, which is the name of its function body.

    VQLinear, VQLinearBias and VQEmbedding for plain codes (L = k); with a suffix SpanN for overlapping codes, whose
    window takes bits of N = ceil(L / k) neighbouring symbols.
    """
    span = symbols_per_window(code)
    return f"{op}{'Bias' if has_bias else ''}{'' if span == 1 else f'Span{span}'}"


def symbols_per_window(code: VQCode) -> int:
    """How many neighbouring symbols a window touches: ceil(L / k), 1 for a plain code."""
    return -(-code.window // code.shift)


def plugin_name(op_type: str) -> str:
    """VQLinear or VQEmbedding, from a reference node's op_type or from the plugin's own name."""
    return EMBEDDING if op_type.startswith(EMBEDDING) else LINEAR


def is_vq_op(op_type: str, domain: str | None) -> bool:
    """Whether a node is one of ours, in either form."""
    return domain == DOMAIN and op_type.startswith((LINEAR, EMBEDDING))


def register_schemas() -> None:
    """Make both ops known to onnx in this process. Repeated calls do nothing.

    torch's exporter looks a custom op up in this registry, and onnx.checker checks device nodes against it.
    """
    for contract in CONTRACTS.values():
        if not onnx.defs.has(contract.name, DOMAIN):
            onnx.defs.register_schema(_schema(contract))


def _schema(contract: OpContract) -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    # x, bias and y have one type; every other input has its own.
    symbol = {"bias": "T_x" if contract.name == LINEAR else "T_y", "y": "T_x" if contract.name == LINEAR else "T_y"}
    ports = (*contract.inputs, contract.output)
    types = {symbol.get(port.name, f"T_{port.name}"): port for port in ports}
    text = schema.AttrType.STRING
    return schema(
        contract.name,
        DOMAIN,
        OPSET_VERSION,
        contract.meaning,
        inputs=[
            schema.FormalParameter(
                port.name,
                symbol.get(port.name, f"T_{port.name}"),
                port.shape,
                param_option=option.Optional if port.optional else option.Single,
            )
            for port in contract.inputs
        ],
        outputs=[schema.FormalParameter("y", symbol["y"], contract.output.shape)],
        type_constraints=[(name, port.types, port.shape) for name, port in types.items()],
        attributes=[
            *(_schema_attribute(attribute) for attribute in contract.attributes),
            schema.Attribute("plugin_version", text, "device form only", required=False),
            schema.Attribute("plugin_namespace", text, "device form only", required=False),
        ],
    )


def _schema_attribute(attribute: Attribute) -> onnx.defs.OpSchema.Attribute:
    schema = onnx.defs.OpSchema
    if attribute.default is None:
        return schema.Attribute(attribute.name, schema.AttrType.INT, attribute.meaning, required=True)
    default = onnx.helper.make_attribute(attribute.name, attribute.default)
    return schema.Attribute(attribute.name, default, attribute.meaning)


def contract_header() -> str:
    """The text of plugins/vq_linear/contract.h."""
    lines = [
        "// Generated from toolchain/graph/op/vq_op.py by",
        "//     python -m toolchain.graph.op.vq_op > plugins/vq_linear/contract.h",
        "// Do not edit: a test compares this file with what its generator writes.",
        "#pragma once",
        "",
        "namespace mgvq::contract {",
        "",
        f'inline constexpr char kDomain[] = "{DOMAIN}";',
        f'inline constexpr char kPluginVersion[] = "{PLUGIN_VERSION}";',
        f'inline constexpr char kPluginNamespace[] = "{PLUGIN_NAMESPACE}";',
        f"inline constexpr int kFormatVersion = {FORMAT_VERSION};",
        f"inline constexpr int kRowGroup = {ROW_GROUP};  // rows are padded to this",
        f"inline constexpr int kColumnGroup = {COLUMN_GROUP};  // columns are padded to this",
        f"inline constexpr int kChunkRows = {CHUNK_ROWS};  // rows of a chunk: windows of its stream",
        f"inline constexpr int kRowStride = {ROW_STRIDE};  // distance of neighbouring rows of a chunk",
    ]
    for contract in CONTRACTS.values():
        lines += ["", *_header_of(contract)]
    lines += ["", "// Attributes of both ops, all of them int.", *map(_header_of_attribute, ATTRIBUTES)]
    lines.append(f"inline constexpr int kRequiredAttributes = {len(ATTRIBUTES)};")
    lines += ["", f"// {LINEAR}'s alone; {ALLOW_INT8.default} where it is absent.", _header_of_attribute(ALLOW_INT8)]
    return "\n".join([*lines, "", "}  // namespace mgvq::contract", ""])


def _header_of(contract: OpContract) -> list[str]:
    prefix = "Linear" if contract.name == LINEAR else "Embedding"
    lines = [f'inline constexpr char k{prefix}Name[] = "{contract.name}";', f"// {contract.meaning}"]
    for place, port in enumerate(contract.inputs):
        note = f"{'|'.join(port.device)} {port.shape}{', optional' if port.optional else ''}"
        lines.append(f"inline constexpr int k{prefix}Input{port.name.capitalize()} = {place};  // {note}")
    required = sum(not port.optional for port in contract.inputs)
    lines.append(f"inline constexpr int k{prefix}RequiredInputs = {required};")
    lines.append(f"inline constexpr int k{prefix}Inputs = {len(contract.inputs)};  // output: {contract.output.shape}")
    return lines


def _header_of_attribute(attribute: Attribute) -> str:
    name = "".join(word.capitalize() for word in attribute.name.split("_"))
    span = f"{attribute.lowest}..{attribute.highest}"
    return f'inline constexpr char kAttribute{name}[] = "{attribute.name}";  // {span}: {attribute.meaning}'


if __name__ == "__main__":
    sys.stdout.write(contract_header())
