"""Where the tests of the TensorRT shell find TensorRT's public headers, which are not ours to carry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[1] / "plugins"
VARIABLE = "MGVQ_TENSORRT_INCLUDE"
INSTALLED = ("/usr/include/aarch64-linux-gnu", "/usr/include/x86_64-linux-gnu", "/usr/include")


def header_folders() -> list[Path]:
    """Include folders that the variable names (as in PATH), or the installed one; skips where there is none."""
    named = [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    found = named or [Path(name) for name in INSTALLED if Path(name, "NvInferRuntime.h").is_file()][:1]
    if not found:
        pytest.skip(f"no TensorRT headers: name include folders of NVIDIA/TensorRT in {VARIABLE}")
    return found
