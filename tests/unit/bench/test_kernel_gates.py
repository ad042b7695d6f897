"""Gates on made-up figures: what decides, what is left out, and what was not measured."""

from __future__ import annotations

import pytest

from toolchain.bench.kernel_gates import gate_cells, gates, unmet


def row(group="qwen2-vl-7b gate_up", tokens=1, size=34_000_000, speedup=6.0, share=0.85, clock=15.0, code="2,4,8"):
    return {
        "group": group,
        "code": code,
        "tokens": tokens,
        "packed_bytes": size,
        "speedup": speedup,
        "roof_share": share,
        "index_bytes_per_sm_clock": clock,
    }


def result(rows=(), resident=(), decoders=()):
    return {"rows": list(rows), "resident": list(resident), "decoders": list(decoders)}


GOOD = result(
    [
        row(),
        row(size=1_000_000, speedup=2.0, share=0.1),
        row(tokens=2048, speedup=0.9),
        row("7b head", 2048, speedup=0.1),
    ],
    [row(clock=11.0), row(clock=15.0), row(clock=30.0, code="2,8,9")],
    [{"decoder": "qwen2-vl-7b", "code": "2,4,8", "speedup": 3.5}],
)


def test_the_best_resident_row_and_the_worst_of_the_others_decide():
    found = gates(GOOD)
    assert [one["found"] for one in found] == [15.0, 0.85, 6.0, pytest.approx(1 / 0.9), 3.5]
    assert all(one["is_met"] for one in found)
    assert unmet(found) == []
    assert gate_cells(found[3]) == {
        "gate": "times float16's time, 2048 tokens",
        "wanted": "at most 1.25",
        "found": "1.11",
        "where": "qwen2-vl-7b gate_up 2,4,8",
        "met": "yes",
    }


def test_one_matrix_below_is_a_gate_missed():
    slow = gates(GOOD | {"rows": [*GOOD["rows"], row("qwen2-vl-2b head", share=0.7, speedup=4.0)]})
    assert [one["is_met"] for one in slow] == [True, False, False, True, True]
    assert slow[1]["where"] == "qwen2-vl-2b head 2,4,8"
    assert unmet(slow)[0].endswith("packed: 0.7, wanted at least 0.8")
    assert gate_cells(slow[1])["met"] == "NO"


def test_what_was_not_measured_is_not_met():
    found = gates(result([row(tokens=2)], [row(clock=None)]))
    assert [one["is_met"] for one in found] == [None] * 5
    assert len(unmet(found)) == 5
    assert gate_cells(found[0])["found"] == "not measured"
