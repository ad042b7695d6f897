"""What a kernel's product may differ by, and probes that see every weight on its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_problems import Problem
from torch import Tensor

from toolchain.native import launch

FEW_TOKENS = (1, 2, 8, 9, 17)
ALL_TOKENS = (*range(1, 18), 31, 33, 64, 127, 512)
PROBES = 8


def one_hot_rows(columns: int, device: str) -> Iterator[Tensor]:
    """float16[up to 8, columns] with a 1 in each row, until every column has had its turn."""
    for begin in range(0, columns, PROBES):
        hot = torch.arange(begin, min(begin + PROBES, columns))
        yield torch.nn.functional.one_hot(hot, columns).half().to(device)


def allowed_error(x: Tensor, weight: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """float64: float32 sums in any order, 1e-5 of Σ|w·x|, and half a unit in the last place of the result's type.

    Args:
        x, weight: float64, as they are multiplied.
        expected: float64, their product.
    """
    half_unit = (
        torch.finfo(dtype).eps / 2 * expected.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    return 1e-5 * (x.abs() @ weight.abs().T) + half_unit


def scale_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float16[tokens, columns] = x · 2^(14 - e), float32[tokens, 1] = 2^(e - 14)), e the exponent of the row's largest
    magnitude and at least -100: kernels.h's rule for rows that float16 may not hold. NaN for a row that is not finite.
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True)
    exponent = (torch.frexp(largest)[1] - 1).clamp_min(-100)  # frexp's fraction lies in [0.5, 1)
    exponent = torch.where(largest > 0, exponent, -100)
    one = torch.ones_like(largest)
    back = torch.where(torch.isfinite(largest), torch.ldexp(one, exponent - 14), float("nan"))
    return (x.double() * torch.ldexp(one.double(), 14 - exponent)).to(torch.float16), back


def check_product(runner, given: Problem, tokens: int, dtype: torch.dtype = torch.float16) -> None:
    """Multiply random activations and hold every element against float64, with what the kernel rounds rounded first."""
    x = torch.randn(tokens, sum(given.columns), generator=torch.Generator().manual_seed(tokens)).to(
        runner.device, dtype
    )
    weight = torch.from_numpy(given.decoded()).to(runner.device).double()
    y = launch.linear(runner.library, x, given.weight(runner.device), None, runner.stream)
    seen = x.double()
    if dtype != torch.float16:
        scaled, back = scale_rows(x)
        seen = scaled.double() * back.double()
    expected = seen @ weight.T
    share = ((y.double() - expected).abs() / allowed_error(seen, weight, expected, dtype)).max().item()
    print(f"{given.rows}x{sum(given.columns)} M={tokens} {dtype}: {share:.3f} of the error allowed")
    assert share <= 1
