"""Layers whose weights are for rotated inputs: a hook turns what comes in, so that everything that watches the layer
after it sees the inputs that its weight multiplies (`vq.rotation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.vq.rotation import inverse_rotate, rotate


class RotatedInput:
    """A forward pre-hook: the first argument, [..., columns], becomes Rᵀ x."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]
        return rotate(x, self.block), *arguments[1:]


def rotate_model(model: nn.Module, blocks: Mapping[str, int]) -> None:
    """The linears named take rotated inputs from now on, in place; outputs do not change beyond rounding."""
    for name, block in blocks.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(rotate(weight.float(), block))
        module.register_forward_pre_hook(RotatedInput(block))


def inverse_rotate_model(model: nn.Module, blocks: Mapping[str, int]) -> None:
    """Undo `rotate_model`."""
    for name, block in blocks.items():
        hooks = model.get_submodule(name)._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, RotatedInput)]:
            del hooks[key]
        with torch.no_grad():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(inverse_rotate(weight.float(), block))
