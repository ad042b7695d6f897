"""The methods a user can name, each a function `(weights, moment, code, options, generator)` of one group of layers."""

from __future__ import annotations

from toolchain.baselines import gptq, gptvq, nearest, rtn, vptq
from toolchain.baselines.compared import ComparedMethod
from toolchain.errors import UsageError
from toolchain.vq import solve
from toolchain.vq.weights import Method

METHODS: dict[str, Method] = {
    "mgvq": solve.quantize_group,
    "gptvq": gptvq.quantize_group,
    "gptq": gptq.quantize_group,
    "nearest": nearest.quantize_group,
    "rtn": rtn.quantize_group,
}

# Their codes fit no checkpoint: `toolchain.compare` alone takes them.
COMPARED: dict[str, ComparedMethod] = {"vptq": vptq.quantize_group}


def method_named(name: str) -> Method:
    """The method of that name, whose result a checkpoint can hold.

    Raises:
        UsageError: there is none.
    """
    if name in COMPARED:
        raise UsageError(
            f"method {name!r} is for mgvq compare alone, no checkpoint can hold its codes; use one of "
            f"{', '.join(METHODS)}"
        )
    if name not in METHODS:
        raise UsageError(f"method {name!r} is not known; use one of {', '.join(METHODS)}")
    return METHODS[name]
