"""What a bundle carries for the board: a wheel that installs, requirements, sources, its target's instructions."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
import typer
from packaging.requirements import Requirement

import toolchain
from toolchain.bundle.manifest import write_bundle
from toolchain.cli.app import app
from toolchain.device.runtime.selftest import FILE, read_cases
from toolchain.errors import InputDataError, MgvqError, StoppedError
from toolchain.plan.target import list_targets, load_target
from toolchain.run import board_kit
from toolchain.values import BitPlan, LayerPlan

NANO = load_target("orin-nano-8gb").to_json()
MEMORY = {
    "peak_bytes": 3 << 30,
    "build_peak_bytes": 2 << 30,
    "largest_block_bytes": 100 << 20,
    "largest_block": "logits",
    "workload": {"context_tokens": 2048},
}
SETTINGS = {"decoder": {"max_context": 32768}, "image": {"max_pixels": 640_000}}


def layer(name: str, code: str) -> LayerPlan:
    return LayerPlan(name, "language", "linear", 128, 192, name, code, "t")


PLAN = BitPlan((layer("a", "2,4,8"), layer("b", "2,4,8"), layer("c", "2,6,8@64+2,3,8")))


@pytest.fixture
def kit(tmp_path):
    folder = tmp_path / "kit"
    folder.mkdir()
    return board_kit.write_kit(folder, PLAN, NANO, MEMORY, SETTINGS)


def test_everything_is_there_and_the_same_each_time(kit, tmp_path):
    names = {"README.md", "requirements-board.txt", FILE}
    wheel = next(name for name in kit if name.endswith(".whl"))
    assert names < set(kit)
    assert wheel == f"wheel/mgvq-{toolchain.__version__}-py3-none-any.whl"
    (tmp_path / "again").mkdir()
    again = board_kit.write_kit(tmp_path / "again", PLAN, NANO, MEMORY, SETTINGS)
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
        "import toolchain; from toolchain.plan.target import list_targets\n"
        "from toolchain.device.runtime import selftest\n"
        "from toolchain.run.board_kit import plugin_sources\n"
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
    assert "cuda-python>=12.6,<12.7; python_version < '3.12'" in lines, "JetPack 6.2 has Python 3.10"
    assert "cuda-python>=13.0,<13.1; python_version >= '3.12'" in lines, "JetPack 7.2, the target's other, has 3.12"
    thor = board_kit.board_requirements(load_target("agx-thor-128gb").to_json()).splitlines()
    assert "cuda-python>=13.0,<13.1" in thor


def test_bindings_are_of_no_newer_cuda_than_any_release_of_a_board():
    """Their runtime needs a driver of its own release or a newer one."""
    for name in list_targets():
        for release in load_target(name).to_json()["software"]:
            bindings = Requirement(board_kit.BINDINGS[int(release["cuda"].split(".")[0])])
            lowest = next(each.version for each in bindings.specifier if each.operator == ">=")
            assert not bindings.specifier.contains(f"{lowest.split('.')[0]}.{int(lowest.split('.')[1]) + 1}")
            assert [*map(int, lowest.split("."))] <= [*map(int, release["cuda"].split("."))]


def test_every_requirement_of_the_board_is_one_of_the_packages_own_as_it_stands_there():
    """pip would take a name it does not know as it is, without our bounds."""
    lines = [line for line in board_kit.board_requirements(NANO).splitlines() if not line.startswith("#")]
    parsed = {Requirement(line).name: Requirement(line) for line in lines}
    own = {Requirement(line).name: Requirement(line) for line in metadata.requires("mgvq") if "extra ==" not in line}
    for name in board_kit.BOARD_REQUIREMENTS:
        assert parsed[name].specifier == own[name].specifier
    extras = [Requirement(line) for line in metadata.requires("mgvq") if "extra == 'board'" in line]
    assert [each.name for each in extras] == ["cuda-python"]


def test_instructions_are_this_targets(kit):
    text = kit["README.md"].read_text()
    assert "NVIDIA Jetson Orin Nano 8GB" in text
    assert "JetPack 6.2: L4T 36.4, TensorRT 10.3, CUDA 12.6" in text
    assert f"--no-deps wheel/mgvq-{toolchain.__version__}-py3-none-any.whl" in text
    assert "3,072 MiB while it runs, 2,048 MiB while it builds" in text
    assert "is enough as it is" in text


def test_a_block_beyond_the_pool_asks_for_a_larger_one():
    enough = board_kit.instructions(NANO, MEMORY, SETTINGS, "w.whl")
    assert "is enough as it is" in enough
    text = board_kit.instructions(NANO, MEMORY | {"largest_block_bytes": 400 << 20}, SETTINGS, "w.whl")
    assert "before you build" in text
    assert "s/$/ cma=500M/" in text
    most = board_kit.instructions(NANO, MEMORY | {"largest_block_bytes": 940 << 20}, SETTINGS, "w.whl")
    assert "s/$/ cma=950M/" in most


def commands(text: str) -> list[list[str]]:
    """Every mgvq command in a page, as words."""
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    written = [*indented, *re.findall(r"`([^`]+)`", text)]
    found = [shlex.split(line.partition("  #")[0].replace("…", "")) for line in written if "mgvq " in f"{line} "]
    return [words[1:] for words in found if words and words[0].endswith("mgvq") and len(words) > 1]


def test_every_mgvq_command_of_the_instructions_is_one(kit):
    """Parsed by the command line itself: a verb or flag that is renamed fails here, not on a board."""
    verbs = typer.main.get_command(app).commands
    seen = set()
    for words in commands(kit["README.md"].read_text()):
        verb, arguments = words[0], words[1:]
        seen.add(verb)
        if "--help" in arguments:
            continue
        if verb in ("all", "plan"):  # what stands for the person's own model is left out there
            assert {word for word in arguments if word.startswith("--")} <= {
                o for p in verbs[verb].params for o in p.opts
            }
        else:
            verbs[verb].make_context(verb, list(arguments))
    assert seen >= {"doctor", "build", "run", "chat", "profile", "plan", "all", "targets"}


def test_the_instructions_explain_every_exit_code_and_every_folder(kit):
    text = kit["README.md"].read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    on_a_board = {kind.exit_code for kind in MgvqError.__subclasses__()} - {StoppedError.exit_code}
    assert codes == on_a_board | {0, 1, 130}
    folders = {name.partition("/")[0] for name in kit if "/" in name}
    assert all(f"`{folder}/`" in text for folder in folders)


def test_what_to_turn_down_is_smaller_than_what_was_planned():
    memory = MEMORY | {"workload": {"context_tokens": 2048, "image": [800, 600]}}
    text = board_kit.instructions(NANO, memory, SETTINGS, "w.whl")
    assert "Images of more than about 800x600 pixels are made smaller" in text
    assert "--set plan.image=600x450 --set plan.context=1024" in text
    assert "--target orin-nano-8gb" in text


def test_the_models_own_limits_count_where_they_are_tighter_than_the_plans():
    memory = MEMORY | {"workload": {"context_tokens": 2048, "image": [775, 775]}}
    settings = {"decoder": {"max_context": 1024}, "image": {"max_pixels": 28224}}
    text = board_kit.instructions(NANO, memory, settings, "w.whl")
    assert "Context: 1024 tokens" in text
    assert "Images of more than about 168x168 pixels are made smaller" in text
    assert "--set plan.image=126x126 --set plan.context=512" in text
    tiles = board_kit.instructions(NANO, memory, settings | {"image": {"tile": 448, "max_tiles": 6}}, "w.whl")
    assert "Images are cut into at most 6 tiles of 448x448 pixels" in tiles


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
