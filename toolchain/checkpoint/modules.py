"""Torch modules that hold packed codes and decode them when they are called.

`decode_weight` equals `vq.format.decode` bit for bit: that makes a checkpoint, a graph and an engine comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolchain.checkpoint.rotated import RotatedInput
from toolchain.errors import ShapeError
from toolchain.native import forward, order
from toolchain.values import CHUNK_ROWS, ROW_GROUP, ROW_STRIDE, LayerPlan, VQCode
from toolchain.vq.rotation import BLOCKS, inverse_rotate
from toolchain.vq.weights import VQWeights

if TYPE_CHECKING:
    from typing_extensions import Self

Device = torch.device | str | None
# Buffers whose dtype is part of the format: model.half() or model.to(bfloat16) must not touch it.
FORMAT_BUFFERS = ("codebook", "scales")


def chunk_windows(chunks: Tensor, code: VQCode, windows: Tensor) -> Tensor:
    """Codebook indices int32[..., T]: for each chunk uint8[..., 2k] the windows int64[T] or [..., T] asked for.

    Window t is L bits from bit k·t, wrapping. L ≤ 9 and the first bit's place in its byte ≤ 7, so two bytes hold it.
    """
    first, offset = code.shift * windows // 8, code.shift * windows % 8
    size = code.chunk_bytes
    first, offset = (x.expand(*chunks.shape[:-1], x.shape[-1]) for x in (first, offset))
    word = chunks.gather(-1, first).int() << 8 | chunks.gather(-1, (first + 1) % size).int()
    return word >> (16 - code.window - offset.int()) & (code.entries - 1)


def decode_weight(
    codes: Tensor, codebook: Tensor, scales: Tensor, code: VQCode, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Ŵ [rows, columns] in `dtype`, rounded once from the float32 product scale · entry.

    Args:
        codes: uint8[bytes] in checkpoint order.
        codebook: [2^L, V], int8 or float16.
        scales: float16[rows].
    """
    chunks = codes.reshape(*code.chunk_shape(rows, columns), code.chunk_bytes)
    indices = chunk_windows(chunks, code, torch.arange(CHUNK_ROWS, device=codes.device))
    unit = codebook.float()[indices.permute(0, 3, 1, 2)]
    unit = unit.reshape(-1, chunks.shape[2] * code.vector)[:rows, :columns]
    return (unit * scales.float()[:, None]).to(dtype)


