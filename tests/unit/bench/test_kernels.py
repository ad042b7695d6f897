"""bench kernels: what is refused before any work, and on a GPU a run of one small shape."""

from __future__ import annotations

import json

import pytest
import torch

from toolchain.bench import kernels
from toolchain.bench.kernel_gates import gates
from toolchain.bench.kernels import KernelRequest, bench_kernels, check_request
from toolchain.bench.shapes import matrix_shapes
from toolchain.cli import main
from toolchain.cli.bench import kernels_text
from toolchain.errors import NumericGateError, UnsupportedError, UsageError
from toolchain.native.library import find_library
from toolchain.values import CODES


def test_every_shape_is_timed_once():
    request = KernelRequest(shapes=("qwen2-vl-7b", "llava-onevision-7b"), groups=("o", "head"))
    assert check_request(request) == [
        ("qwen2-vl-7b", "o", (3584, 3584)),
        ("qwen2-vl-7b", "head", (152064, 3584)),
    ]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"groups": ("kv",)}, UsageError, "expected some of qkv,o,gate_up,down,head,vision.patch"),
        ({"shapes": ("qwen",)}, UnsupportedError, "use one of demo"),
        ({"codes": ("2,4",)}, UnsupportedError, "expected three integers"),
        ({"rounds": 6}, UsageError, "expected at least 7, of which 2 are dropped"),
        ({"tokens": (0,)}, UsageError, "at least 1 each"),
        ({"shapes": (), "decoders": ()}, UsageError, "nothing to time"),
    ],
)
def test_requests_that_ask_for_nothing_there_is(change, kind, words):
    with pytest.raises(kind, match=words):
        check_request(KernelRequest(**change))


def test_without_a_gpu_it_is_the_environment_that_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "-o", str(tmp_path / "found")]) == 6
    captured = capsys.readouterr()
    assert "finds no CUDA device" in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())
    assert main(["bench", "kernels", "--tokens", "1,x"]) == 2


def test_text_holds_every_table():
    row = {
        "group": "m o",
        "rows": 128,
        "columns": 16,
        "code": "2,4,8",
        "tokens": 1,
        "seconds": 1e-5,
        "mad_seconds": 0.0,
        "dense_seconds": 3e-5,
        "dense_mad_seconds": 0.0,
        "speedup": 3.0,
        "packed_bytes": 1000,
        "packed_bytes_per_s": 1e8,
        "roof_share": 0.5,
        "index_bytes_per_sm_clock": None,
    }
    decoder = {"decoder": "m", "code": "2,4,8", "context": 9, "tokens_per_s": 2.0, "dense_tokens_per_s": 1.0}
    machine = {"name": "some GPU", "power_limit": None, "cuda": "13.0", "torch": "2.13"}
    roof = {"read_bytes_per_s": 3e12, "multiprocessors": 7, "clock_hz": 1.98e9}
    result = {"machine": machine, "roof": roof, "rows": [row], "resident": [], "decoders": [decoder | {"speedup": 2.0}]}
    result["gates"] = gates(result)
    text = kernels_text(result)
    for words in ("some GPU, 7 SMs, clock 1980 MHz under load", "reads 3000 GB/s", "128x16", "50%", "fp16 tokens/s"):
        assert words in text
    assert "resident" not in text
    assert "clock not known" in kernels_text(result | {"roof": roof | {"clock_hz": None}, "resident": [row]})


def test_shapes_of_whole_models_by_hand():
    shapes = matrix_shapes("qwen2-vl-2b")
    assert shapes["qkv"] == (2048, 1536)
    assert shapes["gate_up"] == (17920, 1536)
    assert shapes["head"] == (151936, 1536)
    assert shapes["vision.qkv"] == (3840, 1280)
    assert shapes["projector.1"] == (5120, 5120)
    assert shapes["projector.2"] == (1536, 5120)
    assert matrix_shapes("internvl2-8b")["projector.1"] == (4096, 4096)
    assert matrix_shapes("llava-onevision-7b")["projector.1"] == (3584, 1152)
    assert "vision.qkv" not in matrix_shapes("demo")


@pytest.mark.parametrize("code", ["2,4,8", "4,8,9"])
def test_a_product_is_checked_before_it_is_timed(monkeypatch, code):
    monkeypatch.setattr(kernels, "CHECKED_ROWS", 128)
    case = kernels.Case((300, 40), CODES[code], 40, 0, torch.device("cpu"))
    (codes,) = case.codes(1)
    case.check(codes)
    right = case.ours

    def wrong(codes):
        y = right(codes)
        y[39, 299] *= 1.01
        return y

    case.ours = wrong
    with pytest.raises(NumericGateError, match=f"300x40 in code {code} with 40 tokens: the kernel's product differs"):
        case.check(codes)


