"""The baselines by name: functions of one group of layers."""

from __future__ import annotations

from toolchain.quantize.baselines import gptq, gptvq, nearest, rotated, rtn, vptq
from toolchain.quantize.baselines.compared import ComparedMethod
from toolchain.vq.weights import GroupMethod

# (weights, moment, code, options, generator) -> VQGroup, whose result a checkpoint can hold.
METHODS: dict[str, GroupMethod] = {
    "gptvq": gptvq.quantize_group,
    "gptq": gptq.quantize_group,
    "nearest": nearest.quantize_group,
    "rtn": rtn.quantize_group,
}

# Their codes fit no checkpoint: `toolchain.evaluate.compare` alone takes them.
COMPARED: dict[str, ComparedMethod] = {"vptq": vptq.quantize_group, "gptq-rotated": rotated.quantize_group}
