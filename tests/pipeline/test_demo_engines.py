"""The demo model's bundle for an 8 GB Orin Nano: what a person at the board finds in it, and its engines for PCs.

The bundle is made by the command line, and `mgvq build` builds its three portable graphs from it with TensorRT for
RTX, which needs no GPU. Engines for the board itself are built on the board alone.
"""

from __future__ import annotations

import json
import re

import pytest

from toolchain.bundle.manifest import open_bundle
from toolchain.cli import main
from toolchain.device.generation.limits import limits_from_bundle
from toolchain.device.runtime.selftest import FILE, read_cases
from toolchain.plan.target import load_target


def test_the_bundle_has_what_its_page_says(demo_bundle):
    opened, text = open_bundle(demo_bundle), (demo_bundle / "README.md").read_text(encoding="utf-8")
    memory, target = opened.read_json("memory.json"), opened.read_json("target.json")
    assert target == load_target("orin-nano-8gb").to_json() == opened.manifest["target"]
    for name in re.findall(r"`([\w.-]+/?)`", text.partition("## What the board needs")[0]):
        there = name.rstrip("/")
        assert (demo_bundle / there).exists() or there == "libraries", name  # libraries/ is there if any were given
    for key in ("peak_bytes", "build_peak_bytes", "largest_block_bytes"):
        assert f"{memory[key] / 2**20:,.0f} MiB" in text
    limits = limits_from_bundle(opened, opened.read_json("processor/host.json"))
    assert f"Context: {limits.context_tokens} tokens" in text
    wheel = re.search(r"--no-deps (wheel/\S+\.whl)", text).group(1)
    assert wheel in opened.files


def test_the_plugin_is_proved_on_the_board_for_every_code_of_the_plan(demo_bundle):
    codes = {code for layer in json.loads((demo_bundle / "bitplan.json").read_text())["layers"]
             for code in re.findall(r"\d,\d,\d", layer["code"])}  # fmt: skip
    assert {str(case.code) for case in read_cases(demo_bundle / FILE)} == codes
    sources = {name for name in open_bundle(demo_bundle).files if name.startswith("plugins/")}
    assert {"plugins/CMakeLists.txt", "plugins/tensorrt/plugin.cpp", "plugins/vq_linear/contract.h"} <= sources


@pytest.mark.rtx
@pytest.mark.parametrize("sm", ["86", "89", "120"])
def test_the_portable_engines_are_built_from_the_bundle_by_mgvq_build(demo_bundle, sm, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (pip install tensorrt-rtx-cu13)")
    out = tmp_path / "engines"
    command = ["build", demo_bundle, "--backend", "tensorrt_rtx", "--sm", sm, "--no-dense", "--format", "json"]
    assert main([str(word) for word in [*command, "-o", out]]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {engine["graph"]: engine["bytes"] for engine in found["engines"]}
    with capsys.disabled():
        print(f"\ndemo bundle, TensorRT for RTX {found['builder_version']}, SM{sm}, engine bytes: {sizes}")
    assert set(sizes) == {"vision", "embed", "decoder"}
    assert {name: (out / f"{name}.engine").stat().st_size for name in sizes} == sizes
    assert min(sizes.values()) > 0
    assert json.loads((out / "build.json").read_text())["sm"] == sm
    assert found["bundle"] == open_bundle(demo_bundle).manifest["manifest_sha256"]
