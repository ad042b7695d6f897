"""The engine runtime on a simulated device (see simulated_tensorrt.py) against onnxruntime: the same tokens and logits,
with the cache in place, buckets, chunks and CUDA graphs. What it cannot show: that a GPU computes this.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from simulated_cuda import SimulatedCuda
from simulated_engines import device_functions, graphs_of_folder, loaded_engines
from simulated_tensorrt import Context, Engine

from toolchain.bundle.manifest import write_bundle
from toolchain.device.engines.build import BuildOptions, build_engines
from toolchain.device.families import HOSTS
from toolchain.device.generation.chat import Conversation
from toolchain.device.generation.engine_graphs import EngineRunner, open_runner
from toolchain.device.generation.generate import GraphRunner
from toolchain.device.generation.limits import Limits
from toolchain.device.generation.ort_graphs import ort_graphs
from toolchain.device.generation.sampling import Sampler, SamplingPlan
from toolchain.device.runtime.cuda import Cuda
from toolchain.errors import BudgetError, InputDataError, UnsupportedError
from toolchain.graph.op.plugin_op import SIDECAR, device_graphs
from toolchain.models.configs import chat_template, read_config

BUCKETS, CHUNK = [32, 64, 160], 24
LIMITS = Limits(160, None, "a test")


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def host(line):
    """The line's host with short buckets and chunks, so that small prompts meet all of them."""
    settings = dict(line.host.settings)
    settings["decoder"] = settings["decoder"] | {"past_buckets": BUCKETS, "prefill_chunk": CHUNK, "max_context": 160}
    tokenizer = (line.model / "tokenizer.json").read_bytes()
    return HOSTS[line.family.name](settings, tokenizer, chat_template(line.model))


@pytest.fixture(scope="module")
def profiles(line, host):
    return line.family.profiles(read_config(line.model), line.model, host.settings)


@pytest.fixture(scope="module")
def portable(line):
    return ort_graphs(line.root / "portable")


def engine_runner(graphs, host, weights=None, **more) -> tuple[EngineRunner, SimulatedCuda]:
    cuda = SimulatedCuda()
    engines = loaded_engines(graphs, cuda)
    return EngineRunner(engines, Cuda(cuda), host.settings["decoder"], host.axes, 160, weights, **more), cuda


@pytest.fixture(scope="module")
def engines(line, portable, profiles):
    return graphs_of_folder(line.root / "portable", portable, profiles)


def talk(runner, host) -> list[list[int]]:
    """Tokens of three turns with images and drawn tokens: prefill, reuse, truncation, new buckets."""
    conversation, sampler = Conversation(host, runner, LIMITS), Sampler(SamplingPlan(1.5, 50, 0.95, 4))
    asked = [("Read row 1.", [("p", image(1))]), ("How many?", []), ("And here?", [("q", image(2))])]
    return [list(conversation.ask(text, about, sampler, 9).ids) for text, about in asked]


def test_tokens_equal_onnxruntimes(engines, portable, host):
    runner, cuda = engine_runner(engines, host)
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    assert talk(runner, host) == talk(exact, host)
    assert runner.length == exact.length > BUCKETS[0]
    assert cuda.calls.count("launch") > 5
    assert len(cuda.graphs) >= 2, "captured anew for each length of past that was stepped through"


