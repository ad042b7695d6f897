"""Stored inputs and outputs of a run through the graphs, for another machine to repeat.

reference.json           {"source", "calls": [{"step", "graph", "inputs", "outputs"}]}: names, in call order
reference.safetensors    NNN.in.NAME and NNN.out.NAME of call NNN
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from toolchain.device.families import Host, Prepared
from toolchain.device.families.base import Feeds
from toolchain.device.generation.answer import CachePlan, Decoding, Graphs
from toolchain.errors import InputDataError
from toolchain.files.folders import write_json
from toolchain.values import FORMAT_VERSION

TENSORS = "reference.safetensors"
INDEX = "reference.json"
BUCKETED = "bucket"  # the steps of calls with the past in a device's buckets begin with it


@dataclass(frozen=True)
class Call:
    """One call of one graph: `step` says where in the run it was made (batch2.0.prefill, batch2.0.decode1, …)."""

    step: str
    graph: str
    feeds: dict[str, NDArray]
    outputs: dict[str, NDArray]


def record_calls(
    host: Host,
    graphs: Graphs,
    batches: Sequence[list[Prepared]],
    decode_steps: int,
    plan: CachePlan | None = None,
) -> list[Call]:
    """Every graph call of prefill and `decode_steps` greedy tokens of each batch of prompts.

    With a plan the past comes in its buckets, and steps are called bucket instead of batch.
    """
    kind = BUCKETED if plan else "batch"
    calls: list[Call] = []
    for number, prompts in enumerate(batches):
        name = f"{kind}{len(prompts)}.{number}"
        calls += _calls_of_batch(host, graphs, prompts, decode_steps, name, plan)
    return calls


def _calls_of_batch(
    host: Host, graphs: Graphs, prompts: list[Prepared], decode_steps: int, name: str, plan: CachePlan | None
) -> list[Call]:
    calls: list[Call] = []
    step = f"{name}.prefill"

    def watch(graph: str, feeds: Feeds, outputs: Feeds) -> None:
        # The cache's views change with the next append.
        copied = {key: np.array(array) for key, array in feeds.items()}
        calls.append(Call(step, graph, copied, dict(outputs)))

    decoding = Decoding(host, graphs, prompts, decode_steps + 1, watch, plan)
    logits = decoding.prefill()
    for n in range(1, decode_steps + 1):
        step = f"{name}.decode{n}"
        logits = decoding.step(logits.argmax(axis=-1).astype(np.int64))
    return calls


def store_reference(folder: Path, calls: Sequence[Call], source: str) -> None:
    """Write calls to reference.safetensors and reference.json in an existing folder."""
    tensors: dict[str, NDArray] = {}
    index = []
    for number, call in enumerate(calls):
        for kind, arrays in (("in", call.feeds), ("out", call.outputs)):
            tensors |= {f"{number:03d}.{kind}.{name}": np.ascontiguousarray(x) for name, x in arrays.items()}
        index.append(
            {"step": call.step, "graph": call.graph, "inputs": list(call.feeds), "outputs": list(call.outputs)}
        )
    save_file(tensors, folder / TENSORS)
    write_json(folder / INDEX, {"format_version": FORMAT_VERSION, "source": source, "calls": index})


def load_reference(folder: Path, steps: str = "") -> list[Call]:
    """What `store_reference` wrote; of the calls whose step begins with `steps`, and no other's tensors are read.

    Raises:
        InputDataError: a file is missing, or the two do not belong together.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS, "numpy") as tensors:
            chosen = ((n, entry) for n, entry in enumerate(index["calls"]) if entry["step"].startswith(steps))
            return [_call_from_index(number, entry, tensors) for number, entry in chosen]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputDataError(
            f"{folder}: expected {INDEX} and {TENSORS} of one run ({error}); run `mgvq validate` again"
        ) from error


def _call_from_index(number: int, entry: dict[str, Any], tensors: Any) -> Call:
    feeds = {name: tensors.get_tensor(f"{number:03d}.in.{name}") for name in entry["inputs"]}
    outputs = {name: tensors.get_tensor(f"{number:03d}.out.{name}") for name in entry["outputs"]}
    return Call(entry["step"], entry["graph"], feeds, outputs)
