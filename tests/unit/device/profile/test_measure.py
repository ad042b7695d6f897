"""Measuring: what counts and what does not, phases that add up, and a profile.json that holds what was measured."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from toolchain.device.families.base import Prepared
from toolchain.device.profile import measure as profile
from toolchain.device.profile.layers import LayerTime
from toolchain.device.profile.measure import GraphCall, Measured, Question, Settings, Spread, measure
from toolchain.device.profile.result import Machine, Prediction, Source, profile_json, profile_text
from toolchain.device.runtime.board import Gpu
from toolchain.errors import UsageError
from toolchain.plan.latency import LatencyPlan, Phase
from toolchain.report.profile import _largest, render_profile

VOCABULARY = 11


class Clock:
    """Time that passes only when something says that it took some."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_ms(self, ms: float) -> None:
        self.now += ms / 1000


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profile, "time", made)
    return made


class StubHost:
    """Five ids, two of them an image's; preparing takes 1 ms."""

    axes = 1
    settings = {"decoder": {"hidden": 4}}  # noqa: RUF012 - a constant

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def prepare(self, image, prompt) -> Prepared:
        self._clock.pass_ms(1)
        feeds = ({"pixel_values": np.zeros((1, 3), np.float32)},) if image else ()
        places = ((1, 3),) if image else ()
        return Prepared(feeds, np.arange(5), np.arange(5)[None], 5, places)


class StubBackend:
    """Vision 3 ms, embed 0.5 ms, decoder 2 ms a token and 1 ms a call outside; graphs twice as long with layers.

    `growth` is how much longer, in ms, the decoder takes for every place that is filled already.
    """

    name = "stub"

    def __init__(self, clock: Clock, watches: bool = True, answers=lambda layers: 7, growth: float = 0.0) -> None:
        self.clock, self.watches, self.answers, self.growth, self.opened = clock, watches, answers, growth, []

    def describe(self):
        return {"stub": "1.0"}

    def open(self, capacity, layers):
        self.opened.append((capacity, layers))
        return StubRecording(self, layers)


class StubRecording:
    def __init__(self, backend: StubBackend, layers: bool) -> None:
        self.calls: list[GraphCall] = []
        self._layers: list[list[LayerTime]] = []
        self._backend, self._recorded = backend, layers
        self.runner = self
        self.length, self.capacity = 0, 100

    def _call(self, graph: str, ms: float, layer: str, *nodes: str) -> None:
        ms *= 2 if self._recorded else 1
        self._backend.clock.pass_ms(ms)
        if self._backend.watches or self._recorded:
            self.calls.append(GraphCall(graph, ms))
            self._layers.append([LayerTime(layer, ms / 4, nodes)] if self._recorded else [])

    def truncate(self, length):
        self.length = min(self.length, length)

    def image_features(self, feeds):
        self._call("vision", 3, "model.visual.blocks.0.attn.qkv")
        return np.zeros((2, 4), np.float32)

    def extend(self, ids, features, positions):
        assert features.shape[1] == 4
        self._call("embed", 0.5, "model.embed_tokens")
        ms = 2 * len(ids) + self._backend.growth * self.length
        self._call("decoder", ms, "fused", "model.layers.0.mlp/Mul_0")
        self.length += len(ids)
        self._backend.clock.pass_ms(1)
        logits = np.zeros(VOCABULARY, np.float32)
        logits[self._backend.answers(self._recorded)] = 1
        return logits

    def layers(self):
        return self._layers


SOURCE = Source("qwen2_vl for orin", "0123456789abcdef", Machine("Orin Developer Kit", "36.4.3", gpu=Gpu("Orin", "87")))
IMAGE = Question("what?", Image.new("RGB", (8, 6)))


