"""What the plugins decide, compiled by plain g++ without TensorRT and CUDA: the C++ test program passes."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from plugin_headers import PLUGINS

ROOT = PLUGINS.parent


def test_the_core_compiles_without_tensorrt_and_its_checks_pass(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (c++ or g++)")
    tests = ROOT / "tests" / "plugins"
    core = [PLUGINS / "tensorrt" / f"{name}.cpp" for name in ("attributes", "tensors", "tactics")]
    sources = [*core, PLUGINS / "vq_linear" / "dispatch.cpp", tests / "tensorrt" / "core_check.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{PLUGINS}", f"-I{tests}"]
    program = tmp_path / "core_check"
    built = subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    counted = re.search(r"(\d+) checks, 0 failed", done.stdout)
    assert counted
    assert int(counted.group(1)) > 1000


def test_the_core_includes_neither_tensorrt_nor_cuda():
    for name in ("core.h", "attributes.cpp", "tensors.cpp", "tactics.cpp"):
        included = re.findall(r'#include [<"](.*)[>"]', (PLUGINS / "tensorrt" / name).read_text(encoding="utf-8"))
        assert not [path for path in included if "NvInfer" in path or "cuda" in path or path.endswith("kernels.h")], (
            name
        )


def test_what_is_exported_is_what_tensorrt_looks_up():
    """The version script names what exports.cpp exports; ctest looks at the built libraries."""
    script = (PLUGINS / "tensorrt" / "exports.map").read_text(encoding="utf-8")
    source = (PLUGINS / "tensorrt" / "exports.cpp").read_text(encoding="utf-8")
    exported = re.findall(r"^MGVQ_EXPORT .*?(\w+)\(", source, re.MULTILINE)
    assert sorted(exported) == ["getCreators", "setLoggerFinder"]
    assert re.search(r"global: ([^}]*?)\n\s*local: \*;", script).group(1) == "getCreators; setLoggerFinder;"
