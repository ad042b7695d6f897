"""Latency model: published rows, most of them not fitted to, come out inside the error bar that is printed."""

from __future__ import annotations

import dataclasses

import pytest
from published_models import bit_plan, qwen2_vl_2b, qwen3_vl, rotated

from toolchain.plan.latency import ERROR, Work, decode_weight_bytes, phase_ms, plan_latency, vision_weight_bytes
from toolchain.plan.memory import Workload
from toolchain.plan.target import load_target

AGX, NX, THOR = (load_target(name) for name in ("agx-orin-64gb", "orin-nx-16gb", "agx-thor-128gb"))
NANO = load_target("orin-nano-8gb")
NANO_15W = dataclasses.replace(
    NANO,
    gpu_clock_hz=612_000_000,
    fp16_flops_per_s=8 * 612_000_000 * 2048,
    bandwidth_read_bytes_per_s=int(0.84 * 68.3e9),
)
NANO_SUPER = dataclasses.replace(NANO, gpu_clock_hz=1_020_000_000)
# TensorRT Edge-LLM 0.9.0, INT4 body, FP16 head, tokens/s; the last line is hokwangchoi/jetson-orin-nano-benchmarks.
DECODE = [
    *[("0.6B", AGX, 186.4), ("2B", AGX, 98.6), ("4B", AGX, 53.1), ("8B", AGX, 32.5)],
    *[("0.6B", NX, 117.4), ("2B", NX, 60.4), ("4B", NX, 31.6), ("8B", NX, 19.0)],
    *[("0.6B", NANO_15W, 72.8), ("2B", NANO_15W, 37.4), ("4B", THOR, 79.6), ("8B", THOR, 49.3)],
    ("2B", NANO_SUPER, 60.0),
]


def int4_bytes(size: str) -> int:
    """INT4 body with a scale per 128 weights, FP16 head: what one token reads."""
    geometry = qwen3_vl(size)
    return int(geometry.language_weights * 4.125 / 8) + 2 * geometry.vocab * geometry.hidden


@pytest.mark.parametrize(("size", "target", "published"), DECODE)
def test_decode(size, target, published):
    geometry = qwen3_vl(size)
    read = int4_bytes(size) + 300 * geometry.kv_bytes_per_token
    predicted = 1000 / phase_ms("decode", Work(read, 2 * geometry.language_weights, geometry.layers), target)
    assert predicted == pytest.approx(published, rel=ERROR["decode"])


@pytest.mark.parametrize(
    ("size", "target", "ms"),
    [("2B", AGX, 50), ("2B", NX, 103), ("2B", NANO_15W, 191), ("4B", THOR, 85), ("8B", THOR, 157)],
)
def test_prefill_of_292_tokens(size, target, ms):
    geometry = qwen3_vl(size)
    flops = 2 * geometry.language_weights * 292
    assert phase_ms("prefill", Work(int4_bytes(size), flops, geometry.layers), target) == pytest.approx(
        ms, rel=ERROR["prefill"]
    )


@pytest.mark.parametrize(("target", "tokens_per_s"), [(AGX, 1307), (THOR, 1877)])
def test_long_batched_prefill(target, tokens_per_s):
    geometry, length, batch = qwen3_vl("8B"), 2100, 8
    flops = batch * (2 * geometry.language_weights * length + 2 * 36 * 4096 * length**2)
    ms = phase_ms("prefill", Work(int4_bytes("8B"), flops, geometry.layers), target)
    assert 1000 * batch * length / ms == pytest.approx(tokens_per_s, rel=ERROR["prefill"])


@pytest.mark.parametrize(("target", "ms"), [(AGX, 39), (NX, 82), (NANO_15W, 151)])
def test_vision_of_265_tokens(target, ms):
    geometry, patches = qwen3_vl("2B"), 1060
    flops = 2 * geometry.vision_weights * patches + 4 * 24 * 1024 * patches**2
    assert phase_ms("vision", Work(2 * 407_000_000, flops, 24), target) == pytest.approx(ms, rel=ERROR["vision"])