def decode_rows(
    ids: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code: VQCode,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` of Ŵ, [*ids.shape, columns] in `dtype`; only the chunks that hold them are read."""
    flat = ids.reshape(-1)
    chunks = codes.reshape(*code.chunk_shape(rows, columns), code.chunk_bytes)
    within = flat % ROW_GROUP
    mine = chunks[flat // ROW_GROUP, within % ROW_STRIDE]
    indices = chunk_windows(mine, code, (within // ROW_STRIDE)[:, None, None])
    unit = codebook.float()[indices].reshape(len(flat), -1)[:, :columns]
    return (unit * scales.float()[flat, None]).to(dtype).reshape(*ids.shape, columns)


def _keep_dtypes(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give buffers whose dtype `.to(dtype)` has changed their own again, on the device they are on now."""
    for name, tensor in before.items():
        moved = module.get_buffer(name)
        if moved.dtype != tensor.dtype:
            module._buffers[name] = tensor.to(moved.device)


class VQModule(nn.Module):
    """Codes, scales and codebook of one weight; `codebook_id` names the shared codebook the checkpoint stores for it.

    Buffers: codes uint8[bytes] in checkpoint order, scales float16[rows], codebook (not in the state dict: shared
    codebooks are stored once, see `VQCodebooks`). `compute_dtype` is the dtype of the dense weight this stands for;
    `.to(dtype)` moves it.

    Once the kernels have run, the buffer's bytes are in device order (`kernels.order`), without a second copy: `codes`
    then gives a permuted copy, and the state dict holds checkpoint order as ever. Only `buffers()` shows the bytes as
    they lie.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor

    def __init__(
        self, code: VQCode, rows: int, columns: int, codebook_id: str, dtype: torch.dtype, device: Device = None
    ) -> None:
        super().__init__()
        self.code, self.rows, self.columns, self.codebook_id = code, rows, columns, codebook_id
        self.compute_dtype = dtype
        codebook_shape = (code.entries, code.vector)
        self.register_buffer("codes", torch.zeros(code.codes_bytes(rows, columns), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(rows, dtype=torch.float16, device=device))
        codebook = torch.zeros(codebook_shape, dtype=getattr(torch, code.codebook_dtype), device=device)
        self.register_buffer("codebook", codebook, persistent=False)
        self._decoded: Tensor | None = None
        self._tied_to: tuple[VQModule, ...] = ()

    def set_weights(self, weights: VQWeights) -> None:
        """Take over the stored form of a matrix.

        Raises:
            ShapeError: it is of another code or shape than this module.
        """
        if (weights.code, weights.rows, weights.columns) != (self.code, self.rows, self.columns):
            raise ShapeError(
                f"expected weights of {self.rows}x{self.columns} in code {self.code}, found "
                f"{weights.rows}x{weights.columns} in code {weights.code}"
            )
        self.codes, self.scales, self.codebook = weights.codes, weights.scales, weights.codebook

    def tie_to(self, source: VQModule) -> None:
        """Use the source's buffers; this module then stores none of its own."""
        self._tied_to = (source,)
        for name in ("codes", "scales"):
            self._non_persistent_buffers_set.add(name)
        self._share_buffers()

    def _share_buffers(self) -> None:
        for source in self._tied_to:
            self.codes, self.scales, self.codebook = source._stored_codes, source.scales, source.codebook

    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        return order.in_checkpoint_order(found, self.code, self.rows, self.columns) if name == "codes" else found

    @property
    def _stored_codes(self) -> Tensor:
        """The buffer itself, in whichever order it is."""
        stored = self._buffers["codes"]
        assert stored is not None
        return stored

    def device_codes(self) -> Tensor:
        """The codes as the kernels read them, uint8[bytes] in device order; this tensor is the buffer from now on."""
        if self._tied_to:
            self._tied_to[0].device_codes()
            self._share_buffers()
        self.codes = order.in_device_order(self._stored_codes, self.code, self.rows, self.columns)
        return self._stored_codes

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if f"{prefix}codes" in destination:
            destination[f"{prefix}codes"] = self.codes

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.codes = self.codes  # in checkpoint order again
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.codes = self.codes  # in checkpoint order again
        before = {name: self.get_buffer(name) for name in FORMAT_BUFFERS}
        super()._apply(fn, recurse)
        _keep_dtypes(self, before)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        self._decoded = None
        self._share_buffers()
        return self

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Ŵ [rows, columns] in `dtype`: decoded now, or the copy `keep_decoded` holds."""
        if self._decoded is not None and self._decoded.dtype == dtype:
            return self._decoded
        return decode_weight(self.codes, self.codebook, self.scales, self.code, self.rows, self.columns, dtype)

    def keep(self, kept: bool) -> None:
        """Hold a decoded copy in `compute_dtype` from now on, or let it go."""
        self._decoded = None
        if kept:
            self._decoded = self.dense(self.compute_dtype)

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for library code that reads `.weight`; not a parameter."""
        return self.dense(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns}, code={self.code}, codebook={self.codebook_id}"


class VQLinear(VQModule):
    """y = x Ŵᵀ + bias, x [..., columns] → y [..., rows] in x's dtype.

    With a rotation the stored weight is one for Rᵀ x, which a hook makes of x before `forward`; `dense` gives it as it
    is stored, `weight` turned back.
    """

    def __init__(
        self,
        code: VQCode,
        rows: int,
        columns: int,
        codebook_id: str,
        dtype: torch.dtype,
        device: Device = None,
        bias: bool = False,
        rotation: int = 0,
    ) -> None:
        super().__init__(code, rows, columns, codebook_id, dtype, device)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.rotation = rotation
        if rotation:
            self.register_forward_pre_hook(RotatedInput(rotation))

    @property
    def weight(self) -> Tensor:
        stored = super().weight
        return inverse_rotate(stored, self.rotation) if self.rotation else stored

    def forward(self, x: Tensor) -> Tensor:
        if self._decoded is not None:
            return F.linear(x, self.dense(x.dtype), self.bias)
        return forward.linear(self, self.bias, x)


def patch_rows(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """[N, s₁/k₁, …, C·k₁·…] from [N, C, s₁, …]: what a convolution of stride = kernel multiplies, one row a patch."""
    counts = [size // k for size, k in zip(x.shape[2:], kernel)]
    cut = x[(slice(None), slice(None), *(slice(n * k) for n, k in zip(counts, kernel)))]
    split = cut.reshape(*x.shape[:2], *(part for pair in zip(counts, kernel) for part in pair))
    rank = len(kernel)
    order = (0, *(2 + 2 * i for i in range(rank)), 1, *(3 + 2 * i for i in range(rank)))
    return split.permute(order).flatten(1 + rank)


class VQConv(VQLinear):
    """A convolution whose stride is its kernel and that has no padding: [N, C, s₁, …] → [N, rows, s₁/k₁, …].

    The weight is that of the convolution with everything but its outputs flattened.
    """

    def __init__(
        self,
        code: VQCode,
        rows: int,
        columns: int,
        codebook_id: str,
        dtype: torch.dtype,
        device: Device = None,
        bias: bool = False,
        kernel: tuple[int, ...] = (),
    ) -> None:
        super().__init__(code, rows, columns, codebook_id, dtype, device, bias)
        self.kernel = tuple(kernel)
        if columns % math.prod(self.kernel):
            raise ShapeError(f"expected columns in whole kernels of {self.kernel}, found {columns}")

    @property
    def weight(self) -> Tensor:
        return super().weight.reshape(self.rows, -1, *self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(patch_rows(x, self.kernel)).movedim(-1, 1)


class VQEmbedding(VQModule):
    """ids int64[...] → rows of Ŵ, [..., columns] in `compute_dtype`; only the rows asked for are decoded."""

    def forward(self, ids: Tensor) -> Tensor:
        if self._decoded is not None:
            return F.embedding(ids, self._decoded)
        rows = forward.embedding(self, ids)
        if rows is not None:
            return rows
        stored = (self.codes, self.codebook, self.scales)
        return decode_rows(ids, *stored, self.code, self.rows, self.columns, self.compute_dtype)


class VQCodebooks(nn.Module):
    """The codebooks of a model, one buffer an id, as the checkpoint stores them (`mgvq_tables.<id>`)."""

    def __init__(self, codes: dict[str, VQCode], device: Device = None) -> None:
        super().__init__()
        for codebook_id, code in codes.items():
            dtype = getattr(torch, code.codebook_dtype)
            self.register_buffer(codebook_id, torch.zeros(code.entries, code.vector, dtype=dtype, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        _keep_dtypes(self, before)
        return self


def vq_modules(model: nn.Module) -> dict[str, VQModule]:
    """Name → module, for every quantized module of a model; the segments of a layer each for itself."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VQModule)}


@contextmanager
def keep_decoded(model: nn.Module) -> Iterator[None]:
    """Decode every module once for as long as the context lasts: the same numbers, dense memory, no decoding a call."""
    modules = vq_modules(model).values()
    try:
        for module in modules:
            module.keep(True)
        yield
    finally:
        for module in modules:
            module.keep(False)


def _check_rotation(layer: LayerPlan) -> None:
    block = layer.rotation
    if block and (layer.kind != "linear" or block not in BLOCKS or layer.columns % block):
        raise ShapeError(
            f"rotation in blocks of {block}: expected a linear, and blocks of {BLOCKS} that divide its columns, found "
            f"kind {layer.kind} of {layer.columns} columns; quantize the checkpoint again"
        )


def replacement_for(dense: Any, layer: LayerPlan) -> VQModule:
    """An empty module, on the dense one's device and in its dtype, to stand in its place; its bias is taken over.

    Raises:
        ShapeError: the dense module does not have the shape, is a convolution that overlaps or pads, or its inputs
            cannot be rotated.
    """
    weight = dense.weight
    if weight.flatten(1).shape != (layer.rows, layer.columns):
        raise ShapeError(f"expected a weight of {layer.rows}x{layer.columns}, found {list(weight.flatten(1).shape)}")
    _check_rotation(layer)
    common = (layer.vq_code, layer.rows, layer.columns, layer.table, weight.dtype, weight.device)
    if layer.kind == "embedding":
        return VQEmbedding(*common)
    bias = getattr(dense, "bias", None)
    module: VQLinear
    if layer.kind == "conv":
        if tuple(dense.stride) != tuple(dense.kernel_size) or any(dense.padding) or dense.groups != 1:
            raise ShapeError(f"expected a convolution with stride = kernel and no padding or groups, found {dense}")
        module = VQConv(*common, bias=bias is not None, kernel=tuple(dense.kernel_size))
    else:
        module = VQLinear(*common, bias=bias is not None, rotation=layer.rotation)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module
