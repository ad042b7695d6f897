"""A build on a board, as far as it can be shown without one: every refusal and the order of steps on a simulated one
(simulated_builder.py). The same code builds for real with TensorRT for RTX in test_engine.py.
"""

from __future__ import annotations

import json

import pytest
from board_bundles import MIB, ORIN, PLAN, ROOM, TARGET, place, wrong_plugin
from simulated_cuda import SimulatedCuda, Status

from toolchain.bundle.manifest import open_bundle, write_bundle
from toolchain.cli import main
from toolchain.device.engines import build as engine
from toolchain.device.engines import engine_check
from toolchain.device.engines.build import BuildOptions, Machine
from toolchain.device.engines.compare import TapError, ValidationReport
from toolchain.device.runtime import plugin_library, selftest
from toolchain.device.runtime.board import Board, Memory
from toolchain.errors import (
    BudgetError,
    EnvironmentMismatch,
    InputDataError,
    NumericGateError,
    UnsupportedError,
    UsageError,
)
from toolchain.files.folders import sha256_file


@pytest.fixture
def bundle(board_bundle):
    return board_bundle


def build(bundle, out, given, machine=None, **more):
    machine = machine or Machine(board=lambda: ORIN, memory=lambda: ROOM)
    return engine.build_engines(bundle, out, "tensorrt", BuildOptions(plugin_library=given, **more), machine=machine)


class TestOrder:
    def test_self_test_first_then_engines_and_everything_is_written_down(self, simulated, bundle, given, tmp_path):
        board = simulated()
        report = build(bundle, tmp_path / "e", given)
        assert board.events == ["load libmgvq_plugin.so", "build selftest", "build decoder", "build vision"]
        written = json.loads((tmp_path / "e" / "build.json").read_text())
        assert written == json.loads(json.dumps(report.to_json()))
        assert written["plugin"] == {
            "file": "libmgvq_plugin.so", "sha256": sha256_file(given), "origin": "given",
        }  # fmt: skip
        assert (written["sm"], written["device"]["l4t"]) == ("87", "36.4.3")
        assert [(e["graph"], e["plugin_layers"], e["profiles"]) for e in written["engines"]] == [
            ("decoder", 1, 2),
            ("vision", 2, 1),
        ]
        assert written["selftest_cases"] == 8
        assert all(config.pools == {"workspace": 256 * MIB, "tactic": 3_400_000_000} for config in board.configs)
        names = ["build.json", "decoder.engine", "libmgvq_plugin.so", "timing-tensorrt-10.3.0-sm87.cache"]
        assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [*names, "vision.engine"]
        assert not board.cuda.sizes.keys() - set(), "the self-test gave its memory back"

    def test_the_timing_cache_is_used_again_unless_it_is_another_devices(self, simulated, bundle, given, tmp_path):
        first = simulated()
        build(bundle, tmp_path / "e", given)
        cache = tmp_path / "e" / "timing-tensorrt-10.3.0-sm87.cache"
        assert cache.read_bytes() == b"+selftest+decoder+vision"
        second = simulated()
        report = build(bundle, tmp_path / "e", given)
        assert first.configs[0].offered == [b""]
        assert second.configs[0].offered == [b"+selftest+decoder+vision"]
        assert report.timing_cache["bytes_before"] == 24
        cache.write_bytes(b"other device's")
        third = simulated()
        build(bundle, tmp_path / "e", given)
        assert third.configs[0].offered == [b"other device's", b""]

    def test_a_library_that_was_compiled_and_proved_stays_when_the_rest_fails(
        self, simulated, bundle, pieces, tmp_path, monkeypatch
    ):
        """Minutes on a board: the next build, with less of something, does not compile it again."""
        compiled = []

        def compile_library(bundle, wanted, out, progress):
            compiled.append(wanted.sm)
            out.write_text("compiled")

        monkeypatch.setattr(plugin_library, "compile_library", compile_library)
        simulated()
        place(pieces["device"], "vision.onnx", json.dumps({"plugins": ["a"], "others": []}))
        broken = write_bundle(pieces, tmp_path / "b", target=TARGET)
        with pytest.raises(EnvironmentMismatch, match="made 1"):
            build(broken, tmp_path / "e", None)
        assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["libmgvq_plugin.so", "plugin.json"]
        simulated()
        assert build(bundle, tmp_path / "e", None).plugin["origin"] == "compiled before"
        simulated(plugin_answer=wrong_plugin)
        with pytest.raises(NumericGateError):
            build(bundle, tmp_path / "f", None)
        assert not (tmp_path / "f").exists(), "one that computes something else does not stay"
        assert compiled == ["87", "87"]

    def test_checks_come_before_any_work(self, simulated, bundle, given, tmp_path):
        board = simulated()
        poor = Memory(MIB, None, None)
        both = Machine(board=lambda: Board(**{**vars(ORIN), "l4t": None}), memory=lambda: poor)
        with pytest.raises(EnvironmentMismatch, match="no Jetson"):  # before memory
            build(bundle, tmp_path / "e", given, both)
        with pytest.raises(BudgetError, match="building takes"):  # before plugins
            build(bundle, tmp_path / "e", None, Machine(board=lambda: ORIN, memory=lambda: poor))
        assert board.events == []
        assert not (tmp_path / "e").exists()

    def test_memory_may_be_ignored_and_build_json_says_so(self, simulated, bundle, given, tmp_path):
        simulated()
        tight = Machine(board=lambda: ORIN, memory=lambda: Memory(400 * MIB, None, None))
        report = build(bundle, tmp_path / "e", given, tight, ignore_memory=True)
        assert "memory was not checked (--ignore-memory)" in report.warnings
        assert report.lowest_available_bytes == 400 * MIB

    def test_a_flipped_byte_of_the_self_test_is_the_bundles_fault(self, pieces, tmp_path, bundle):
        path = bundle.path(selftest.FILE)
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
        with pytest.raises(InputDataError, match=r"selftest.safetensors: expected hash"):
            open_bundle(tmp_path / "bundle")


