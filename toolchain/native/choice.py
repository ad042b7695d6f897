"""What decodes weights on a CUDA device: the kernels, unless the caller asks for torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_WITH_TORCH: ContextVar[bool] = ContextVar("mgvq_torch_decode", default=False)


@contextmanager
def torch_decode() -> Iterator[None]:
    """Decode with torch's own operations on CUDA for as long as the context lasts, in this thread or task.

    Needs no library and any dtype, differentiates, and makes a dense copy of each weight in turn: many times slower
    than the kernels. Numbers differ within rounding: the kernels multiply in float16.
    """
    token = _WITH_TORCH.set(True)
    try:
        yield
    finally:
        _WITH_TORCH.reset(token)


def decodes_with_torch() -> bool:
    """Whether the caller stands inside `torch_decode`."""
    return _WITH_TORCH.get()
