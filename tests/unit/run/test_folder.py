"""Stages are reused exactly when nothing that goes into them and nothing that came out has changed."""

from __future__ import annotations

import json

import pytest

from toolchain.errors import InputDataError, NumericGateError, UsageError
from toolchain.run.folder import RunFolder


def write(text):
    def work(folder):
        folder.mkdir()
        (folder / "out.txt").write_text(text)
        return {"text": text}

    return work


def run(folder, *stages, resume="auto"):
    with RunFolder(folder, "mgvq test", resume) as found:
        return [found.stage(name, inputs, write(str(inputs))) for name, inputs in stages]


def test_reused_when_nothing_changed(tmp_path):
    stages = (("10-a", {"x": 1}), ("20-b", {"y": 1}))
    assert [s.reused for s in run(tmp_path / "r", *stages)] == [False, False]
    assert [s.reused for s in run(tmp_path / "r", *stages)] == [True, True]


def test_a_change_reaches_every_later_stage(tmp_path):
    run(tmp_path / "r", ("10-a", {"x": 1}), ("20-b", {"y": 1}))
    assert [s.reused for s in run(tmp_path / "r", ("10-a", {"x": 2}), ("20-b", {"y": 1}))] == [False, False]
    assert [s.reused for s in run(tmp_path / "r", ("10-a", {"x": 2}), ("20-b", {"y": 2}))] == [True, False]


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_outputs_are_made_again(tmp_path, damage):
    (stage,) = run(tmp_path / "r", ("10-a", {}))
    file = stage.folder / "out.txt"
    file.write_text("other") if damage == "changed" else file.unlink()
    (again,) = run(tmp_path / "r", ("10-a", {}))
    assert not again.reused
    assert file.read_text() == "{}"


def test_a_failing_stage_leaves_nothing_and_run_json_says_so(tmp_path):
    def work(folder):
        folder.mkdir()
        raise InputDataError("broken")

    with pytest.raises(InputDataError), RunFolder(tmp_path / "r", "mgvq test") as found:
        found.stage("10-a", {}, work)
    assert list((tmp_path / "r" / "stages").iterdir()) == []
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["status"], record["exit_code"], record["error"]) == ("failed", 7, "broken")


def test_a_failed_gate_keeps_its_evidence_apart(tmp_path):
    def work(folder):
        folder.mkdir()
        (folder / "validation.json").write_text("{}")
        raise NumericGateError("decoder/logits is off")

    words = r"logits is off; everything compared is in .*50-v\.failed"
    with pytest.raises(NumericGateError, match=words), RunFolder(tmp_path / "r", "mgvq test") as found:
        found.stage("50-v", {}, work)
    assert (tmp_path / "r" / "stages" / "50-v.failed" / "validation.json").is_file()
    assert not (tmp_path / "r" / "stages" / "50-v").exists()


def test_foreign_folders_are_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder(tmp_path, "mgvq test")
    with pytest.raises(InputDataError, match="no run to resume"):
        RunFolder(tmp_path / "new", "mgvq test", resume="required")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
