"""Memory plan: bytes counted exactly where they can be, published rows met, and never less for more."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_models import bit_plan, qwen2_vl_2b, qwen3_vl, rotated

from toolchain.errors import UsageError
from toolchain.graph.passes.tile_queries import tile_queries
from toolchain.plan import advice
from toolchain.plan import memory as budget
from toolchain.plan.geometry import ImageWork
from toolchain.plan.memory import Workload, plan_memory
from toolchain.plan.target import load_target
from toolchain.values import CODES, PLAIN_CODE_NAMES, BitPlan

NANO, NX = load_target("orin-nano-8gb"), load_target("orin-nx-16gb")
GEOMETRY = qwen2_vl_2b()
PLANS = {code: bit_plan(GEOMETRY, code, "2,8,8") for code in CODES}
WORK = Workload(2048, (448, 448), NANO.max_image_pixels)


def test_weights_are_counted_to_the_byte():
    plan = PLANS["4,8,8"]
    parts = plan_memory(plan, GEOMETRY, NANO, WORK).parts
    language = [x for x in plan.layers if x.part == "language"]
    assert parts["weights.language"] == sum(x.rows * x.columns // 4 + 2 * x.rows for x in language)
    assert parts["weights.embedding_head"] == 151936 * 1536 // 2 + 2 * 151936  # the tied head is stored once
    assert parts["tables"] == 4 * 1024  # vision, projector, language, embedding with head
    assert parts["kept16"] == 2 * (1280 + 1536)


def test_keys_and_values_of_published_models():
    assert GEOMETRY.kv_bytes_per_token * 256 == 7 * 2**20
    assert qwen3_vl("0.6B").kv_bytes_per_token * 2200 / 2**20 == pytest.approx(241, rel=0.005)


def scores(heads: int, patches: int, sequences: int = 1) -> int:
    """What the plan counts for the tower's largest score tensor, in elements."""
    geometry = dataclasses.replace(GEOMETRY, vision_heads=heads)
    return budget.tile_scores(geometry, ImageWork(0, 0, sequences, patches, 0))


def test_vision_scores_are_one_tiles_worked_by_hand():
    assert scores(16, 100) == 16 * 100 * 100, "2.4 MiB in float32 stay whole"
    assert scores(16, 1024) == 16 * 1024 * 1024, "exactly the limit of 64 MiB"
    # Qwen2-VL's largest image in 768 tokens: 3072 patches, 604 MB; a tile has 64 MiB and at most one query more.
    assert scores(16, 3072) == (64 << 18) + 16 * 3072
    assert scores(16, 3072) < 16 * 3072 * 3072 / 8
    # 16,384 patches would take 256 tiles; there are 64 at most, of 256 queries.
    assert scores(16, 16384) == 16 * 256 * 16384
    assert scores(4, 1025, sequences=13) == min(13 * 4 * 1025 * 1025, (64 << 18) + 13 * 4 * 1025)


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(1, 32), patches=st.integers(1, 6000), sequences=st.integers(1, 13))
def test_no_tile_that_the_rewrite_cuts_is_larger_than_planned(heads, patches, sequences):
    """The rewrite's own tiles, one shape of chain: queries in pieces n·i/T."""
    queries = gs.Variable("q", np.float32, [sequences, heads, patches, 8])
    keys = gs.Variable("k", np.float32, [sequences, heads, 8, patches])
    values = gs.Variable("v", np.float32, [sequences, heads, patches, 8])
    found = [gs.Variable(name, np.float32, [sequences, heads, patches, patches]) for name in "sp"]
    output = gs.Variable("y", np.float32, [sequences, heads, patches, 8])
    nodes = [
        gs.Node("MatMul", "scores", {}, [queries, keys], [found[0]]),
        gs.Node("Softmax", "softmax", {"axis": -1}, [found[0]], [found[1]]),
        gs.Node("MatMul", "mix", {}, [found[1], values], [output]),
    ]
    graph = gs.Graph(nodes, [queries, keys, values], [output], opset=18)
    tile_queries(graph, {})
    cuts = [(int(n.inputs[1].values[0]), int(n.inputs[2].values[0])) for n in graph.nodes if n.op == "Slice"]
    rows = max((end - start for start, end in cuts), default=patches)
    assert sequences * heads * rows * patches <= scores(heads, patches, sequences)