class MadeUpGraph:
    """Runs each call once, and says that a launch took as long as it was told."""

    def __init__(self, calls, launches, seconds):
        assert launches >= len(calls)
        self.outputs, self.told = [call() for call in calls[:1]], seconds

    def seconds(self):
        return self.told


class MadeUpTiming:
    """The CPU as a device whose launches take 10 microseconds, every second graph 40."""

    device, multiprocessors, l2_bytes = torch.device("cpu"), 10, 100_000

    def __init__(self):
        self.graphs = []

    def context(self):
        return torch.inference_mode()

    def stream(self):
        return 0

    def graph(self, calls, launches):
        self.graphs.append(MadeUpGraph(calls, launches, 1e-5 if len(self.graphs) % 2 else 4e-5))
        return self.graphs[-1]

    def clock_behind(self, load):
        assert load in self.graphs
        return 1e9


@pytest.fixture
def made_up(monkeypatch, reference_library):
    monkeypatch.setattr(kernels.ops, "device_library", lambda index: reference_library)
    monkeypatch.setattr(kernels, "ROOF_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "machine_facts", lambda device: {"name": "made up", "cuda": "0", "torch": "0"})
    return MadeUpTiming()


@pytest.fixture
def reference_library():
    class Library:
        path, architectures = "made-up.so", ("90",)

        def read(self, data, size, sink, stream):
            assert size == kernels.ROOF_BYTES

    return Library()


def test_a_whole_run_on_made_up_time(made_up):
    kept = []
    request = KernelRequest(("demo",), ("2,4,8", "4,8,9"), ("o", "down"), (1, 512), ("demo",), 8, 7)
    result = json.loads(json.dumps(bench_kernels(request, timing=made_up, keep=kept.append)))
    assert result["roof"]["read_bytes_per_s"] == pytest.approx((1 << 16) / 4e-5)
    assert [(one["group"], one["code"], one["tokens"]) for one in result["rows"]] == [
        (f"demo {group}", code, tokens) for group in ("o", "down") for code in ("2,4,8", "4,8,9") for tokens in (1, 512)
    ]
    assert all((one["dequantized_seconds"] is None) == (one["tokens"] == 1) for one in result["rows"])
    assert all(one["clock_hz"] == 1e9 for one in result["rows"])
    first = result["rows"][0]
    codes = 256 * 256 // 4
    assert first["index_bytes_per_sm_clock"] == pytest.approx(codes / (first["seconds"] * 1e9 * 10))
    assert len(result["resident"]) == 8, "256 x 384 at 2 bits fits three quarters of 100 kB"
    assert len(kept) == 8 + 8 + 2
    assert [one["row"] for one in kept if one["kind"] == "decoders"] == result["decoders"]
    assert len(result["gates"]) == 5
    text = kernels_text(result)
    for words in ("resident in the L2 cache", "tokens/s", "dense us", "not measured"):
        assert words in text


def test_gates_that_are_missed_end_the_verb_and_rows_are_kept_till_the_end(made_up, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "TorchTiming", lambda: made_up)
    command = [
        "bench",
        "kernels",
        "--shapes",
        "demo",
        "--groups",
        "o",
        "--tokens",
        "1",
        "--decoders",
        "",
        "--rounds",
        "7",
    ]
    assert main([*command, "--gates", "-o", str(tmp_path / "found")]) == 4
    captured = capsys.readouterr()
    assert "5 of 5 gates are not met" in captured.err
    assert "index bytes a SM-clock" in captured.out
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    assert main(command) == 0
    cut = RuntimeError("the machine is gone")
    monkeypatch.setattr(kernels, "gates", lambda result: (_ for _ in ()).throw(cut))
    assert main([*command, "-o", str(tmp_path / "cut")]) == 1
    lines = (tmp_path / "cut.partial").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["rows", "resident"]


@pytest.mark.gpu
def test_a_small_run(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if find_library() is None:
        pytest.skip("the kernels are not built: mgvq kernels build")
    request = KernelRequest(("demo",), ("2,4,8", "4,8,9"), ("o", "down"), (1, 16, 128), ("demo",), 64, 7)
    result = json.loads(json.dumps(bench_kernels(request)))
    assert len(result["rows"]) == 2 * 2 * 3
    assert all(one["seconds"] > 0 and one["dense_seconds"] > 0 for one in result["rows"])
    assert result["roof"]["read_bytes_per_s"] > 0
    assert kernels_text(result)