class TestPluginRefusals:
    def refused(self, kind, words, bundle, out, given, code):
        with pytest.raises(kind, match=words) as caught:
            build(bundle, out, given)
        assert caught.value.exit_code == code
        assert not out.exists()

    def test_a_library_that_does_not_load(self, simulated, bundle, given, tmp_path):
        simulated(loads=False)
        self.refused(EnvironmentMismatch, "does not load .*against this TensorRT", bundle, tmp_path / "e", given, 6)

    def test_a_process_that_has_our_plugins_already(self, simulated, bundle, given, tmp_path):
        """Not the library's fault, and nothing that another compilation would mend."""
        board = simulated()
        build(bundle, tmp_path / "first", given)
        words = "this process has registered VQLinear already, and TensorRT keeps the first.*new process"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)
        assert "build decoder" not in board.events[board.events.index("build vision") :]

    def test_a_library_without_our_creators(self, simulated, bundle, given, tmp_path):
        simulated(creators=("VQLinear",))
        words = "expected creators of VQEmbedding, version 1, empty namespace"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)

    def test_a_library_that_computes_something_else(self, simulated, bundle, given, tmp_path):
        board = simulated(plugin_answer=wrong_plugin)
        words = r"self-test VQLinear/2,4,8/5: the plugin gives .* expected .* \(1000 of 1000 differ\)"
        self.refused(NumericGateError, words, bundle, tmp_path / "e", given, 4)
        assert "build decoder" not in board.events

    def test_a_library_that_is_not_there(self, simulated, bundle, tmp_path):
        simulated()
        self.refused(InputDataError, "x.so does not exist", bundle, tmp_path / "e", tmp_path / "x.so", 7)

    def test_cuda_without_driver(self, simulated, bundle, given, tmp_path, monkeypatch):
        monkeypatch.setattr(plugin_library, "compile_library", lambda *_: pytest.fail("compiled for nothing"))
        simulated(cuda=SimulatedCuda(driver=Status.cudaErrorInsufficientDriver))
        words = "CUDA does not start: cudaStreamCreate: CUDA error 35 .cudaErrorInsufficientDriver"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)
        # Before the plugin is compiled, which takes minutes.
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", None, 6)

    def test_types_that_are_probed_are_no_warnings_and_are_shown_where_a_build_fails(
        self, simulated, bundle, given, tmp_path
    ):
        probe = "mgvq: VQLinear a: x: expected float16 or float32, found int8"
        simulated(probes=(probe, probe))
        assert not [text for text in build(bundle, tmp_path / "f", given).warnings if "mgvq: " in text]
        simulated(probes=(probe, probe), fails="decoder")
        words = f"graph decoder: tensorrt parsed it and could not build it: no implementation; {probe}$"
        self.refused(InputDataError, words, bundle, tmp_path / "e", given, 7)

    def test_a_body_that_won_the_parsers_choice(self, simulated, pieces, given, tmp_path):
        board = simulated()
        place(pieces["device"], "vision.onnx", json.dumps({"plugins": ["a"], "others": ["b/gather", "b/matmul"]}))
        bundle = write_bundle(pieces, tmp_path / "b", target=TARGET)
        words = "graph vision: expected 2 plugin layers, one a VQ node, TensorRT 10.3.0 made 1"
        self.refused(EnvironmentMismatch, words, bundle, tmp_path / "e", given, 6)
        assert "build vision" not in board.events, "refused as soon as it is parsed, minutes before it is built"

    def test_a_layer_that_the_engine_does_not_name_is_a_warning(self, simulated, bundle, given, tmp_path):
        """From SM 100 on TensorRT may take a plugin into a larger layer, which bears another name."""
        simulated(dropped=("b",))
        report = build(bundle, tmp_path / "e", given)
        words = "graph vision: the engine names 1 of 2 plugin layers, not b: TensorRT made them part of others"
        assert [text for text in report.warnings if "plugin" in text] == [words + "; a profile shows them there"]
        assert report.engines[1].plugin_layers == 2

    def test_a_rewrite_report_that_is_none(self, simulated, pieces, given, tmp_path):
        simulated()
        place(pieces["device"], "rewrite.json", '{"graphs": [{}]}')
        bundle = write_bundle(pieces, tmp_path / "b", target=TARGET)
        self.refused(InputDataError, "expected name and vq_nodes of every graph", bundle, tmp_path / "e", given, 7)


