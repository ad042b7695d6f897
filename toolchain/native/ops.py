"""The kernels as torch ops: mgvq::linear, mgvq::embedding and mgvq::dequantize.

    linear(Tensor x, WEIGHT, Tensor? bias, int tactic)    y = x Ŵᵀ + bias
    embedding(Tensor ids, WEIGHT, ScalarType dtype)       rows of Ŵ
    dequantize(WEIGHT)                                    Ŵ float16[rows, columns]
    WEIGHT: Tensor[] codes, Tensor[] tables, Tensor[] scales, int[] formats, int rows

`launch.Weight` says what the lists hold; tactic 0 is the library's default. On CUDA they enqueue on the current stream
and never wait, so a CUDA graph can hold them. On the CPU they decode by the format's definition, slowly: it makes the
ops' rules testable, and modules take another way there (`blocked`). `linear` has a gradient for x and the bias.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from toolchain.native import launch
from toolchain.native.launch import Weight
from toolchain.native.library import KernelLibrary, check_device, load_library
from toolchain.vq import format as vq_format

Tensors = list[Tensor]
_WEIGHT = "Tensor[] codes, Tensor[] tables, Tensor[] scales, int[] formats, int rows"
_OPS = torch.library.Library("mgvq", "FRAGMENT")
_OPS.define(f"linear(Tensor x, {_WEIGHT}, Tensor? bias, int tactic) -> Tensor")
_OPS.define(f"embedding(Tensor ids, {_WEIGHT}, ScalarType dtype) -> Tensor")
_OPS.define(f"dequantize({_WEIGHT}) -> Tensor")

linear = torch.ops.mgvq.linear
embedding = torch.ops.mgvq.embedding
dequantize = torch.ops.mgvq.dequantize


@functools.lru_cache(maxsize=64)
def device_library(index: int) -> KernelLibrary:
    """The library for a CUDA device, checked once.

    Raises:
        EnvironmentMismatch: there is none, or it has no machine code for this device.
    """
    library = load_library()
    check_device(library, torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))
    return library


@torch.library.impl(_OPS, "linear", "CUDA")
def _linear_cuda(
    x: Tensor,
    codes: Tensors,
    tables: Tensors,
    scales: Tensors,
    formats: list[int],
    rows: int,
    bias: Tensor | None,
    tactic: int,
) -> Tensor:
    with torch.cuda.device(x.device):
        library, stream = device_library(x.device.index), torch.cuda.current_stream().cuda_stream
        return launch.linear(library, x, Weight(codes, tables, scales, formats, rows), bias, stream, tactic)


@torch.library.impl(_OPS, "embedding", "CUDA")
def _embedding_cuda(
    ids: Tensor, codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int, dtype: torch.dtype
) -> Tensor:
    with torch.cuda.device(ids.device):
        library, stream = device_library(ids.device.index), torch.cuda.current_stream().cuda_stream
        return launch.embedding(library, ids, Weight(codes, tables, scales, formats, rows), dtype, stream)


@torch.library.impl(_OPS, "dequantize", "CUDA")
def _dequantize_cuda(codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int) -> Tensor:
    device = codes[0].device
    with torch.cuda.device(device):
        library, stream = device_library(device.index), torch.cuda.current_stream().cuda_stream
        return launch.dequantize(library, Weight(codes, tables, scales, formats, rows), stream)


def decoded(
    codes: Sequence[Tensor], tables: Sequence[Tensor], scales: Sequence[Tensor], formats: Sequence[int], rows: int
) -> Tensor:
    """Ŵ float32[rows, columns] by the format's definition, for a weight in host memory."""
    weight = Weight(codes, tables, scales, formats, rows)
    weight.checked()
    parts = []
    for i, (code, columns) in enumerate(weight.segments()):
        checkpoint = vq_format.checkpoint_from_device(codes[i].numpy(), code, rows, columns)
        decoded = vq_format.decode(checkpoint, tables[i].numpy(), scales[i].numpy(), code, rows, columns)
        parts.append(torch.from_numpy(decoded))
    return torch.cat(parts, dim=1)


@torch.library.impl(_OPS, "linear", "CPU")
def _linear_cpu(
    x: Tensor,
    codes: Tensors,
    tables: Tensors,
    scales: Tensors,
    formats: list[int],
    rows: int,
    bias: Tensor | None,
    tactic: int,
) -> Tensor:
    y = x.float() @ decoded(codes, tables, scales, formats, rows).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.impl(_OPS, "embedding", "CPU")
def _embedding_cpu(
    ids: Tensor, codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int, dtype: torch.dtype
) -> Tensor:
    return decoded(codes, tables, scales, formats, rows)[ids].to(dtype)


@torch.library.impl(_OPS, "dequantize", "CPU")
def _dequantize_cpu(codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int) -> Tensor:
    return decoded(codes, tables, scales, formats, rows).half()


@torch.library.register_fake("mgvq::linear", lib=_OPS)
def _linear_fake(
    x: Tensor,
    codes: Tensors,
    tables: Tensors,
    scales: Tensors,
    formats: list[int],
    rows: int,
    bias: Tensor | None,
    tactic: int,
) -> Tensor:
    torch._check(x.shape[-1] == Weight(codes, tables, scales, formats, rows).columns)
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.register_fake("mgvq::embedding", lib=_OPS)
def _embedding_fake(
    ids: Tensor, codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int, dtype: torch.dtype
) -> Tensor:
    columns = Weight(codes, tables, scales, formats, rows).columns
    return torch.empty(*ids.shape, columns, dtype=dtype, device=ids.device)


@torch.library.register_fake("mgvq::dequantize", lib=_OPS)
def _dequantize_fake(codes: Tensors, tables: Tensors, scales: Tensors, formats: list[int], rows: int) -> Tensor:
    columns = Weight(codes, tables, scales, formats, rows).columns
    return torch.empty(rows, columns, dtype=torch.float16, device=codes[0].device)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, tables, scales, formats, rows, bias, _ = inputs
    ctx.save_for_backward(*codes, *tables, *scales)
    ctx.formats, ctx.rows = formats, rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """∂L/∂x = ∂L/∂y Ŵ, with the weight in float16: a dense copy for as long as this takes; ∂L/∂bias = Σ ∂L/∂y."""
    count = len(ctx.formats) // launch.FORMAT_FIELDS
    tensors = ctx.saved_tensors
    weight = [list(tensors[at : at + count]) for at in range(0, 3 * count, count)]
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ dequantize(*weight, ctx.formats, ctx.rows).to(gradient.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
        to_bias = gradient.flatten(0, -2).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return to_x, [None] * count, [None] * count, [None] * count, None, None, to_bias, None


torch.library.register_autograd("mgvq::linear", _linear_backward, setup_context=_save_weight, lib=_OPS)
