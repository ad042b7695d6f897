"""The compile script: versions are read from both kinds of headers, failures are shown and end with 1, and our sources
compile against every set of TensorRT's headers that the environment names.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest
from plugin_headers import PLUGINS, header_folders

PLAIN = "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n"
NAMED = (
    "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n#define TRT_PATCH_ENTERPRISE 4\n"
    "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n"
    "#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n#define NV_TENSORRT_PATCH TRT_PATCH_ENTERPRISE\n"
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_plugin", PLUGINS / "compile_plugin.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_plugin"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compile_plugin"]


@pytest.fixture
def headers(tmp_path):
    """A folder that says it is TensorRT 10.3.0, and one with the CUDA header that the script looks for."""
    folder, cuda = tmp_path / "include", tmp_path / "cuda"
    folder.mkdir()
    cuda.mkdir()
    (folder / "NvInferVersion.h").write_text(PLAIN)
    (cuda / "cuda_runtime_api.h").write_text("")
    return folder, cuda


def compiler(tmp_path, body: str) -> str:
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("text", "version"), [(PLAIN, "10.3.0"), (NAMED, "11.1.4")])
def test_the_version_is_the_headers_own(script, tmp_path, text, version):
    (tmp_path / "NvInferVersion.h").write_text(text)
    assert script.header_version(tmp_path) == version


def test_every_source_is_compiled_with_warnings_as_errors(script, headers, tmp_path, capsys):
    folder, cuda = headers
    log = tmp_path / "log"
    fake = compiler(tmp_path, f'echo "$@" >> {log}')
    assert script.main([str(folder), "--cuda-include", str(cuda), "--compiler", fake]) == 0
    calls = log.read_text().splitlines()
    sources = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
    assert len(calls) == len(sources) > 0
    for call, source in zip(calls, sources):
        assert str(source) in call.split()
        assert {"-Wall", "-Wextra", "-Werror", str(folder), str(cuda)} <= set(call.split())
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:2] == ["10.3.0", "ok"]
    assert row[3] == str(folder)


def test_a_failure_shows_the_compilers_words_and_ends_with_1(script, headers, tmp_path, capsys):
    folder, cuda = headers
    fake = compiler(tmp_path, "echo 'plugin.cpp:1: error: no such thing' >&2; exit 1")
    assert script.main([str(folder), "--cuda-include", str(cuda), "--compiler", fake]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "no such thing" in said.err


def test_a_folder_without_headers_and_a_missing_cuda_are_said(script, headers, tmp_path, capsys):
    folder, cuda = headers
    assert script.main([str(tmp_path / "nowhere"), "--cuda-include", str(cuda)]) == 1
    assert "found no NvInferVersion.h" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        script.main([str(folder), "--cuda-include", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "name it with --cuda-include" in capsys.readouterr().err


def test_the_shell_compiles_against_each_set_of_headers(script, capsys):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folders = header_folders()
    if not any(script.Path(place, "cuda_runtime_api.h").is_file() for place in script.CUDA_PLACES):
        pytest.skip(f"no CUDA headers in {' or '.join(script.CUDA_PLACES)}")
    assert script.main([*map(str, folders)]) == 0, capsys.readouterr().err
