"""What a bundle carries for the board: a wheel that installs, requirements, sources, its target's instructions."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest

import toolchain
from toolchain import board_kit
from toolchain.bundle import write_bundle
from toolchain.device.selftest import FILE, read_cases
from toolchain.errors import InputDataError
from toolchain.target import load_target
from toolchain.values import BitPlan, LayerPlan

NANO = load_target("orin-nano-8gb").to_json()
MEMORY = {
    "peak_bytes": 3 << 30,
    "build_peak_bytes": 2 << 30,
    "largest_block_bytes": 100 << 20,
    "largest_block": "logits",
    "workload": {"context_tokens": 2048},
}


def layer(name: str, code: str) -> LayerPlan:
    return LayerPlan(name, "language", "linear", 128, 192, name, code, "t")


PLAN = BitPlan((layer("a", "2,4,8"), layer("b", "2,4,8"), layer("c", "2,6,8@64+2,3,8")))


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    return board_kit.write_kit(folder, PLAN, NANO, MEMORY)


def test_everything_is_there_and_the_same_each_time(kit, tmp_path):
    names = {"README.md", "requirements-board.txt", FILE}
    wheel = next(name for name in kit if name.endswith(".whl"))
    assert names < set(kit)
    assert wheel == f"wheel/mgvq-{toolchain.__version__}-py3-none-any.whl"
    (tmp_path / "again").mkdir()
    again = board_kit.write_kit(tmp_path / "again", PLAN, NANO, MEMORY)
    for name in (*names, wheel):
        assert again[name].read_bytes() == kit[name].read_bytes(), name


def test_every_code_of_the_plan_is_tested_on_the_board(kit):
    assert {str(case.code) for case in read_cases(kit[FILE])} == {"2,4,8", "2,6,8", "2,3,8"}


def test_the_wheel_installs_and_runs_alone(tmp_path):
    wheel = board_kit.write_wheel(tmp_path)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    code = (
        "import toolchain, sys; from toolchain.target import list_targets; from toolchain.device import selftest\n"
        "from toolchain.board_kit import plugin_sources\n"
        "print(toolchain.__file__); print(len(list_targets())); print('plugins/CMakeLists.txt' in plugin_sources())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
    )  # fmt: skip
    place, targets, has_sources = run.stdout.split()
    assert place.startswith(str(target))
    assert int(targets) >= 4
    assert has_sources == "True"
    assert (target / "mgvq-0.1.0.dist-info").is_dir() == (toolchain.__version__ == "0.1.0")


def test_the_wheel_records_every_file_and_no_cache(tmp_path):
    with zipfile.ZipFile(board_kit.write_wheel(tmp_path)) as archive:
        names = archive.namelist()
        record = next(name for name in names if name.endswith("RECORD"))
        lines = archive.read(record).decode().splitlines()
        assert sorted(line.split(",")[0] for line in lines) == sorted(names)
        assert b"mgvq = toolchain.cli:main" in archive.read(record.replace("RECORD", "entry_points.txt"))
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]


def test_requirements_are_the_packages_own_and_bindings_of_the_targets_cuda():
    lines = board_kit.board_requirements(NANO).splitlines()
    named = {line.split(">")[0] for line in lines if not line.startswith("#")}
    assert named == {*board_kit.BOARD_REQUIREMENTS, "cuda-python"}
    assert "cuda-python>=12.6,<13" in lines
    assert "# cuda-python>=13,<14" in lines, "JetPack 7.2 is the target's other release"
    thor = board_kit.board_requirements(load_target("agx-thor-128gb").to_json())
    assert "cuda-python>=13,<14" in thor.splitlines()
    assert "choose by" not in thor


def test_instructions_are_this_targets(kit):
    text = kit["README.md"].read_text()
    assert "NVIDIA Jetson Orin Nano 8GB" in text
    assert "JetPack 6.2: L4T 36.4, TensorRT 10.3, CUDA 12.6" in text
    assert f"--no-deps wheel/mgvq-{toolchain.__version__}-py3-none-any.whl" in text
    assert "3,072 MiB while it runs, 2,048 MiB while it builds" in text
    assert "is enough as it is" in text


def test_a_block_beyond_the_pool_asks_for_a_larger_one():
    text = board_kit.instructions(NANO, MEMORY | {"largest_block_bytes": 400 << 20}, "w.whl")
    assert "Add `cma=500M`" in text
    most = board_kit.instructions(NANO, MEMORY | {"largest_block_bytes": 940 << 20}, "w.whl")
    assert "Add `cma=950M`" in most


def test_built_libraries_are_carried_by_hash_with_what_they_suit(tmp_path):
    library = tmp_path / "libmgvq_plugin.so"
    library.write_text("compiled")
    suits = {"machine": "aarch64", "sm": ["87"], "tensorrt": "10.3"}
    pieces = board_kit.carry_libraries({library: suits}, tmp_path)
    bundle = write_bundle(pieces, tmp_path / "bundle")
    entry = json.loads(bundle.path("libraries/libraries.json").read_text())[0]
    assert bundle.path(entry["file"]).read_text() == "compiled"
    assert {key: entry[key] for key in suits} == suits
    with pytest.raises(InputDataError, match=r"gone.so does not exist"):
        board_kit.carry_libraries({tmp_path / "gone.so": suits}, tmp_path)


def test_the_summary_says_what_is_missing():
    assert "the board will need a library" in board_kit.kit_summary(["wheel/mgvq.whl"])
    names = ["wheel/w.whl", "plugins/tensorrt/CMakeLists.txt", "libraries/0/libmgvq_plugin.so"]
    assert board_kit.kit_summary(names) == "w.whl, 1 plugin source files, 1 plugin libraries"
