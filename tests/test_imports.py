"""Who may import what: imports run down the order of the folders, no files import each other in a circle, and the
board's half works without torch, onnx, transformers.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "toolchain"
# From the bottom up: a file may import from its own folder and from what stands before it. The files that lie in a
# folder itself stand after its folders.
ORDER = (
    "errors",
    "values",
    "files",
    "vq",
    "native",
    "bits",
    "plan",
    "bundle",
    "device.families",
    "device.runtime",
    "device.generation",
    "device.engines",
    "device.profile",
    "device.remote",
    "device",
    "models",
    "checkpoint",
    "calibration",
    "quantize.driver",
    "quantize.baselines",
    "quantize.mgvq",
    "quantize.refine",
    "quantize",
    "evaluate",
    "graph.op",
    "graph.passes",
    "graph",
    "report",
    "run",
    "bench",
    "demo",
    "cli",
    "__main__",
)
ROOT_FILES = {"__init__", "__main__", "errors", "values"}
# Nothing heavy at import: these run on a board, or answer before torch is there.
LIGHT = ("errors", "values", "bits", "plan", "bundle", "device")
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnx_graphsurgeon", "transformers")


@cache
def modules() -> dict[str, Path]:
    """Module, without the package's name → file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[tuple[int, str], ...]:
    """(line, module) of everything of ours that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in (name.removeprefix("toolchain.") for name in names if name.startswith("toolchain.")):
            known = name if name in modules() else name.rpartition(".")[0]
            if known:
                found.append((node.lineno, known))
    return tuple(found)


def floor(module: str) -> int:
    """Where a module's folder stands in the order."""
    return max((len(name), number) for number, name in enumerate(ORDER) if f"{module}.".startswith(f"{name}."))[1]


def test_every_folder_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES
    homeless = [name for name in modules() if name and not any(f"{name}.".startswith(f"{one}.") for one in ORDER)]
    assert homeless == []
    assert [name for name in ORDER if name not in modules()] == []


def test_imports_run_down_only():
    wrong = [
        f"toolchain/{modules()[name].relative_to(PACKAGE)}:{line} imports {other}: {ORDER[floor(other)]} stands after "
        f"{ORDER[floor(name)]}"
        for name in modules()
        if name
        for line, other in imports(name)
        if floor(other) > floor(name)
    ]
    assert wrong == [], "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    """What can be taken away because it imports nothing that is left, again and again; a circle stays."""
    left = {name: {other for _, other in imports(name)} - {name} for name in modules()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}, f"in a circle, or above one: {sorted(left)}"


def test_every_folder_says_what_is_in_it():
    for name, path in modules().items():
        if path.name == "__init__.py" and name:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert doc.partition("\n")[0].strip().endswith((".", ":")), f"{path}: one sentence first"
            assert "may import" in doc.lower(), f"{path}: says nothing of what it may import"


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


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.partition(".")[0] in LIGHT))
def test_light_folders_import_where_heavy_packages_cannot(module):
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\nimport toolchain.{module}"
    found = run(block)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("verb", [["targets"], ["--version"], ["build", "nowhere", "-o", "out"]])
def test_board_verbs_run_where_heavy_packages_cannot(verb):
    block = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    found = run(block + f"from toolchain.cli import main\nsys.exit(main({verb}))")
    assert found.returncode in (0, 6, 7), found.stderr
    assert "Traceback" not in found.stderr