class TestCheck:
    """Whether and when engines are compared with stored calls; how: tests/pipeline/test_engine_check.py."""

    @pytest.fixture
    def answering(self, pieces, tmp_path, monkeypatch):
        """A bundle with a stored call; `answering(error)` makes engines answer it with that error, of 0.01 allowed."""
        index = {"source": "pytorch-quantized", "calls": [{"step": "bucket1.0.prefill", "graph": "decoder"}]}
        place(tmp_path, "reference/reference.json", json.dumps(index))
        bundle = write_bundle(pieces | {"reference": tmp_path / "reference"}, tmp_path / "b", target=TARGET)
        asked = []

        def answer(relative: float):
            tap = TapError("decoder", "logits", "bucket1.0.prefill", 1, relative, relative, 0.01)
            report = ValidationReport("pytorch-quantized", "engines", (tap,))
            monkeypatch.setattr(
                engine_check, "check_engines", lambda b, engines, cuda: asked.append(sorted(engines)) or report
            )
            return bundle, asked

        return answer

    def test_engines_are_compared_and_build_json_has_the_figures(self, simulated, answering, given, tmp_path):
        simulated()
        bundle, asked = answering(0.002)
        report = build(bundle, tmp_path / "e", given)
        assert asked == [["decoder", "vision"]]
        written = json.loads((tmp_path / "e" / "build.json").read_text())
        assert written == json.loads(json.dumps(report.to_json()))
        assert written["check"]["worst"] == "decoder/logits"
        assert (written["check"]["relative_error"], written["check"]["allowed"]) == (0.002, 0.01)

    def test_an_engine_that_is_off_is_exit_4_and_nothing_is_left(self, simulated, answering, given, tmp_path):
        simulated()
        bundle, _ = answering(0.02)
        words = "engines against pytorch-quantized: first tap beyond its budget is decoder/logits"
        with pytest.raises(NumericGateError, match=words) as caught:
            build(bundle, tmp_path / "e", given)
        assert caught.value.exit_code == 4
        assert not (tmp_path / "e").exists()

    def test_memory_for_the_comparison_is_asked_for_before_the_build(
        self, simulated, answering, pieces, given, tmp_path
    ):
        board = simulated()
        answering(0.002)
        place(tmp_path / "source", "memory.json", json.dumps(PLAN | {"peak_bytes": 7000 * MIB}))
        bundle = write_bundle(pieces | {"reference": tmp_path / "reference"}, tmp_path / "larger", target=TARGET)
        with pytest.raises(BudgetError, match=r"comparing the engines .* takes about 7,000 MiB"):
            build(bundle, tmp_path / "e", given)
        assert board.events == []
        assert build(bundle, tmp_path / "e", given, check=False).check is None

    def test_without_a_check_or_calls_build_json_says_so(self, simulated, answering, bundle, given, tmp_path):
        simulated()
        checked, asked = answering(0.02)
        report = build(checked, tmp_path / "e", given, check=False)
        assert "engines were not compared: --no-check" in report.warnings
        assert (asked, report.check) == ([], None)
        simulated()
        report = build(bundle, tmp_path / "f", given)
        assert "engines were not compared: the bundle stores no calls" in report.warnings

    def test_the_verb_prints_the_comparison(self, simulated, answering, given, tmp_path, monkeypatch, capsys):
        simulated()
        bundle, _ = answering(0.002)
        monkeypatch.setattr(engine, "Machine", lambda: Machine(board=lambda: ORIN, memory=lambda: ROOM))
        assert main(["build", str(bundle.folder), "-o", str(tmp_path / "e"), "--plugin", str(given)]) == 0
        captured = capsys.readouterr()
        words = "compared 1 calls with pytorch-quantized: worst decoder/logits, 2.0e-03 of 1.0e-02 allowed"
        assert words in captured.out
        assert "engines: compared with the stored answers of the model" in captured.err

    def test_a_workstations_engines_are_not_compared(self, tmp_path, bundle):
        with pytest.raises(UsageError, match="compares no engines"):
            engine.build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(check=False))


