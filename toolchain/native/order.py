"""Codes of a module in the order the kernels read: the same bytes, permuted when a device first needs them.

A checkpoint stores checkpoint order, and every reader in Python means it. The kernels need device order
(`vq.format.device_from_checkpoint`). A module keeps one of the two: the permuted tensor, which carries a mark, takes
the other's place, so that both exist only while one is made. Nothing is permuted in place, because others may hold the
tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolchain.errors import UsageError
from toolchain.values import COLUMN_GROUP, ROW_STRIDE, VQCode

PLANE_BYTES = 16
_MARK = "_mgvq_in_device_order"


def device_from_checkpoint(codes: Tensor, code: VQCode, rows: int, columns: int) -> Tensor:
    """uint8[bytes] in device order from uint8[bytes] in checkpoint order; equal to vq.format's."""
    row_groups, stride, column_chunks = code.chunk_shape(rows, columns)
    quarters, halves = 4, COLUMN_GROUP // code.vector // 4
    blocks = column_chunks // (quarters * halves)
    view = codes.view(row_groups, stride, blocks, halves, quarters, code.chunk_bytes).permute(0, 2, 1, 4, 3, 5)
    lanes = view.reshape(row_groups, blocks, stride * quarters, halves * code.chunk_bytes)
    planes = [part.flatten(2) for part in lanes.split(PLANE_BYTES, dim=-1)]
    return torch.cat(planes, dim=-1).flatten()


def checkpoint_from_device(codes: Tensor, code: VQCode, rows: int, columns: int) -> Tensor:
    """The inverse of `device_from_checkpoint`."""
    row_groups, stride, column_chunks = code.chunk_shape(rows, columns)
    quarters, halves = 4, COLUMN_GROUP // code.vector // 4
    blocks, lanes, lane_bytes = column_chunks // (quarters * halves), ROW_STRIDE * 4, halves * code.chunk_bytes
    widths = [min(PLANE_BYTES, lane_bytes - at) for at in range(0, lane_bytes, PLANE_BYTES)]
    planes = codes.view(row_groups, blocks, lanes * lane_bytes).split([lanes * width for width in widths], dim=-1)
    whole = torch.cat([plane.unflatten(-1, (lanes, width)) for plane, width in zip(planes, widths)], dim=-1)
    view = whole.view(row_groups, blocks, stride, quarters, halves, code.chunk_bytes)
    return view.permute(0, 2, 1, 4, 3, 5).reshape(-1)


def is_in_device_order(codes: Tensor) -> bool:
    """Whether `in_device_order` has made this tensor."""
    return getattr(codes, _MARK, False)


def in_device_order(codes: Tensor, code: VQCode, rows: int, columns: int) -> Tensor:
    """The bytes in device order, marked as such: the tensor itself if it is, else a permuted copy.

    Raises:
        UsageError: a CUDA graph is being captured: the permutation would be replayed with it.
    """
    if is_in_device_order(codes):
        return codes
    if codes.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "codes must be in device order before a CUDA graph is captured: run the model once first, as a warm-up, or "
            "call VQModule.device_codes() of every module"
        )
    with torch.inference_mode(False):  # a buffer outlives the mode it was first used in
        permuted = device_from_checkpoint(codes, code, rows, columns)
    if codes.is_cuda:
        torch.cuda.current_stream(codes.device).synchronize()  # once a tensor: other streams may read it next
    setattr(permuted, _MARK, True)
    return permuted


def in_checkpoint_order(codes: Tensor, code: VQCode, rows: int, columns: int) -> Tensor:
    """The bytes in checkpoint order: the tensor itself if it is, else a permuted copy."""
    if not is_in_device_order(codes):
        return codes
    with torch.inference_mode(False):
        return checkpoint_from_device(codes, code, rows, columns)
