"""The methods a user can name, each a function `(weights, moment, code, options, generator) -> VQGroup`."""

from __future__ import annotations

from toolchain.baselines import nearest, rtn
from toolchain.errors import UsageError
from toolchain.vq import solve
from toolchain.vq.weights import Method

METHODS: dict[str, Method] = {
    "mgvq": solve.quantize_group,
    "nearest": nearest.quantize_group,
    "rtn": rtn.quantize_group,
}


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is not known; use one of {', '.join(METHODS)}")
    return METHODS[name]