def test_phases_are_what_the_clock_says(clock):
    found = measure(StubBackend(clock), StubHost(clock), IMAGE, Settings(3, 1, 4))
    medians = {name: spread.median for name, spread in found.phases.items()}
    assert medians == pytest.approx({"prepare": 1, "vision": 3, "embed": 0.5, "prefill": 11, "decode": 3.5})
    assert found.first_token.median == pytest.approx(1 + 3 + 0.5 + 11)
    assert found.graph_ms == pytest.approx({"vision": 3, "embed": 0.5, "prefill": 10, "decode": 2.5})
    assert found.tokens_per_s == pytest.approx(1000 / 3.5)
    assert (found.prompt_tokens, found.image_tokens, found.answer) == (5, 2, (7, 7, 7, 7))
    assert {name: spread.count for name, spread in found.phases.items()} == {
        "prepare": 3, "vision": 3, "embed": 3, "prefill": 3, "decode": 9
    }  # fmt: skip


def test_layers_are_recorded_apart_and_sum_to_their_own_pass(clock):
    backend = StubBackend(clock)
    found = measure(backend, StubHost(clock), IMAGE, Settings(3, 1, 4))
    assert backend.opened == [(9, False), (9, True)]
    decode = found.tallies["decode"]
    assert decode.total_ms == pytest.approx(2 * 2.5 + 1)
    assert decode.part("mlp").ms == pytest.approx(1.0)  # through the node it stands for
    assert decode.part("embedding").ms == pytest.approx(0.25)
    assert decode.part("unattributed").ms == pytest.approx(5 - 1.25)
    assert decode.part("host").ms == pytest.approx(1.0)
    assert found.slowdown["decode"] == pytest.approx(6 / 3.5)
    for tally in found.tallies.values():
        assert sum(row.ms for row in tally.by_module) == pytest.approx(tally.total_ms)


def test_what_recording_costs_is_told_from_the_same_tokens(clock):
    """The recorded pass stops after 8 tokens, where the context is short: so has the pass beside it to be read."""
    found = measure(StubBackend(clock, growth=0.5), StubHost(clock), IMAGE, Settings(2, 0, 30))
    # Seven tokens after the first, upon 5 to 11 places: 2.5 + 0.5 * 8 ms of graphs each, and 1 ms outside.
    assert found.tallies["decode"].total_ms == pytest.approx(2 * 6.5 + 1)
    assert found.slowdown["decode"] == pytest.approx((2 * 6.5 + 1) / (6.5 + 1))
    assert found.phases["decode"].count == 2 * 29


def test_a_backend_that_does_not_look_has_no_embed_phase(clock):
    found = measure(StubBackend(clock, watches=False), StubHost(clock), IMAGE, Settings(2, 0, 3))
    assert list(found.phases) == ["prepare", "vision", "prefill", "decode"]
    assert found.phases["prefill"].median == pytest.approx(11.5)
    assert found.graph_ms == {}
    assert found.tallies["prefill"].part("embedding").ms == pytest.approx(0.25)


def test_without_a_image_there_is_no_vision(clock):
    found = measure(StubBackend(clock), StubHost(clock), Question("what?"), Settings(2, 0, 2))
    assert "vision" not in found.phases
    assert "vision" not in found.tallies


def test_warmup_does_not_count(clock):
    backend = StubBackend(clock)
    host = StubHost(clock)
    slow = iter([500.0])
    prepare = host.prepare

    def slow_once(image, prompt):
        clock.pass_ms(next(slow, 0.0) if backend.opened else 0.0)
        return prepare(image, prompt)

    host.prepare = slow_once
    found = measure(backend, host, IMAGE, Settings(4, 1, 2))
    assert found.phases["prepare"].p90 == pytest.approx(1)


def test_recording_that_changes_the_answer_is_refused(clock):
    with pytest.raises(RuntimeError, match="changed the answer"):
        measure(StubBackend(clock, answers=lambda layers: 1 + layers), StubHost(clock), IMAGE, Settings(1, 0, 2))


@pytest.mark.parametrize("settings", [(0, 0, 2), (1, -1, 2), (1, 0, 1)])
def test_settings_that_measure_nothing_are_refused(settings):
    with pytest.raises(UsageError, match="expected at least 1, 0 and 2"):
        Settings(*settings)