def test_logits_equal_those_of_the_exact_cache(engines, portable, host):
    """Bucketed, chunked, in place: the arithmetic differs by the order of sums alone."""
    prepared = host.prepare(image(3), "Read row 1.")
    runner, _ = engine_runner(engines, host)
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    features = [each.image_features(prepared.vision_feeds[0]) for each in (runner, exact)]
    np.testing.assert_array_equal(*features)
    logits = [each.extend(prepared.input_ids, features[0], prepared.positions) for each in (runner, exact)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_every_context_shares_one_block_as_large_as_the_largest_needs(engines, host, monkeypatch):
    made = []
    original = Engine.create_execution_context
    monkeypatch.setattr(Engine, "create_execution_context", lambda self, s: made.append(original(self, s)) or made[-1])
    _, cuda = engine_runner(engines, host)
    assert len({context.memory for context in made}) == 1
    assert len(made) == 5
    assert cuda.sizes[made[0].memory] == max(graph.memory_bytes for graph in engines.values())


def test_a_decode_step_is_one_launch_and_one_move_of_keys_and_values(engines, host):
    runner, cuda = engine_runner(engines, host)
    prepared = host.prepare(None, "Read row 1.")
    runner.extend(prepared.input_ids, np.zeros((0, 0), np.float32), prepared.positions)
    contexts = [runner.contexts[name].native for name in ("embed.decode", "decoder.decode")]
    steps = []
    for step in range(4):
        del cuda.calls[:]
        positions = np.full((host.axes, 1), prepared.next_position + step)
        runner.extend(prepared.input_ids[-1:], np.zeros((0, 0), np.float32), positions)
        steps.append([call for call in cuda.calls if call in ("run", "launch", "copy2d")])
    # The first runs plainly; the second is captured (two runs recorded) and launched; then launches alone.
    assert steps[0] == ["run", "run", "copy2d"]
    assert steps[1] == ["run", "run", "launch", "copy2d"]
    assert steps[2] == steps[3] == ["launch", "copy2d"]
    # A context that is told a shape or an address again may take it for a change, which a capture would record.
    told = [context.told for context in contexts]
    runner.extend(prepared.input_ids[-1:], np.zeros((0, 0), np.float32), np.full((host.axes, 1), runner.length))
    assert told == [context.told for context in contexts]


def test_a_watched_runner_waits_for_every_call_and_launches_nothing(engines, portable, host):
    seen = []

    class Watch:
        def begin(self, graph):
            seen.append(graph)

        def end(self, ms):
            assert ms >= 0

    runner, cuda = engine_runner(engines, host, watch=Watch())
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    assert talk(runner, host) == talk(exact, host)
    assert "launch" not in cuda.calls
    assert seen[0] == "vision"
    assert seen.count("decoder") > 9


def test_going_back_gives_the_same_again(engines, host):
    """What is beyond the filled places is masked: a truncated cache equals a fresh one."""
    runner, _ = engine_runner(engines, host)
    prepared = host.prepare(None, "Read row 1, column 2?")
    nothing = np.zeros((0, 0), np.float32)
    first = runner.extend(prepared.input_ids, nothing, prepared.positions)
    for _ in range(30):
        runner.extend(prepared.input_ids[-1:], nothing, np.full((host.axes, 1), runner.length))
    assert runner.length > BUCKETS[0]
    runner.truncate(4)
    again = runner.extend(prepared.input_ids[4:], nothing, prepared.positions[:, 4:])
    np.testing.assert_allclose(again, first, atol=1e-4)


def test_a_graph_is_launched_only_while_its_contexts_have_the_shapes_it_was_captured_with(engines, portable, host):
    """Stepped through two lengths of past and back: captured anew, and the graph before it is given back."""
    runner, cuda = engine_runner(engines, host)
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    prepared, logits = host.prepare(None, "Read row 1."), []
    nothing = np.zeros((0, 0), np.float32)
    for each in (runner, exact):
        each.extend(prepared.input_ids, nothing, prepared.positions)
        start = each.length
        for length in (*range(start, BUCKETS[0] + 6), *range(start, start + 4)):
            each.truncate(length)
            logits.append(each.extend(prepared.input_ids[-1:], nothing, np.full((host.axes, 1), length)))
    half = len(logits) // 2
    np.testing.assert_allclose(logits[:half], logits[half:], atol=1e-4)
    assert len(cuda.graphs) == 3
    assert cuda.alive == 1


def test_an_engine_that_refuses_a_capture_runs_plainly_and_that_is_said(engines, portable, host, monkeypatch):
    """TensorRT finds out while it captures: its trtexec goes on without a graph as well."""
    run = Context.execute_async_v3
    monkeypatch.setattr(
        Context, "execute_async_v3", lambda self, stream: self.engine.cuda.recording is None and run(self, stream)
    )
    runner, cuda = engine_runner(engines, host)
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph, and is slower: engine embed does not run") as said:
        assert talk(runner, host) == talk(exact, host)
    assert "launch" not in cuda.calls
    assert len(said) == 1, "tried once"


def test_a_context_that_cannot_be_captured_runs_plainly(engines, host, monkeypatch):
    """TensorRT for RTX says so of a context whose kernels it still compiles."""
    monkeypatch.setattr(Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    runner, cuda = engine_runner(engines, host)
    prepared = host.prepare(None, "Read row 1.")
    runner.extend(prepared.input_ids, np.zeros((0, 0), np.float32), prepared.positions)
    for step in range(4):
        positions = np.full((host.axes, 1), prepared.next_position + step)
        runner.extend(prepared.input_ids[-1:], np.zeros((0, 0), np.float32), positions)
    assert "launch" not in cuda.calls
    assert cuda.calls.count("run") == 2 + 2 * 4


def test_more_than_there_is_room_for_is_refused(engines, host):
    runner, _ = engine_runner(engines, host)
    with pytest.raises(BudgetError, match="0 tokens held and 161 more exceed the 160"):
        runner.extend(np.zeros(161, np.int64), np.zeros((0, 0), np.float32), np.zeros((host.axes, 161), np.int64))


def test_a_image_beyond_the_profile_is_refused_with_the_largest(engines, host):
    runner, _ = engine_runner(engines, host)
    feeds = host.image_feeds(image(1))
    large = {name: np.concatenate([array] * 50) for name, array in feeds.items()}
    with pytest.raises(InputDataError, match=r"engine vision: .* is refused .* the largest it is built for is"):
        runner.image_features(large)


@pytest.mark.gpu
@pytest.mark.rtx
def test_engines_on_a_gpu_answer_as_onnxruntime_does(line, host, profiles, portable, tmp_path):
    """TensorRT for RTX for real, where there is a GPU it builds for: engines, bindings, CUDA graphs."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (pip install tensorrt-rtx-cu13)")
    pytest.importorskip("cuda.bindings.runtime", reason="needs CUDA's Python bindings (pip install cuda-python)")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bundle = write_bundle({"portable": line.root / "portable"}, tmp_path / "bundle")
    sm = "{}{}".format(*torch.cuda.get_device_capability())
    try:
        build_engines(bundle, tmp_path / "e", "tensorrt_rtx", BuildOptions(sm=sm), profiles=profiles)
    except UnsupportedError as error:
        pytest.skip(str(error))
    runner = open_runner(bundle, tmp_path / "e", "tensorrt_rtx", host, 160)
    exact = GraphRunner(portable, host.settings["decoder"], host.axes, 160)
    prepared = host.prepare(image(3), "Read row 1.")
    logits = []
    for each in (runner, exact):
        features = each.image_features(prepared.vision_feeds[0])
        rows = [each.extend(prepared.input_ids, features, prepared.positions)]
        for step in range(5):
            positions = np.full((host.axes, 1), prepared.next_position + step)
            rows.append(each.extend(prepared.input_ids[-1:], np.zeros((0, 0), np.float32), positions))
        logits.append(np.stack(rows))
    np.testing.assert_allclose(*logits, atol=5e-3 * np.abs(logits[1]).max())  # TF32 may multiply


class TestDeviceGraphs:
    """The form that boards run: float16 cache, weights bound from the sidecar, on the CPU plugin."""

    @pytest.fixture
    def graphs(self, line):
        return device_functions(line.root / "device")

    def test_weights_are_bound_once_and_tokens_equal(self, line, graphs, profiles, host):
        simulated_engines = graphs_of_folder(line.root / "device", graphs, profiles)
        weights = line.root / "device" / SIDECAR
        runner, _ = engine_runner(simulated_engines, host, weights)
        reference = GraphRunner(device_graphs(line.root / "device"), host.settings["decoder"], host.axes, 160)
        prepared = host.prepare(image(1), "Read row 1.")
        tokens = []
        for each in (runner, reference):
            features = each.image_features(prepared.vision_feeds[0])
            logits = [each.extend(prepared.input_ids, features, prepared.positions)]
            for step in range(3):
                positions = np.full((host.axes, 1), prepared.next_position + step)
                logits.append(each.extend(prepared.input_ids[-1:], np.zeros((0, 0), np.float32), positions))
            tokens.append(np.stack(logits))
        assert np.isfinite(tokens[0]).all()
        # float16 matrix work in another order: a chunk's scores are summed with others.
        np.testing.assert_allclose(*tokens, atol=0.02 * np.abs(tokens[1]).max())

    def test_a_weight_that_no_engine_reads_is_refused(self, line, graphs, profiles, host, tmp_path):
        from safetensors.numpy import load_file, save_file

        tensors = load_file(line.root / "device" / SIDECAR)
        save_file(tensors | {"stray": np.zeros(4, np.float16)}, tmp_path / SIDECAR)
        simulated_engines = graphs_of_folder(line.root / "device", graphs, profiles)
        with pytest.raises(InputDataError, match="tensor stray is read by no engine"):
            engine_runner(simulated_engines, host, tmp_path / SIDECAR)
        first = sorted(tensors)[0]
        save_file(tensors | {first: tensors[first][:1].copy()}, tmp_path / SIDECAR)
        with pytest.raises(InputDataError, match=f"tensor {first} is .* reads"):
            engine_runner(simulated_engines, host, tmp_path / SIDECAR)
