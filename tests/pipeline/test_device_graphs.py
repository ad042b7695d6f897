"""What a device asks of the graphs: a cache in buckets, named sizes, tiled attention; a compiler that takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from recorded_lines import GRAPHS, against, prompts_of
from rtx_engines import rtx_engine

from toolchain.device.engines.recorded_calls import record_calls
from toolchain.device.generation.answer import CachePlan, greedy
from toolchain.device.generation.ort_graphs import ort_graphs
from toolchain.graph import rewrite as pipeline
from toolchain.graph.op.plugin_op import device_graphs
from toolchain.graph.rewrite import (
    RewriteOptions,
    compute_passes,
    device_form,
    import_graph,
    portable_form,
    reference_paths,
    save_graph,
)
from toolchain.graph.validate import mixed_batches
from toolchain.models.configs import read_config


def free_sizes(path: Path) -> dict[str, list]:
    """Every input and output's shape, names for free sizes."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        x.name: [dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim]
        for x in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize("form", ["reference", "portable", "device"])
def test_every_free_size_has_a_name_and_logits_are_of_the_last_position(line, form):
    shapes = free_sizes(line.root / form / "decoder.onnx")
    assert shapes["past.0.key"][:2] == ["past", "batch"]
    assert shapes["present.1.value"][:2] == ["sequence", "batch"]
    assert shapes["attention_mask"] == ["batch", "attention_mask.1"]
    assert shapes["logits"][0] == "batch"
    assert len(shapes["logits"]) == 2
    assert all(size for shape in shapes.values() for size in shape)


def test_the_cache_crosses_a_device_graphs_border_in_float16(line):
    graph = onnx.load(line.root / "device" / "decoder.onnx").graph
    types = {x.name: x.type.tensor_type.elem_type for x in (*graph.input, *graph.output)}
    cache = {kind for name, kind in types.items() if name.startswith(("past.", "present."))}
    assert cache == {onnx.TensorProto.FLOAT16}
    assert types["inputs_embeds"] == types["logits"] == onnx.TensorProto.FLOAT


# Loops, and sizes that only the device knows: no CUDA graph can hold them. TensorRT 10.3 makes a loop of CumSum.
NOT_CAPTURED = {"CumSum", "GRU", "If", "LSTM", "Loop", "NonMaxSuppression", "NonZero", "RNN", "Scan", "Unique"}


@pytest.mark.parametrize("form", ["portable", "device"])
def test_no_operator_keeps_a_step_out_of_a_cuda_graph(line, form):
    for name in ("vision", "embed", "decoder"):
        model = onnx.load(line.root / form / f"{name}.onnx", load_external_data=False)
        nodes = [*model.graph.node, *(node for body in model.functions for node in body.node)]
        assert not {node.op_type for node in nodes} & NOT_CAPTURED, name


def test_past_and_new_keys_are_never_joined(line):
    """Only scores, their mask and their shares are as long as past and new together: the cache is read in place."""
    graph = onnx.load(line.root / "reference" / "decoder.onnx", load_external_data=False).graph
    head_size = free_sizes(line.root / "reference" / "decoder.onnx")["past.0.key"][3]
    for value in graph.value_info:
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert not ("sequence + past" in sizes and head_size in sizes), value.name


def decoder_outputs(line, graphs, plan: CachePlan | None) -> list[dict[str, np.ndarray]]:
    """Outputs over prefill and three steps of a padded pair; keys and values of a prefill in one piece."""
    calls = record_calls(line.host, graphs, mixed_batches(prompts_of(line, 2))[-1:], 3, plan)
    decoder = [call for call in calls if call.graph == "decoder"]
    pieces = len(decoder) - 3
    first = {
        name: np.concatenate([call.outputs[name] for call in decoder[:pieces]])
        for name in decoder[0].outputs
        if name.startswith("present.")
    }
    first["logits"] = decoder[pieces - 1].outputs["logits"]
    return [first, *({n: x for n, x in c.outputs.items() if n in first} for c in decoder[pieces:])]


@pytest.mark.parametrize(
    "plan", [CachePlan((256,)), CachePlan((128, 256, 512), chunk=16), CachePlan((), chunk=7)], ids=str
)
@pytest.mark.parametrize("form", ["portable", "device"])
def test_buckets_and_chunks_change_no_output(line, form, plan):
    """What is hidden adds exact zeros; only the order of summation differs. Padding's own keys do not count."""
    graphs = ort_graphs(line.root / form) if form == "portable" else device_graphs(line.root / form, "float32")
    batch = line.host.collate(mixed_batches(prompts_of(line, 2))[-1])
    real = batch.attention_mask.T > 0
    for step, (expected, found) in enumerate(
        zip(decoder_outputs(line, graphs, None), decoder_outputs(line, graphs, plan), strict=True)
    ):
        for name in expected:
            keep = real if step == 0 and name != "logits" else slice(None)
            a, b = expected[name][keep], found[name][keep]
            assert np.linalg.norm(a - b) <= 3e-6 * np.linalg.norm(a), (step, name)


