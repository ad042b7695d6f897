"""Who may import what: the package is cheap to import, and the board's half works without torch, onnx, transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest

BOARD = (
    "toolchain",
    "toolchain.errors",
    "toolchain.values",
    "toolchain.target",
    "toolchain.budget",
    "toolchain.roofline",
    "toolchain.bitplan",
    "toolchain.bundle",
    "toolchain.vq.format",
    "toolchain.device.images",
    "toolchain.device.answer",
    "toolchain.device.families",
    "toolchain.device.engine",
    "toolchain.device.ort",
)
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "transformers")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_brings_nothing_heavy():
    found = run(f"import toolchain, sys; print([m for m in {(*HEAVY, 'numpy')} if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_help_brings_no_torch():
    code = (
        f"import sys; from toolchain.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run(code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", BOARD)
def test_the_boards_half_imports_where_heavy_packages_cannot(module):
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\nimport {module}"
    found = run(block)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("verb", [["targets"], ["--version"], ["build", "nowhere", "-o", "out"]])
def test_board_verbs_run_where_heavy_packages_cannot(verb):
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    found = run(block + f"from toolchain.cli import main\nsys.exit(main({verb}))")
    assert found.returncode in (0, 6, 7), found.stderr
    assert "Traceback" not in found.stderr
