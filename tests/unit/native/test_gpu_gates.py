"""The one command for a machine with a GPU: its steps, their verdicts, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import os
import sys

import pytest
from kernel_problems import PLUGINS

sys.path.insert(0, str(PLUGINS))
import gpu_gates
from gpu_gates import Step

OK, BAD = (sys.executable, "-c", "print('fine')"), (sys.executable, "-c", "raise SystemExit(3)")


def test_every_gate_has_its_step(tmp_path):
    found = {step.name: " ".join(step.command) for step in gpu_gates.steps(tmp_path, "90")}
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in found["configure"]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert f"--tool {tool} " in found[f"sanitizer-{tool}"]
        assert found[f"sanitizer-{tool}"].endswith("kernels_check_gpu cuda")
    assert "-m gpu" in found["pytest"]
    assert found["bench"].endswith(f"bench kernels --gates -o {tmp_path / 'bench-1'}")
    (tmp_path / "bench-1").mkdir()
    assert gpu_gates.steps(tmp_path, "90")[-1].command[-1] == str(tmp_path / "bench-2")
    assert "=87-real" in gpu_gates.steps(tmp_path, "87")[0].command[-1]


def test_verdicts_are_kept_and_only_what_did_not_pass_runs_again(tmp_path, capsys):
    wanted = [Step("one", OK), Step("two", BAD), Step("three", OK, ("no-such-program",))]
    found = gpu_gates.run_all(wanted, tmp_path, (), dict(os.environ))
    assert [one["exit_code"] for one in found.values()] == [0, 3, None]
    assert json.loads((tmp_path / "gates.json").read_text()) == found
    assert (tmp_path / "one.log").read_text() == "fine\n"
    assert "three: NOT RUN in 0.0 s no-such-program was not found" in capsys.readouterr().out
    assert gpu_gates.exit_code(wanted, found) == 4
    gpu_gates.run_all([Step("one", BAD), Step("two", OK)], tmp_path, (), dict(os.environ))
    assert "one: passed before\ntwo: passed" in capsys.readouterr().out
    gpu_gates.run_all([Step("one", BAD)], tmp_path, ("one",), dict(os.environ))
    assert "one: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(("codes", "expected"), [([0, 0], 0), ([0, None], 6), ([None, 1], 4)])
def test_what_could_not_run_is_not_what_failed(codes, expected):
    wanted = [Step(str(i), OK) for i in range(len(codes))]
    assert gpu_gates.exit_code(wanted, {str(i): {"exit_code": code} for i, code in enumerate(codes)}) == expected


def test_without_a_gpu_nothing_is_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_gates, "capability_of_the_gpu", lambda: None)
    assert gpu_gates.main(["-o", str(tmp_path / "gates")]) == 6
    assert "finds no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert gpu_gates.main(["--list"]) == 0
    assert "compute-sanitizer" in capsys.readouterr().out
    monkeypatch.setattr(gpu_gates, "capability_of_the_gpu", lambda: "90")
    assert gpu_gates.main(["--only", "benches", "-o", str(tmp_path)]) == 2
    assert "no such step: benches; expected some of configure" in capsys.readouterr().err