def test_a_plan_has_its_phases_and_error_bars():
    geometry = qwen2_vl_2b()
    work = Workload(2048, (448, 448), NANO.max_image_pixels)
    latency = plan_latency(bit_plan(geometry), geometry, NANO, work)
    assert [x.name for x in latency.phases] == ["vision", "prefill", "decode"]
    assert all(0 < x.low_ms < x.ms < x.high_ms for x in latency.phases)
    assert latency.tokens_per_s == pytest.approx(1000 / latency.phase("decode").ms)
    data = latency.to_json()
    assert data["measured"] is False
    assert data["power_mode"] == "25W"
    without = plan_latency(bit_plan(geometry), geometry, NANO, dataclasses.replace(work, image=None))
    assert [x.name for x in without.phases] == ["prefill", "decode"]


def test_fewer_bits_and_shorter_contexts_are_never_slower():
    geometry = qwen2_vl_2b()
    work = Workload(2048, (448, 448), NANO.max_image_pixels)
    times = [
        plan_latency(bit_plan(geometry, code), geometry, NANO, work).phase("decode").ms
        for code in ("4,8,8", "2,6,6", "2,8,8")
    ]
    assert times == sorted(times)
    shorter = dataclasses.replace(work, context_tokens=1024)
    assert plan_latency(bit_plan(geometry), geometry, NANO, shorter).phase("decode").ms < times[0]


def test_a_token_reads_the_tied_head_once_and_no_tower():
    geometry = qwen2_vl_2b()
    plan = bit_plan(geometry)
    language = sum(x.codes_bytes + x.scales_bytes for x in plan.layers if x.part == "language")
    head = 151936 * 1536 // 2 + 2 * 151936
    assert decode_weight_bytes(plan, geometry) == language + head + 2 * 1536
    tower = sum(x.codes_bytes + x.scales_bytes for x in plan.layers if x.part in ("vision", "projector"))
    assert vision_weight_bytes(plan, geometry) == tower + 2 * 1280


def test_an_untied_embedding_kept_in_16_bits_is_not_read():
    geometry = dataclasses.replace(qwen2_vl_2b(), tied_head=False)
    plan = bit_plan(geometry)
    kept = plan.kept | {"model.language_model.embed_tokens.weight": 10**9}
    assert decode_weight_bytes(dataclasses.replace(plan, kept=kept), geometry) == decode_weight_bytes(plan, geometry)


def test_a_rotation_is_counted_by_phase_worked_by_hand():
    """28 down_proj of 8,960 columns in blocks of 64, and 32 fc2 of 5,120 in an image's 1,024 patches."""
    geometry, work = qwen2_vl_2b(), Workload(2048, (448, 448), NANO.max_image_pixels)
    plain = plan_latency(bit_plan(geometry), geometry, NANO, work)
    turned = plan_latency(rotated(bit_plan(geometry), "down_proj"), geometry, NANO, work)
    decode, before = turned.phase("decode"), plain.phase("decode")
    assert decode.rotations == 28
    assert decode.flops - before.flops == 28 * 2 * 8960 * 64
    assert decode.bytes_read - before.bytes_read == 28 * 4 * 8960
    assert turned.phase("vision") == plain.phase("vision")
    launches, moved = 28 * 4_000 / NANO.gpu_clock_hz, 28 * 4 * 8960 / NANO.bandwidth_read_bytes_per_s
    assert decode.ms - before.ms == pytest.approx(1000 * (launches + moved))
    tower = plan_latency(rotated(bit_plan(geometry), "fc2"), geometry, NANO, work)
    assert tower.phase("vision").flops - plain.phase("vision").flops == 32 * 2 * 5120 * 64 * 1024
    assert tower.phase("decode") == before


def test_layers_of_a_group_share_one_rotation():
    geometry, work = qwen2_vl_2b(), Workload(2048, None, NANO.max_image_pixels)
    plan = rotated(bit_plan(geometry), ("gate_proj", "up_proj"))
    assert sum(1 for layer in plan.layers if layer.rotation) == 2 * 28
    assert plan_latency(plan, geometry, NANO, work).phase("decode").rotations == 28
