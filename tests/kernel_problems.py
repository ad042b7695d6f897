"""Weights in every code with random codes, and the libraries that the kernels' tests run against."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from toolchain.native.launch import Weight
from toolchain.values import CODES, VQCode
from toolchain.vq import format as vq_format

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
ALL_CODES = list(CODES.values())
SEGMENTED = ((CODES["2,8,9"], 64), (CODES["2,4,8"], 128), (CODES["4,8,9"], 40))


@dataclass(frozen=True)
class Problem:
    """A stored weight: per segment code, columns, codes uint8 in checkpoint order, table, scales float16[rows]."""

    rows: int
    codes: tuple[VQCode, ...]
    columns: tuple[int, ...]
    stored: tuple[NDArray, ...]
    tables: tuple[NDArray, ...]
    scales: tuple[NDArray, ...]

    def decoded(self) -> NDArray:
        """float32[rows, all columns] by the format's definition."""
        each = zip(self.stored, self.tables, self.scales, self.codes, self.columns, strict=True)
        parts = [vq_format.decode(s, t, a, code, self.rows, n) for s, t, a, code, n in each]
        return np.concatenate(parts, axis=1)

    def in_device_order(self) -> list[NDArray]:
        each = zip(self.stored, self.codes, self.columns, strict=True)
        return [vq_format.device_from_checkpoint(s, code, self.rows, n) for s, code, n in each]

    def weight(self, device: str = "cpu") -> Weight:
        """For the launchers; tensors start at allocations of torch's, which are aligned."""
        numbers = [x for code, n in zip(self.codes, self.columns) for x in (code.vector, code.shift, code.window, n)]
        each = (
            [torch.tensor(a).to(device) for a in arrays]
            for arrays in (self.in_device_order(), self.tables, self.scales)
        )
        return Weight(*each, numbers, self.rows)


def problem(*segments: tuple[VQCode, int], rows: int, seed: int = 0, is_exact: bool = False) -> Problem:
    """Random codes; Gaussian tables and uniform scales, or small integers and scales 1 and 2, whose sums are exact."""
    rng = np.random.default_rng(seed)
    stored, tables, scales = [], [], []
    for code, columns in segments:
        shape = (code.entries, code.vector)
        stored.append(rng.integers(0, 256, size=code.codes_bytes(rows, columns), dtype=np.uint8))
        integers = rng.integers(-8, 9, size=shape) if is_exact else rng.integers(-127, 128, size=shape)
        table = integers if code.vector == 4 or is_exact else rng.normal(size=shape)
        tables.append(table.astype(code.codebook_dtype))
        scales.append(
            (rng.integers(1, 3, size=rows) if is_exact else rng.uniform(1e-3, 0.1, size=rows)).astype(np.float16)
        )
    codes, columns_ = zip(*segments, strict=True)
    return Problem(rows, codes, columns_, tuple(stored), tuple(tables), tuple(scales))


def compiled(folder: Path, name: str, sources: list[Path], includes: list[Path], more: Sequence[str] = ()) -> Path:
    """A shared library of C++ sources, or the test is skipped where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++)")
    path = folder / name
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    places = [f"-I{place}" for place in includes]
    done = subprocess.run(
        [compiler, *flags, *places, *more, *map(str, sources), "-o", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return path


def emulated_library() -> Path | None:
    """The emulated kernels that CMake built under build/, no older than their sources; None where there are none."""
    sources = [p for folder in ("vq_linear", "emulator") for p in (PLUGINS / folder).rglob("*") if p.is_file()]
    newest = max(p.stat().st_mtime for p in sources)
    built = sorted(ROOT.glob("build/**/libmgvq_kernels_emulated.so"), key=lambda p: p.stat().st_mtime)
    return built[-1] if built and built[-1].stat().st_mtime >= newest else None