class TestVerb:
    """`mgvq build` on the simulated board: the exit codes of DESIGN section 8, and what it prints."""

    LOW = Memory(400 * MIB, None, None)
    SMALL_POOL = Memory(6000 * MIB, 64 * MIB, 64 * MIB)

    def run(self, monkeypatch, bundle, given, out, board=ORIN, memory=ROOM, *flags):
        monkeypatch.setattr(engine, "Machine", lambda: Machine(board=lambda: board, memory=lambda: memory))
        return main(["build", str(bundle.folder), "-o", str(out), "--plugin", str(given), *flags])

    def test_a_board_builds_and_says_what_is_next(self, simulated, bundle, given, tmp_path, monkeypatch, capsys):
        simulated()
        assert self.run(monkeypatch, bundle, given, tmp_path / "e") == 0
        captured = capsys.readouterr()
        assert "plugins: 8 self-test cases" in captured.err
        rows = [line.split() for line in captured.out.splitlines() if line.startswith(("decoder ", "vision "))]
        assert {row[0]: row[-2] for row in rows} == {"decoder": "1", "vision": "2"}, "one plugin layer a VQ node"
        assert f"--backend tensorrt --engines {tmp_path / 'e'}" in captured.out.splitlines()[-1]

    @pytest.mark.parametrize(
        ("changes", "machine", "code", "words"),
        [
            ({"plugin_answer": wrong_plugin}, {}, 4, "self-test VQLinear/2,4,8/5: the plugin gives"),
            ({}, {"memory": LOW}, 5, "building takes about 3,000 MiB, 400 MiB are available; stop the desktop"),
            ({}, {"memory": SMALL_POOL}, 5, "logits: one block of 100 MiB is wanted, the kernel's contiguous pool is"),
            ({}, {"board": Board("x86_64", None, None, None, None)}, 6, "this is no Jetson"),
            ({"version": "10.9.0"}, {}, 6, "TensorRT 10.9.0 is not 10.3"),
            ({"loads": False}, {}, 6, "does not load"),
            ({"cuda": SimulatedCuda(driver=Status.cudaErrorInsufficientDriver)}, {}, 6, "CUDA does not start"),
        ],
        ids=["self-test", "memory", "largest block", "no Jetson", "TensorRT", "library", "CUDA"],
    )
    def test_a_refusal_is_an_exit_code_and_one_line(
        self, simulated, bundle, given, tmp_path, monkeypatch, capsys, changes, machine, code, words
    ):
        simulated(**changes)
        assert self.run(monkeypatch, bundle, given, tmp_path / "e", **machine) == code
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
        assert not (tmp_path / "e").exists()

    def test_a_changed_file_of_the_bundle(self, simulated, bundle, given, tmp_path, monkeypatch, capsys):
        simulated()
        path = bundle.path("device/vision.onnx")
        path.write_bytes(path.read_bytes()[:-1] + b" ")
        assert self.run(monkeypatch, bundle, given, tmp_path / "e") == 7
        assert "device/vision.onnx: expected hash" in capsys.readouterr().err

    def test_memory_may_be_ignored(self, simulated, bundle, given, tmp_path, monkeypatch, capsys):
        simulated()
        assert self.run(monkeypatch, bundle, given, tmp_path / "e", ORIN, self.LOW, "--ignore-memory") == 0
        assert "warning: memory was not checked (--ignore-memory)" in capsys.readouterr().out


def test_rtx_has_no_plugin_library(tmp_path, bundle):
    with pytest.raises(UnsupportedError, match="use one of tensorrt, tensorrt_rtx"):
        engine.bundle_graphs(bundle, "onnx")