def test_json_parts_add_up_to_the_peak():
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, NANO, WORK)
    data = memory.to_json()
    assert sum(data["parts"].values()) == data["peak_bytes"] == memory.peak_bytes
    assert sum(data["weights_by_part"].values()) == data["parts"]["weights"]
    assert set(data) >= {"fits", "peak_bytes", "largest_block_bytes", "parts"}
    assert {"weights", "kv"} <= set(data["parts"])


@pytest.mark.parametrize(("size", "published_mib"), [("2B", 4344), ("4B", 5903), ("8B", 9065)])
def test_published_vlm_rows_on_orin_nx(size, published_mib, record_property):
    """TensorRT Edge-LLM 0.9.0: INT4 body, FP16 embedding, head and tower, 2,200 tokens, 2,048 visual tokens."""
    geometry = qwen3_vl(size)
    work = Workload(2200, None, NX.max_image_pixels, prompt_tokens=1024, fused_attention=True)
    parts = plan_memory(BitPlan(()), geometry, NX, work).parts
    tower = geometry.vision_weights + 4 * (4 * geometry.vision_embed) * (4 * geometry.vision_embed + geometry.hidden)
    weights = geometry.language_weights * 4.125 / 8 + 2 * 2 * geometry.vocab * geometry.hidden + 2 * tower
    arena = 8192 * geometry.vision_embed * budget.VISION_BYTES_PER_CHANNEL
    planned = (weights + arena + sum(parts.values())) / 2**20
    record_property("share", planned / published_mib)
    assert 0.98 < planned / published_mib < 1.10


@settings(max_examples=40, deadline=None)
@given(
    context=st.integers(64, 8192),
    more=st.integers(0, 4096),
    side=st.integers(28, 1200),
    batch=st.integers(1, 4),
    fused=st.booleans(),
)
def test_longer_context_larger_image_or_batch_never_takes_less(context, more, side, batch, fused):
    base = Workload(context, (side, side), 10**8, batch, fused_attention=fused)
    plan = PLANS["4,8,8"]
    smallest = plan_memory(plan, GEOMETRY, NANO, base)
    for change in ({"context_tokens": context + more}, {"image": (side + more, side + more)}, {"batch": batch + 1}):
        larger = plan_memory(plan, GEOMETRY, NANO, dataclasses.replace(base, **change))
        assert larger.peak_bytes >= smallest.peak_bytes
        assert larger.build_peak_bytes >= smallest.build_peak_bytes
        assert larger.largest_block_bytes >= smallest.largest_block_bytes


def test_more_bits_never_take_less():
    by_bits = sorted((CODES[name] for name in PLAIN_CODE_NAMES), key=lambda code: code.index_bits)
    memories = [plan_memory(PLANS[str(code)], GEOMETRY, NANO, WORK) for code in by_bits]
    for less, more in itertools.pairwise(memories):
        assert less.peak_bytes < more.peak_bytes
        assert less.largest_block_bytes <= more.largest_block_bytes


def test_2b_at_two_bits_fits_the_nano():
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, NANO, WORK)
    assert memory.fits, memory.problems
    assert all(item.fits for item in advice.advise(PLANS["4,8,8"], GEOMETRY, NANO, memory))


def test_what_does_not_fit_says_why_and_what_to_turn_down():
    work = Workload(200_000, (2016, 2016), 10**8)
    memory = plan_memory(PLANS["2,8,8"], GEOMETRY, NANO, work)
    assert not memory.fits
    assert any("MiB" in text for text in memory.problems)
    found = advice.advise(PLANS["2,8,8"], GEOMETRY, NANO, memory)
    assert {item.change for item in found} >= {"image", "context", "bits", "bits, image and context"}
    assert found[-1].fits
    assert "which fits" in found[-1].text


def test_each_advice_names_the_figure_that_follows():
    small = dataclasses.replace(NANO, memory_usable_bytes=2_300_000_000)
    work = Workload(16_384, (448, 448), 10**8)
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, small, work)
    assert not memory.fits
    context = next(x for x in advice.advise(PLANS["4,8,8"], GEOMETRY, small, memory) if x.change == "context")
    again = dataclasses.replace(work, context_tokens=int(context.to.split()[0]))
    result = plan_memory(PLANS["4,8,8"], GEOMETRY, small, again)
    assert (result.fits, result.peak_bytes) == (context.fits, context.peak_bytes) == (True, context.peak_bytes)


