"""Building: what is missing is said in words, the architectures are the boards', and a failed build leaves nothing."""

from __future__ import annotations

import re
import shutil

import pytest
from kernel_problems import PLUGINS

from toolchain.cli import main
from toolchain.errors import EnvironmentMismatch
from toolchain.native import build, library
from toolchain.plan.target import list_targets, load_target


def test_sources_are_found_in_the_checkout():
    assert build.kernel_sources().resolve() == PLUGINS


def test_an_installation_without_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SOURCE_FOLDERS", (tmp_path / "_plugins", tmp_path / "plugins"))
    with pytest.raises(EnvironmentMismatch, match="install mgvq from its wheel or work in a checkout"):
        build.kernel_sources()


def test_every_boards_architecture_is_compiled():
    text = (PLUGINS / "cmake" / "architectures.cmake").read_text(encoding="utf-8")
    listed = re.search(r"set\(MGVQ_ARCHITECTURES (.*)\)", text).group(1).split()
    assert {load_target(name).sm for name in list_targets()} <= set(listed)
    assert {"80", "86", "89", "90a", "120"} <= set(listed)


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)


def test_missing_tools_are_named_with_what_brings_them(no_nvcc, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "cmake_version", lambda: (3, 16, 0))
    missing = " | ".join(build.missing_tools())
    for words in ("nvcc of CUDA 12.6", "cmake 3.20 or newer, found 3.16.0 (pip install cmake)", "a C++17 compiler"):
        assert words in missing


def test_an_old_nvcc_and_a_bare_one_are_refused(tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.2, V12.2.140\n")
    nvcc.chmod(0o755)
    assert any("found 12.2" in words for words in build.missing_tools())
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert any("found none that runs" in words for words in build.missing_tools())


def test_the_verb_ends_with_the_environments_exit_code(no_nvcc, capsys, tmp_path):
    assert main(["kernels", "build", "-o", str(tmp_path / "out")]) == 6
    error = capsys.readouterr().err
    assert "the kernels cannot be built here; missing: nvcc" in error
    assert not list(tmp_path.iterdir())


def test_a_failing_build_shows_its_last_words_and_leaves_no_library(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.20)\nmessage(FATAL_ERROR "no such thing")\n'
    )
    monkeypatch.setattr(build, "SOURCE_FOLDERS", (sources,))
    monkeypatch.setattr(build, "missing_tools", list)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    with pytest.raises(EnvironmentMismatch, match=r"cmake -S failed with exit code 1:(.|\n)*no such thing"):
        build.build_library(tmp_path / "out", ("80",))
    assert not (tmp_path / "out" / library.FILE_NAME).exists()
