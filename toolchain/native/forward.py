"""What a quantized module computes with, by the device of its input: kernels on CUDA, blocked decoding on the CPU."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from toolchain.errors import EnvironmentMismatch
from toolchain.native import blocked, ops
from toolchain.native.choice import decodes_with_torch
from toolchain.native.library import DEFAULT_TACTIC
from toolchain.values import VQCode


class PackedWeight(Protocol):
    """What the kernels need of a quantized module (`checkpoint.modules.VQModule`); shapes and dtypes as there."""

    code: VQCode
    rows: int
    columns: int
    scales: Tensor
    codebook: Tensor
    compute_dtype: torch.dtype

    @property
    def codes(self) -> Tensor: ...
    def device_codes(self) -> Tensor: ...
    def dense(self, dtype: torch.dtype) -> Tensor: ...
    def extra_repr(self) -> str: ...


def linear(module: PackedWeight, bias: Tensor | None, x: Tensor) -> Tensor:
    """y [..., rows] = x Ŵᵀ + bias in x's dtype.

    On CUDA the kernels, or torch inside `torch_decode`. Elsewhere a few hundred rows are decoded at a time; only where
    a gradient for x is wanted is the whole weight made dense, because the way back needs it too.

    Raises:
        EnvironmentMismatch: x is on a CUDA device without a library that fits it.
    """
    if x.is_cuda and not decodes_with_torch():
        return ops.linear(x, *op_arguments(module), bias, DEFAULT_TACTIC)
    if x.is_cuda or (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, module.dense(x.dtype), bias)
    return blocked.linear(x, module.codes, module.codebook, module.scales, module.code, module.columns, bias)


def embedding(module: PackedWeight, ids: Tensor) -> Tensor | None:
    """Rows of Ŵ by the kernels, [*ids.shape, columns] in the module's `compute_dtype`, zeros for ids that are none;
    None where the kernels are not what decodes: not on CUDA, or inside `torch_decode`.
    """
    if not ids.is_cuda or decodes_with_torch():
        return None
    return ops.embedding(ids, *op_arguments(module), module.compute_dtype)


def op_arguments(module: PackedWeight) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int], int]:
    """The ops' weight arguments. Permutes the codes into device order the first time.

    Raises:
        EnvironmentMismatch: there is no library: said before anything is permuted.
    """
    device = module.scales.device
    if device.type != "cuda":
        raise EnvironmentMismatch(
            f"expected the weight of {module.extra_repr()} on the CUDA device of its input, found it on {device}; "
            "move the model with .to('cuda')"
        )
    ops.device_library(device.index)
    code = module.code
    formats = [code.vector, code.shift, code.window, module.columns]
    return [module.device_codes()], [module.codebook], [module.scales], formats, module.rows