def test_a_board_that_is_too_small_for_anything_says_so():
    tiny = dataclasses.replace(NANO, memory_usable_bytes=10**9)
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, tiny, WORK)
    assert advice.advise(PLANS["4,8,8"], GEOMETRY, tiny, memory)[-1].change == "target"


def test_a_block_above_the_default_pool_asks_for_the_kernel_argument():
    work = Workload(4096, (784, 756), 10**8)
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, NANO, work)
    assert NANO.largest_block_default_bytes < memory.largest_block_bytes <= NANO.largest_block_bytes
    texts = [x.text for x in advice.advise(PLANS["4,8,8"], GEOMETRY, NANO, memory)]
    assert any("cma=950M" in text for text in texts)


def test_a_image_longer_than_the_context_is_a_problem_with_a_remedy():
    work = Workload(256, (448, 448), 10**8)
    memory = plan_memory(PLANS["4,8,8"], GEOMETRY, NANO, work)
    assert "256 tokens leave no room in a context of 256" in memory.problems[-1]
    remedies = advice.advise(PLANS["4,8,8"], GEOMETRY, NANO, memory)
    assert any(x.change == "context" and x.to == "512 tokens" and x.fits for x in remedies)


def test_the_inverse_is_the_edge_of_what_fits():
    plan = PLANS["4,8,8"]
    side = advice.largest_image(plan, GEOMETRY, NANO, WORK)
    tokens = advice.largest_context(plan, GEOMETRY, NANO, WORK)
    assert side % 28 == 0
    for change, step in (({"image": (side, side)}, 0), ({"image": (side + 28, side + 28)}, 1)):
        work = dataclasses.replace(WORK, max_pixels=10**9, **change)
        assert plan_memory(plan, GEOMETRY, NANO, work).fits == (step == 0)
    for more, fits in ((0, True), (64, False)):
        work = dataclasses.replace(WORK, context_tokens=tokens + more)
        assert plan_memory(plan, GEOMETRY, NANO, work).fits == fits
    assert advice.largest_bits(plan, GEOMETRY, NANO, WORK) == 4.0


def test_advice_goes_down_to_what_the_plans_own_codes_reach():
    small = dataclasses.replace(NANO, memory_usable_bytes=2**30)
    for code, least in (("4,8,8", "2 bits"), ("2,4,8", "1.5 bits")):
        plan = bit_plan(GEOMETRY, code, code if code == "4,8,8" else "2,8,9")
        finer = advice.with_code(plan, "2,8,8" if code == "4,8,8" else "2,8,9")
        found = advice.advise(finer, GEOMETRY, small, plan_memory(finer, GEOMETRY, small, WORK))
        assert next(x.to for x in found if x.change == "bits") == f"{least} in every layer"


def test_nothing_fits_gives_zero():
    none = dataclasses.replace(NANO, memory_usable_bytes=1)
    assert advice.largest_image(PLANS["4,8,8"], GEOMETRY, none, WORK) == 0
    assert advice.largest_context(PLANS["4,8,8"], GEOMETRY, none, WORK) == 0
    assert advice.largest_bits(PLANS["4,8,8"], GEOMETRY, none, WORK) == 0


def test_impossible_workload_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        Workload(0, None, 100)


def test_default_workload_takes_the_targets_limits():
    work = budget.default_workload(NANO)
    assert work.context_tokens == NANO.default_context_tokens
    assert plan_memory(PLANS["4,8,8"], GEOMETRY, NANO, work).image.tokens <= 768


def test_rotated_inputs_are_a_copy_of_the_widest_in_float16():
    geometry, work = qwen2_vl_2b(), Workload(2048, (448, 448), 448 * 448)
    plain = plan_memory(bit_plan(geometry), geometry, NANO, work)
    turned = plan_memory(rotated(bit_plan(geometry), ("down_proj", "o_proj", "fc2")), geometry, NANO, work)
    assert turned.parts["activations"] - plain.parts["activations"] == 2 * 8960 * (256 + 256)
    assert turned.parts["vision_activations"] - plain.parts["vision_activations"] == 2 * 5120 * 1024
    others = {name: size for name, size in plain.parts.items() if not name.endswith("activations")}
    assert {name: turned.parts[name] for name in others} == others