def test_spread_of_a_case_worked_by_hand():
    found = Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert dataclasses.astuple(found) == (3.0, 1.0, pytest.approx(1.4), pytest.approx(61.6), 1.0, 5)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def latency(decode_ms: float) -> LatencyPlan:
    return LatencyPlan("board", "25W", (Phase("decode", 0, 0, 1, decode_ms, 0.1), Phase("prefill", 0, 0, 1, 11, 0.1)))


@pytest.fixture
def measured(clock) -> Measured:
    return measure(StubBackend(clock), StubHost(clock), IMAGE, Settings(3, 1, 4))


def result(measured: Measured, prediction=None, telemetry=None) -> dict:
    data = profile_json(
        measured, IMAGE, source=SOURCE, backend="stub", runtime={"stub": "1.0"}, prediction=prediction,
        telemetry=telemetry,
    )  # fmt: skip
    assert json.loads(json.dumps(data)) == data  # JSON-clean
    return data


def test_prediction_beside_the_measurement(measured):
    data = result(measured, Prediction(latency(7.0), same_device=True))
    decode = next(row for row in data["phases"] if row["phase"] == "decode")
    assert (decode["predicted_ms"], decode["ratio"]) == (7.0, pytest.approx(0.5))
    assert next(row for row in data["phases"] if row["phase"] == "embed")["ratio"] is None
    assert [text for text in data["warnings"] if "latency model says" in text] == [
        "decode: measured 3.5 ms, the latency model says 6.3 to 7.7 ms; please report it with profile.json"
    ]


def test_another_machine_than_the_predicted_one_is_said(measured):
    warnings = result(measured, Prediction(latency(7.0), same_device=False))["warnings"]
    assert any("measured elsewhere" in text for text in warnings)
    assert not any("latency model says" in text for text in warnings)


def test_unsteady_figures_and_costly_recording_are_said(measured):
    wobbly = dataclasses.replace(
        measured, phases=measured.phases | {"decode": dataclasses.replace(measured.phases["decode"], mad=1.0)}
    )
    texts = " ".join(result(wobbly)["warnings"])
    assert "decode: the median absolute deviation is 29 %" in texts
    assert "recording layers made" in texts
    steady = dataclasses.replace(measured, slowdown=dict.fromkeys(measured.slowdown, 1.0))
    assert result(steady)["warnings"] == []


def test_telemetrys_warnings_come_along(measured):
    data = result(measured, telemetry=TELEMETRY)
    assert data["warnings"][-1] == "power mode 15W <b>"
    assert "telemetry: power mode 15W" in profile_text(data)


TELEMETRY = {
    "summary": "telemetry: power mode 15W", "warnings": ["power mode 15W <b>"], "samples": 3, "unread_lines": 1,
    "sources": ["tegrastats"], "settings": {"power_mode": "15W", "gpu_max_mhz": 612, "emc_max_mhz": None},
    "gpu_mhz_median": 306.0, "gpu_mhz_min": 300, "gpu_load_median": 90.0, "emc_mhz_median": None,
    "temperature_max": {"gpu": 61.5}, "power_mw_mean": {"VDD_IN": 4660.5}, "power_mw_max": {"VDD_IN": 5000},
    "memory_peak_bytes": 3 << 20, "largest_block_least_bytes": None,
}  # fmt: skip


def test_text_shows_every_phase_and_part(measured):
    text = profile_text(result(measured, Prediction(latency(7.0), True)))
    for word in ("vision", "embed", "prefill", "decode", "unattributed", "host", "tokens/s", "0.50"):
        assert word in text


def test_page_is_self_contained_escaped_and_whole(measured):
    page = render_profile(result(measured, Prediction(latency(7.0), False), TELEMETRY))
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert "power mode 15W &lt;b&gt;" in page
    for word in ("Where decode went", "unattributed", "61.5 °C", "3 MiB", "measured over predicted", "“what?”",
                 "Not known: memory clock, median", "Orin Developer Kit · L4T 36.4.3 · Orin (SM 87)", "not scaled",
                 "bundle 0123456789ab", "interpolated", "all tokens after the first"):  # fmt: skip
        assert word in page, word


