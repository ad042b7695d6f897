"""What is extrapolated from measured groups, and what never is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from heard_progress import Heard

from toolchain.bench import shapes
from toolchain.bench.parts import PARTS, Timing
from toolchain.bench.quantize import Measured, Request, bench_quantize, busy_share, check_request, summary
from toolchain.bench.shapes import decoder_shape
from toolchain.errors import UnsupportedError, UsageError

SHAPE = decoder_shape("demo")
REQUEST = Request("demo", layers=2)
# Two layers of every group, in binary fractions so that sums are exact.
FIRST = (
    Timing("statistics", "mgvq", None, 1.0, 0.5),
    Timing("factor", "mgvq", "2,4,8", 64.0, 32.0),
    Timing("sweep", "mgvq", "2,4,8", 4.0, 2.0),
    Timing("sweep", "mgvq", "4,8,8", 1.5, 0.75),
    Timing("sweep", "gptq", "4,8,8", 1.0, 0.5),
)
SECOND = tuple(replace(timing, seconds=3 * timing.seconds, cpu_seconds=3 * timing.cpu_seconds) for timing in FIRST)


def measured(groups, rows_share: float = 1.0) -> list[Measured]:
    return [Measured(group, group.limited(rows_share, 1.0), (FIRST, SECOND), 1000) for group in groups]


def test_identical_blocks_are_multiplied():
    found = summary(SHAPE, REQUEST, measured(SHAPE.groups))
    (total,) = found["totals"]
    # The mean of both layers is twice the first: (1 + 4) * 2 a group, four groups, eight blocks.
    assert total["measured_seconds"] == total["block_seconds"] == 40.0
    assert total["decoder_seconds"] == 320.0
    assert (total["measured_cpu_seconds"], total["decoder_cpu_seconds"]) == (20.0, 160.0)
    assert total["parts"] == ["statistics", "sweep"]
    sweep = next(row for row in found["rows"] if (row["part"], row["code"]) == ("sweep", "2,4,8"))
    assert (sweep["seconds"], sweep["mean_seconds"], sweep["decoder_seconds"]) == ([4.0, 12.0], 8.0, 64.0)
    assert "8, because the blocks are identical" in found["extrapolated"]


def test_what_the_sweep_contains_and_peers_are_in_no_sum():
    rows = summary(SHAPE, REQUEST, measured(SHAPE.groups))["rows"]
    assert {(r["part"], r["method"]) for r in rows if not r["is_in_sums"]} == {("factor", "mgvq"), ("sweep", "gptq")}


def test_a_missing_group_leaves_no_block_and_no_decoder():
    found = summary(SHAPE, REQUEST, measured(SHAPE.groups[:2]))
    (total,) = found["totals"]
    assert (total["measured_seconds"], total["block_seconds"], total["decoder_seconds"]) == (20.0, None, None)
    assert all(row["decoder_seconds"] == 8 * row["mean_seconds"] for row in found["rows"])
    assert "gate_up, down not measured" in found["extrapolated"]


def test_nothing_is_extrapolated_from_a_cut_group():
    found = summary(SHAPE, REQUEST, measured(SHAPE.groups, rows_share=0.5))
    cut = {group["group"] for group in found["groups"] if not group["is_whole"]}
    assert cut == {"qkv", "o", "gate_up", "down"}
    assert {row["decoder_seconds"] for row in found["rows"]} == {None}
    assert {found["totals"][0][key] for key in ("block_seconds", "decoder_seconds", "decoder_cpu_seconds")} == {None}
    assert found["extrapolated"].startswith("nothing from groups that were cut")
    assert "o cut to 128x256" in found["measured"]


def test_ratios_are_of_the_sweep_of_the_same_group():
    found = summary(SHAPE, REQUEST, measured(SHAPE.groups[:1]))["ratios"]
    assert [(one["group"], one["code"]) for one in found] == [("qkv", "2,4,8"), ("qkv", "4,8,8")]
    assert [(one["ratio"], one["cpu_ratio"]) for one in found] == [(4.0, 4.0), (1.5, 1.5)]


def test_the_busy_share_is_of_all_threads():
    assert busy_share(measured(SHAPE.groups), threads=1) == 0.5
    assert busy_share(measured(SHAPE.groups), threads=4) == 0.125


@pytest.fixture
def tiny(monkeypatch):
    """A published decoder so small, and a code so quick, that a block takes a second."""
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(shapes.PUBLISHED, "tiny", config | heads)
    return Request("tiny", codes=("4,8,8",), tokens=64)


def test_a_block_end_to_end(tiny):
    heard = Heard()
    found = bench_quantize(replace(tiny, layers=2), heard)
    assert json.loads(json.dumps(found))["decoder"] == {"name": "tiny", "blocks": 3}
    assert [(done, total) for done, total, _ in heard.steps] == [(n, 8) for n in range(8)]
    assert {row["part"] for row in found["rows"]} == set(PARTS)
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in found["rows"])
    assert found["totals"][0]["decoder_seconds"] == 3 * found["totals"][0]["block_seconds"]
    assert all(group["peak_bytes"] > 0 for group in found["groups"])
    assert found["busy_share"] > 0
    assert {one["group"] for one in found["ratios"]} == {"qkv", "o", "gate_up", "down"}


def test_without_peers_there_are_no_ratios(tiny):
    found = bench_quantize(replace(tiny, peers=False, groups=("o",), parts=("sweep",), codes=("4,8,8", "2,6,8")))
    assert found["ratios"] == []
    assert [row["code"] for row in found["rows"]] == ["4,8,8", "2,6,8"]
    assert [one["code"] for one in found["totals"]] == ["4,8,8", "2,6,8"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            {"shapes": "moondream"},
            UnsupportedError,
            "use one of demo, qwen2-vl-2b, qwen2-vl-7b, llava-onevision-7b, internvl2-8b",
        ),
        ({"layers": 0}, UsageError, "layers 0: expected 1 to 8"),
        ({"layers": 9}, UsageError, "layers 9: expected 1 to 8"),
        ({"groups": ("kv",)}, UsageError, "expected some of qkv,o,gate_up,down"),
        ({"parts": ("sweeping",)}, UsageError, "expected some of statistics,drift,factor,sweep,descent"),
        ({"parts": ()}, UsageError, "expected some of statistics"),
        ({"codes": ()}, UsageError, "one or more"),
        ({"codes": ("4,8,8", "4,8,8")}, UsageError, "each once"),
        ({"codes": ("3,3,3",)}, UnsupportedError, "expected V in"),
        ({"tokens": 1}, UsageError, "at least 2"),
        ({"rows_share": 0.0}, UsageError, "rows 0: expected a share"),
        ({"columns_share": 1.5}, UsageError, "columns 1.5: expected a share"),
    ],
)
def test_requests_that_are_refused(change, kind, words):
    with pytest.raises(kind, match=words):
        check_request(replace(REQUEST, **change))
