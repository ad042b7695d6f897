"""The plugin library over the emulated kernels, driven without libnvinfer: every check of the host program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from plugin_headers import PLUGINS, header_folders

ROOT = PLUGINS.parent


@pytest.mark.slow(reason="compiles the plugin with its host program")
def test_the_host_program_passes_against_each_set_of_headers(tmp_path):
    folders = header_folders()
    if shutil.which("cmake") is None or (shutil.which("c++") or shutil.which("g++")) is None:
        pytest.skip("no cmake or no C++ compiler")
    for folder in folders:
        options = ["-DMGVQ_BUILD_CUDA=OFF", f"-DTENSORRT_INCLUDE_DIR={folder}"]
        targets = ["plugin_check", "mgvq_plugin_emulated", "plugin_core_check"]
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options],
            ["cmake", "--build", str(tmp_path), "--parallel", str(os.cpu_count() or 1), "--target", *targets],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        # Exports too: every test of ctest whose name begins with plugin.
        command = ["ctest", "--test-dir", str(tmp_path), "-R", "^plugin", "--output-on-failure", "--no-tests=error"]
        done = subprocess.run([*command, "-V"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
        assert re.search(r"[1-9]\d* checks, 0 failed", done.stdout), folder
        assert "plugin_on_emulator" in done.stdout
        assert "plugin_emulated_exports" in done.stdout
