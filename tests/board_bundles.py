"""A board's bundle as the simulated builder reads it, the board it is for, and what its plugin computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from toolchain.device.runtime import selftest
from toolchain.device.runtime.board import Board, Gpu, Memory
from toolchain.plan.target import load_target
from toolchain.values import CODES, VQCode
from toolchain.vq import format as vq_format

MIB = 2**20
TARGET = load_target("orin-nano-8gb").to_json()
ORIN = Board("aarch64", "36.4.3", "6.2+b77", "12.6.68", Gpu("Orin", "87"))
ROOM = Memory(6000 * MIB, 256 * MIB, 200 * MIB)
PLAN = {"build_peak_bytes": 3000 * MIB, "largest_block_bytes": 100 * MIB, "largest_block": "logits"}


def place(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def correct_plugin(op, fields, inputs):
    """What the format says (vq/format.py), from the arrays a plugin gets."""
    code = VQCode(fields["vector"], fields["shift"], fields["window"])
    rows, columns = fields["rows"], fields["columns"]
    packed = vq_format.checkpoint_from_device(inputs[1].view(np.uint8), code, rows, columns)
    weight = vq_format.decode(packed, inputs[2], inputs[3], code, rows, columns)
    return weight[inputs[0]] if op == "VQEmbedding" else inputs[0] @ weight.T + inputs[4]


def wrong_plugin(op, fields, inputs):
    answer = correct_plugin(op, fields, inputs)
    return answer if op == "VQEmbedding" or len(answer) != 5 else answer + np.float32(0.5)


def board_pieces(source: Path) -> dict[str, Path]:
    """A bundle's pieces for a board, made in `source`: graphs, plan, self-test, plugin sources; a library in given/."""
    graphs = {"vision": ["a", "b"], "decoder": ["c"]}
    for name, plugins in graphs.items():
        place(source, f"device/{name}.onnx", json.dumps({"plugins": plugins, "others": ["cast"]}))
    report = {"graphs": [{"name": name, "vq_nodes": len(plugins)} for name, plugins in graphs.items()]}
    place(source, "device/rewrite.json", json.dumps(report))
    place(source, "memory.json", json.dumps(PLAN))
    place(source, "plugins/tensorrt/CMakeLists.txt", "# here\n")
    place(source, "plugins/CMakeLists.txt", "# here\n")
    profiles = {"decoder": {}, "decoder.decode": {}, "vision": {}}
    place(source, "host.json", json.dumps({"profiles": {"graphs": profiles}}))
    place(source, "given/libmgvq_plugin.so", "a library")
    selftest.write_cases([CODES["2,4,8"], CODES["4,8,8"]], source / selftest.FILE)
    names = ("device", "memory.json", "plugins", selftest.FILE)
    return {name: source / name for name in names} | {"processor/host.json": source / "host.json"}
