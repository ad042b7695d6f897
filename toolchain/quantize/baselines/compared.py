"""What a method hands over that no checkpoint can hold: decoded weights and an honest count of bytes.

`registry.COMPARED` lists such methods. They exist for `toolchain.evaluate.compare` alone: nothing can be exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.values import VQCode
from toolchain.vq.weights import Options


@dataclass(frozen=True)
class ComparedGroup:
    """A quantized group of layers. `weights` are the Ŵ float32[m_i, n] it decodes to, `bytes` all that would be stored
    for it (codes with their padding, codebooks, scales); `errors` and `references` as in `vq.weights.VQGroup`.
    """

    weights: tuple[Tensor, ...]
    errors: tuple[float, ...]
    references: tuple[float, ...]
    bytes: int


ComparedMethod = Callable[[list[Tensor], Tensor, VQCode, Options, torch.Generator], ComparedGroup]