def test_blocks_beyond_those_shown_are_summed_and_the_rest_of_the_time_stays_in_sight():
    rows = [
        {"name": f"model.layers.{i}", "part": "several", "ms": 50.0 - i, "share": 0.01, "layers": 1} for i in range(45)
    ]
    closing = [{"name": name, "part": name, "ms": 1.0, "share": 0.2, "layers": 0} for name in ("unattributed", "host")]
    shown = _largest([*rows, *closing])
    assert [row["name"] for row in shown[-3:]] == ["5 smaller ones", "unattributed", "host"]
    assert sum(row["ms"] for row in shown) == pytest.approx(sum(row["ms"] for row in [*rows, *closing]))
    assert _largest([*rows[:40], *closing]) == [*rows[:40], *closing]


def test_page_without_prediction_and_telemetry(measured):
    page = render_profile(result(measured))
    assert "Nothing was predicted" in page
    assert "The machine meanwhile" not in page


def test_prediction_follows_the_question():
    from published_models import bit_plan, qwen2_vl_2b

    from toolchain.device.profile.predict import geometry_from_plan, predict
    from toolchain.plan.target import load_target

    real = qwen2_vl_2b()
    plan = bit_plan(real)
    cache = {"layers": real.layers, "kv_heads": real.kv_heads, "head_dim": real.head_dim}
    settings = {"family": real.name, "decoder": {"hidden": real.hidden, "cache": cache},
                "image": {"patch": real.patch, "merge": real.merge}}  # fmt: skip
    found = geometry_from_plan(plan, settings)
    assert dataclasses.replace(found, vision_heads=real.vision_heads) == real
    board = load_target("orin-nano-8gb")
    ask = SimpleNamespace(image_tokens=64, image_size=(224, 224), max_pixels=None, decoded=32)
    short, long = (predict(plan, found, board, prompt_tokens=n, **vars(ask)) for n in (100, 1000))
    assert short.phase("prefill").ms < long.phase("prefill").ms
    assert short.phase("decode").ms < long.phase("decode").ms
    assert short.phase("vision") == long.phase("vision")
    # 16 x 16 patches of 14 pixels, each through the tower's matrices and against 256 others.
    patches = 256
    assert short.phase("vision").flops == 2 * real.vision_weights * patches + 4 * 32 * 1280 * patches * patches


@pytest.mark.parametrize("folder", ["tiny_qwen2_vl", "tiny_internvl"])
def test_sizes_read_back_from_a_plan_are_the_checkpoints(folder, request):
    from toolchain.bits.bitplan import plan as plan_bits
    from toolchain.device.profile.predict import geometry_from_plan
    from toolchain.models.configs import read_config
    from toolchain.models.registry import family_for
    from toolchain.plan.latency import decode_weight_bytes

    path = request.getfixturevalue(folder)
    config = read_config(path)
    family = family_for(config)
    plan = plan_bits(family.layers(config), {}, bits=2.0)
    found, real = geometry_from_plan(plan, family.host_settings(config, path)), family.geometry(config)
    for name in ("layers", "hidden", "intermediate", "query_heads", "kv_heads", "head_dim", "vocab", "tied_head",
                 "vision_layers", "vision_embed", "vision_intermediate", "language_weights", "vision_weights",
                 "vision_prefixes", "embedding_name", "tile_size"):  # fmt: skip
        assert getattr(found, name) == getattr(real, name), name
    assert decode_weight_bytes(plan, found) == decode_weight_bytes(plan, real)
    if real.tile_size:
        assert (found.tile_size // found.patch) % found.merge == 0
        assert found.tile_size // found.patch // found.merge == real.tile_size // real.patch // real.merge