def test_answers_with_a_devices_cache_plan_are_the_same(line):
    graphs, prompts = ort_graphs(line.root / "portable"), prompts_of(line, 3)
    plan = CachePlan.from_settings(line.host.settings["decoder"])
    assert plan.buckets
    assert plan.chunk
    assert greedy(line.host, graphs, prompts, 8, plan=plan) == greedy(line.host, graphs, prompts, 8)


def test_what_a_device_calls_lies_in_its_profiles(line):
    """Prefill and decode each in its own profile, and decode has nothing free but the bucket."""
    profiles = line.family.profiles(read_config(line.model), line.model)
    plan = CachePlan.from_settings(line.host.settings["decoder"])
    calls = record_calls(line.host, ort_graphs(line.root / "portable"), mixed_batches(prompts_of(line, 2))[:1], 2, plan)
    for call in (call for call in calls if call.graph == "decoder"):
        name = "decoder" if call.step.endswith("prefill") else "decoder.decode"
        assert set(call.feeds) == set(profiles[name])
        for tensor, (low, _, high) in profiles[name].items():
            shape = call.feeds[tensor].shape
            assert all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)), (name, tensor)
    decode = profiles["decoder.decode"]
    free = {name for name, (low, _, high) in decode.items() if low != high}
    assert free == {"attention_mask", *(name for name in decode if name.startswith("past."))}
    covered = profiles["decoder"]
    assert all(covered[name][0] <= low and high <= covered[name][2] for name, (low, _, high) in decode.items())


def largest_scores(path: Path, feeds, run) -> int:
    """Bytes of the largest attention score tensor (a Softmax's input) of a call."""
    model = onnx.load(path)
    names = [node.input[0] for node in model.graph.node if node.op_type == "Softmax"]
    return max(np.asarray(x).nbytes for x in run(model, names, feeds))


def in_onnxruntime(model: onnx.ModelProto, names: list[str], feeds) -> list[np.ndarray]:
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(names, feeds)


def test_attention_over_the_largest_image_is_tiled(line, recorded, tmp_path):
    """In both forms no score tensor exceeds the limit, and image features are the same."""
    call = max((c for c in recorded if c.graph == "vision"), key=lambda c: c.feeds["pixel_values"].size)
    profiles = {"vision": {name: [array.shape] * 3 for name, array in call.feeds.items()}}
    whole = largest_scores(line.root / "portable" / "vision.onnx", call.feeds, in_onnxruntime)
    limit = whole // 4
    options = RewriteOptions.for_profiles(profiles, scores_bytes=limit)
    for name in ("portable", "device"):
        (tmp_path / name).mkdir()
    portable_form(line.root / "reference", tmp_path / "portable", options)
    report = device_form(line.root / "reference", tmp_path / "device", options)
    tiled = {x.name: x for graph in report.graphs if graph.name == "vision" for x in graph.passes}["tile_queries"]
    assert len(tiled.done) == 2
    assert not tiled.refused
    row = whole // call.feeds["pixel_values"].shape[0] if whole else 0
    assert largest_scores(tmp_path / "portable" / "vision.onnx", call.feeds, in_onnxruntime) <= limit + row
    against("portable", {"vision": ort_graphs(tmp_path / "portable")["vision"]}, [call]).require()
    against("device", {"vision": device_graphs(tmp_path / "device", "float32")["vision"]}, [call]).require()


def device_arithmetic(line, folder: Path, options: RewriteOptions) -> Path:
    """The device form's graphs with their bodies left in, so that a builder without plugins can compile them."""
    for path in reference_paths(line.root / "reference"):
        graph, taps = import_graph(path)
        for run in compute_passes(taps, path.stem, options):
            run(graph)
        pipeline._embed_constants(graph)
        save_graph(graph, folder / path.name)
    return folder


@pytest.mark.rtx
@pytest.mark.parametrize("sm", ["86", "89", "120"])
def test_tensorrt_for_rtx_compiles_the_portable_graphs_without_a_gpu(line, sm, capsys):
    profiles = line.family.profiles(read_config(line.model), line.model)
    shapes = {name: [profiles[name]] for name in GRAPHS}
    shapes["decoder"].append(profiles["decoder.decode"])
    found = {name: rtx_engine(line.root / "portable" / f"{name}.onnx", shapes[name], sm) for name in GRAPHS}
    with capsys.disabled():
        print(f"\n{line.model.name} SM{sm} engine bytes: {found}")
    assert min(found.values()) > 0


@pytest.mark.rtx
def test_tensorrt_for_rtx_compiles_the_device_forms_arithmetic(line, tmp_path):
    """Float16 casts, fused nodes, tiles, a float16 cache, strongly typed; the decoder's profiles in one engine."""
    profiles = line.family.profiles(read_config(line.model), line.model)
    folder = device_arithmetic(line, tmp_path, RewriteOptions.for_profiles(profiles, scores_bytes=50_000))
    vision = onnx.load(folder / "vision.onnx", load_external_data=False).graph
    if line.family.name == "qwen2_vl":  # InternVL's images of 17 positions have small scores
        assert any(".tile.1/" in node.name for node in vision.node)
    for name in GRAPHS:
        both = [profiles[key] for key in (name, f"{name}.decode") if key in profiles]
        assert rtx_engine(folder / f"{name}.onnx", both, "86") > 0
