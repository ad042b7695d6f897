"""`mgvq bench quantize`: what stdout, the folder and the exit code carry."""

from __future__ import annotations

import json

import pytest
import torch

from toolchain.cli import main
from toolchain.cli.bench import duration

SMALL = ["bench", "quantize", "--shapes", "demo", "--groups", "o", "--tokens", "64"]
CUT = [*SMALL, "--rows", "0.5", "--columns", "0.2"]


@pytest.fixture
def bench(capsys):
    """`bench(*arguments)`: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_json_goes_to_stdout_and_to_the_folder(bench, tmp_path):
    code, out, error = bench(*CUT, "--code", "4,8,8", "--format", "json", "-o", tmp_path / "found")
    assert code == 0, error
    found = json.loads(out)
    assert found == json.loads((tmp_path / "found" / "bench-quantize.json").read_text())
    assert found["groups"][0]["quantized_rows"] == [128]
    assert found["groups"][0]["quantized_columns"] == 48
    assert found["request"]["codes"] == ["4,8,8"]
    assert {row["decoder_seconds"] for row in found["rows"]} == {None}
    assert "quantizing layers of demo" in error


def test_text_says_what_is_extrapolated_and_what_is_not(bench):
    code, out, _ = bench(*CUT, "--parts", "sweep,factor", "--no-peers")
    assert code == 0
    for words in (
        "demo, 8 blocks, on ",
        "o cut to 128x48",
        "extrapolated: nothing",
        "factor (in sweep)",
        "not in it: ",
    ):
        assert words in out
    assert "gptq" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--shapes", "qwen2"], 3, "use one of demo, qwen2-vl-2b, qwen2-vl-7b, llava-onevision-7b, internvl2-8b"),
        (["--layers", "0"], 2, "Invalid value for '--layers'"),
        (["--layers", "9"], 2, "expected 1 to 8, the blocks of demo"),
        (["--groups", "kv"], 2, "expected some of qkv,o,gate_up,down"),
        (["--parts", ""], 2, "expected some of statistics"),
        (["--rows", "2"], 2, "expected a share above 0 and at most 1"),
        (["--code", "2,9,9"], 3, "expected V in (2, 4)"),
        (["--device", "cuda"], 6, "finds no CUDA device"),
    ],
)
def test_refusals_leave_nothing_behind(bench, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, out, error = bench(*SMALL, *arguments, "-o", tmp_path / "found")
    assert (found, out) == (code, ""), error
    assert words in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_durations_are_in_the_unit_a_reader_wants():
    assert [duration(s) for s in (1.234, 119, 150, 7200)] == ["1.23 s", "119.00 s", "2.5 min", "2.0 h"]
