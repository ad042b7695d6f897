"""The plugin library of a board: given, carried by the bundle, compiled before, or compiled from its sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from board_bundles import TARGET, place
from plugin_headers import header_folders

from toolchain.bundle.manifest import open_bundle, write_bundle
from toolchain.device.runtime import plugin_library
from toolchain.device.runtime.plugin_library import Wanted
from toolchain.errors import EnvironmentMismatch, InputDataError
from toolchain.native.build import missing_tools
from toolchain.run.board_kit import plugin_sources
from toolchain.values import SILENT


@pytest.fixture
def bundle(board_bundle):
    return board_bundle


class TestPluginLibrary:
    WANTED = Wanted("aarch64", "87", "10.3.0")

    def carried(self, pieces, tmp_path, entries):
        place(tmp_path, "libraries.json", json.dumps(entries))
        place(tmp_path, "carried.so", "carried")
        more = {"libraries/libraries.json": tmp_path / "libraries.json", "libraries/0/x.so": tmp_path / "carried.so"}
        return write_bundle(pieces | more, tmp_path / "b", target=TARGET)

    @pytest.mark.parametrize(
        ("change", "fits"),
        [({}, True), ({"machine": "x86_64"}, False), ({"sm": ["110"]}, False), ({"tensorrt": "10.13"}, False)],
    )
    def test_a_carried_library_is_taken_only_where_it_fits(self, pieces, tmp_path, change, fits):
        entry = {"file": "libraries/0/x.so", "machine": "aarch64", "sm": ["87"], "tensorrt": "10.3"}
        found = plugin_library.carried_library(self.carried(pieces, tmp_path, [entry | change]), self.WANTED)
        assert (found is not None) == fits

    def test_a_list_of_libraries_that_is_none(self, pieces, tmp_path):
        with pytest.raises(InputDataError, match="expected file, machine, sm and tensorrt of every library"):
            plugin_library.carried_library(self.carried(pieces, tmp_path, [{"file": "x"}]), self.WANTED)

    @pytest.fixture
    def tools(self, tmp_path, monkeypatch):
        """A cmake on PATH that notes its arguments and makes a library; `tools(code)` sets its exit code."""
        folder = tmp_path / "bin"
        log = tmp_path / "cmake.log"

        def make(code: int = 0, makes: bool = True, says: str = "") -> Path:
            create = 'mkdir -p "$2/tensorrt" && echo compiled > "$2/tensorrt/libmgvq_plugin.so"'
            place(
                folder,
                "cmake",
                f'#!/bin/sh\necho "{says}"\necho "$@" >> {log}\n'
                f'[ {code} = 0 ] || {{ echo "no such luck" >&2; exit {code}; }}\n'
                + (f'[ "$1" = --build ] && {create}\n' if makes else "")
                + "exit 0\n",
            )
            os.chmod(folder / "cmake", 0o755)
            return log

        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(plugin_library, "missing_tools", list)
        return make

    def prepare(self, bundle, before, out):
        out.mkdir(exist_ok=True)
        return plugin_library.prepare_library(bundle, None, self.WANTED, before, out, SILENT)

    def test_sources_are_compiled_for_the_boards_gpu_once(self, tools, bundle, tmp_path):
        log = tools()
        first = self.prepare(bundle, tmp_path / "none", tmp_path / "one")
        assert (first.origin, first.path.read_text()) == ("compiled", "compiled\n")
        configure, make = log.read_text().splitlines()
        assert configure.startswith(f"-S {bundle.folder / 'plugins'} -B ")
        assert {"-DMGVQ_BUILD_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=87-real"} <= set(configure.split())
        assert "--target mgvq_plugin" in make
        again = self.prepare(bundle, tmp_path / "one", tmp_path / "two")
        assert (again.origin, again.sha256) == ("compiled before", first.sha256)
        third = self.prepare(bundle, tmp_path / "two", tmp_path / "three")
        assert third.origin == "compiled before"
        assert len(log.read_text().splitlines()) == 2

    def test_it_is_compiled_again_when_the_file_the_sources_or_the_board_changed(self, tools, bundle, pieces, tmp_path):
        tools()
        self.prepare(bundle, tmp_path / "none", tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "damaged")
        place(tmp_path, "damaged/libmgvq_plugin.so", "other")
        assert self.prepare(bundle, tmp_path / "damaged", tmp_path / "two").origin == "compiled"
        place(pieces["plugins"], "CMakeLists.txt", "# changed\n")
        changed = write_bundle(pieces, tmp_path / "changed", target=TARGET)
        assert self.prepare(changed, tmp_path / "one", tmp_path / "three").origin == "compiled"
        (tmp_path / "four").mkdir()
        thor = Wanted("aarch64", "110", "10.13.3")
        found = plugin_library.prepare_library(bundle, None, thor, tmp_path / "one", tmp_path / "four", SILENT)
        assert found.origin == "compiled"

    def test_a_failed_compilation_shows_its_end_and_the_command(self, tools, bundle, tmp_path):
        tools(code=3)
        with pytest.raises(
            EnvironmentMismatch, match=r"exit code 3:\nno such luck\nby hand: cmake -S .* && cmake --bu"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_a_build_that_skips_the_plugin_is_named(self, tools, bundle, tmp_path):
        tools(makes=False)
        with pytest.raises(EnvironmentMismatch, match=r"made no libmgvq_plugin.so; .*by hand: cmake"):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_missing_headers_are_named(self, tools, bundle, tmp_path):
        tools(makes=False, says=plugin_library._NO_HEADERS)
        text = (Path(__file__).parents[4] / "plugins" / "tensorrt" / "CMakeLists.txt").read_text()
        assert plugin_library._NO_HEADERS in text, "what CMake says there"
        with pytest.raises(
            EnvironmentMismatch, match="headers were not found; sudo apt install libnvinfer-headers-dev"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    def test_missing_tools_are_named_with_the_command(self, bundle, tmp_path, monkeypatch):
        monkeypatch.setattr(plugin_library, "missing_tools", lambda: ["nvcc of CUDA 12.6 or newer", "cmake 3.20"])
        with pytest.raises(
            EnvironmentMismatch, match=r"missing: nvcc of CUDA 12.6 or newer; cmake 3.20; by hand: cmake"
        ):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")

    @pytest.mark.slow(reason="compiles the plugin")
    def test_the_packages_own_sources_compile_for_an_orin_and_export_two_entries(self, tmp_path, monkeypatch):
        """As on the board, from a bundle's copy of the sources, with this machine's nvcc and any TensorRT's headers."""
        headers = header_folders()[0]
        if missing := missing_tools():
            pytest.skip(f"needs what a board compiles with: {'; '.join(missing)}")
        monkeypatch.setenv("CMAKE_INCLUDE_PATH", str(headers))
        bundle, library = write_bundle(plugin_sources(), tmp_path / "b"), tmp_path / "libmgvq_plugin.so"
        plugin_library.compile_library(bundle, self.WANTED, library, SILENT)
        shown = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        assert [line.split()[1:] for line in shown.stdout.splitlines()] == [
            ["T", "getCreators"],
            ["T", "setLoggerFinder"],
        ]
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "libstdc++" in needed
        assert not re.search(r"NEEDED.*(nvinfer|cuda)", needed), "the CUDA runtime is inside, TensorRT calls it"
        open_bundle(bundle.folder)  # nothing was written into it

    def test_a_bundle_without_sources(self, pieces, tmp_path):
        bundle = write_bundle({k: v for k, v in pieces.items() if k != "plugins"}, tmp_path / "b", target=TARGET)
        with pytest.raises(EnvironmentMismatch, match="has no plugin sources to compile; give --plugin"):
            self.prepare(bundle, tmp_path / "none", tmp_path / "one")
