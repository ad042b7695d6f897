"""Methods beside one another on the tiny model: what a row says is what was measured, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toolchain.bits.bitplan import plan as plan_bits
from toolchain.bits.bitplan import real_bits
from toolchain.calibration import self_answers as answering
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.folder import open_checkpoint
from toolchain.checkpoint.loading import load_model, load_quantized
from toolchain.cli import main
from toolchain.errors import InputDataError, UsageError
from toolchain.evaluate import compare
from toolchain.evaluate.answers import answer_log_probabilities, check_answers
from toolchain.evaluate.compare import CompareSettings, check_methods, compare_methods
from toolchain.models.configs import read_config
from toolchain.models.inventory import kept_parameters
from toolchain.models.registry import family_for
from toolchain.quantize.baselines.compared import ComparedGroup
from toolchain.quantize.baselines.dense import dense_bits, quantize_dense
from toolchain.quantize.baselines.registry import COMPARED, METHODS
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings, open_request
from toolchain.values import Sample

KEYS = {"method", "bits", "bytes", "kl", "kl_low", "kl_high", "accuracy", "seconds"}  # DESIGN section 8


@pytest.fixture(scope="module")
def samples(tiny_manifest) -> tuple[list[Sample], list[Sample]]:
    """(calibration, evaluation): three images each."""
    found = read_manifest(tiny_manifest)
    return found[:3], found[3:]


@pytest.fixture(scope="module")
def manifests(tiny_manifest, tmp_path_factory) -> tuple[Path, Path]:
    """Files of the same split, images named by their absolute paths."""
    folder = tmp_path_factory.mktemp("split")
    lines = [json.loads(line) for line in tiny_manifest.read_text(encoding="utf-8").splitlines()]
    for name, part in (("calib", lines[:3]), ("data", lines[3:])):
        named = [line | {"image": str(tiny_manifest.parent / line["image"])} for line in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named), encoding="utf-8")
    return folder / "calib.jsonl", folder / "data.jsonl"


@pytest.fixture(scope="module")
def rows(tiny_qwen2_vl, samples):
    return compare_methods(tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0, 3.0), methods=("rtn", "gptq", "vptq")))


@pytest.mark.parametrize("tokens", [3, 0])
def test_lines_without_answers_are_answered_once_for_all_methods(tiny_qwen2_vl, samples, monkeypatch, tokens):
    """Both kinds of method get the same lines, and neither asks the model again."""
    asked, given, taken = [], [], []
    greedy, quantize, dense = answering.greedy, compare.quantize_checkpoint, compare.quantize_dense

    def counted(host, graphs, prompts, most_tokens):
        asked.append((len(prompts), most_tokens))
        return greedy(host, graphs, prompts, most_tokens)

    def watched(base, lines, *arguments):
        given.extend(lines)
        return quantize(base, lines, *arguments)

    def watched_dense(request, *arguments):
        taken.extend(request.inputs)
        return dense(request, *arguments)

    monkeypatch.setattr(answering, "greedy", counted)
    monkeypatch.setattr(compare, "quantize_checkpoint", watched)
    monkeypatch.setattr(compare, "quantize_dense", watched_dense)
    bare = [replace(one, answer=None) for one in samples[0]]
    compare_methods(
        tiny_qwen2_vl, bare, samples[1], CompareSettings(bits=(2.0,), methods=("rtn", "vptq"), answer_tokens=tokens)
    )
    assert asked == ([(3, 3)] if tokens else [])
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    expected = [one.tensors["input_ids"].tolist() for one in calibration_inputs(processor, given)]
    assert [one.tensors["input_ids"].tolist() for one in taken] == expected
    assert len(given) == 3
    assert all((one.answer is None) == (tokens == 0) for one in given)


def test_full_precision_comes_first(rows, tiny_qwen2_vl):
    first = rows[0]
    assert (first["method"], first["kl"], first["kl_low"], first["kl_high"]) == ("fp", 0.0, 0.0, 0.0)
    assert first["bits"] == 16
    assert first["bytes"] == 2 * sum(p.numel() for p in load_model(tiny_qwen2_vl).parameters())


def test_a_row_for_every_method_and_average(rows):
    asked = [(average, method) for average in (2.0, 3.0) for method in ("rtn", "gptq", "vptq")]
    assert [(row["requested_bits"], row["method"]) for row in rows[1:]] == asked
    for row in rows:
        assert set(row) >= KEYS
        assert 0 <= row["accuracy"] <= 1
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
    json.dumps(rows)


def test_all_are_counted_alike(rows):
    for average in (2.0, 3.0):
        same = [row for row in rows if row["requested_bits"] == average]
        assert len({(row["language_bits"], row["index_bits"]) for row in same}) == 1
        assert same[0]["bytes"] == same[1]["bytes"]
        assert same[2]["bytes"] == same[0]["bytes"] + 2 * 512  # vptq's tokens have their places stored
        assert same[0]["index_bits"] == pytest.approx(average, abs=0.05)
        assert same[0]["bits"] > average


def test_more_bits_and_feedback_come_nearer(rows):
    kl = {(row["method"], row["requested_bits"]): row["kl"] for row in rows}
    for method in ("rtn", "gptq", "vptq"):
        assert kl[method, 3.0] < kl[method, 2.0]
    errors = {row["method"]: sum(x["relative_error"] for x in row["layers"] if not x["tied_to"]) for row in rows[1:4]}
    assert errors["gptq"] < errors["rtn"]
    assert errors["vptq"] < errors["rtn"]


def timeless(row):
    """A row without what depends on the clock."""
    seeds = [{k: v for k, v in one.items() if k != "seconds"} for one in row["per_seed"]]
    return {k: v for k, v in row.items() if k != "seconds"} | {"per_seed": seeds}


def test_the_same_seed_gives_the_same_rows(rows, tiny_qwen2_vl, samples):
    again = compare_methods(tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0,), methods=("vptq",)))
    expected = next(row for row in rows if row["method"] == "vptq")
    assert timeless(again[1]) == timeless(expected)


def test_seeds_are_averaged(rows, tiny_qwen2_vl, samples):
    """A row of two seeds against rows of each alone; what draws nothing is quantized once."""
    both = compare_methods(
        tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0,), methods=("rtn", "vptq"), seeds=(0, 1), against="rtn")
    )
    first = next(row for row in rows if row["method"] == "vptq")
    second = compare_methods(tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0,), methods=("vptq",), seeds=(1,)))[1]
    assert [row["seeds"] for row in both] == [[], [0], [0, 1]]
    mean = both[2]
    assert [one["kl"] for one in mean["per_seed"]] == [first["kl"], second["kl"]]
    assert first["kl"] != second["kl"]
    for key in ("kl", "accuracy", "bits", "bytes"):
        assert mean[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-5)
    for layer, *each in zip(mean["layers"], first["layers"], second["layers"]):
        assert layer["error_both"] == pytest.approx(sum(x["error_both"] for x in each) / 2)
    assert (both[1]["kl_ratio"], both[1]["kl_difference"]) == (1, 0)
    assert mean["against"] == "rtn"
    assert mean["kl_ratio"] == pytest.approx(mean["kl"] / both[1]["kl"])
    assert mean["kl_difference"] == pytest.approx(mean["kl"] - both[1]["kl"])
    assert mean["kl_ratio_low"] <= mean["kl_ratio"] <= mean["kl_ratio_high"]


def test_rows_are_held_against_the_first_of_ours():
    assert check_methods(["rtn", "mgvq-drift", "mgvq"])[1] == "mgvq-drift"
    assert check_methods(["rtn", "mgvq"], "rtn")[1] == "rtn"
    assert check_methods(["rtn", "gptq-rotated", "vptq"])[1] is None


def test_without_ours_nothing_is_held_against(rows):
    for row in rows:
        assert row["against"] is None
        assert row["kl_ratio"] is None


def test_layers_say_what_they_lose_by_modality(rows):
    """On random weights rounded to levels, both modalities lose most of a part where only one reaches."""
    parts = {"text": set(), "image": set()}
    for layer in rows[1]["layers"]:
        for name in parts:
            if layer[f"error_{name}"] is not None:
                parts[name].add(layer["part"])
        assert 0 < layer["error_both"] < 1.5
    assert parts == {"text": {"language", "embedding", "head"}, "image": {"language", "vision", "projector"}}
    head = rows[1]["layers"][-1]
    assert (head["name"], head["tied_to"], head["relative_error"]) == (
        "lm_head",
        "model.language_model.embed_tokens",
        None,
    )


def test_gptq_turned_is_gptq_or_better(rows, tiny_qwen2_vl, samples):
    """In the first layer, which sees the same inputs either way; stored bytes are the same."""
    turned = compare_methods(tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0,), methods=("gptq-rotated",)))[1]
    plain = rows[2]
    assert plain["method"] == "gptq"
    first = [(a, b) for a, b in zip(turned["layers"], plain["layers"]) if "patch_embed" in a["name"]]
    assert all(a["relative_error"] <= b["relative_error"] * (1 + 1e-6) for a, b in first)
    assert len(first) == 1
    assert turned["bytes"] == plain["bytes"] + 2 * 512  # its tokens have their places stored
    assert turned["index_bits"] == plain["index_bits"]


def test_another_family(tiny_internvl, samples):
    rows = compare_methods(tiny_internvl, *samples, CompareSettings(bits=(2.0,), methods=("vptq", "nearest")))
    layers = family_for(read_config(tiny_internvl)).layers(read_config(tiny_internvl))
    tokens = sum(layer.rows for layer in layers if layer.part in ("embedding", "head"))
    assert rows[1]["bytes"] - rows[2]["bytes"] == 2 * tokens
    assert all(0 < row["kl"] < 20 for row in rows[1:])


def test_answers_are_asked_token_by_token(tiny_qwen2_vl, samples):
    """Against the whole forward pass: every token of the answer and the stop token, at the position before it."""
    model, sample = load_model(tiny_qwen2_vl), samples[1][0]
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    found = answer_log_probabilities(model, processor, sample)
    inputs = processor.model_inputs(sample, with_answer=True)
    prompt = processor.model_inputs(sample)["input_ids"].shape[1]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[0, prompt - 1 : -1].log_softmax(dim=-1)
    assert inputs["input_ids"][0, -1] in processor.host.stop_ids
    torch.testing.assert_close(found, expected)


def dense_at_2_bits(folder, samples, method):
    base = open_checkpoint(folder)
    job = open_request(base, QuantizeSettings(bits=2.0))
    inputs = calibration_inputs(job.family.load_processor(folder), samples)
    return quantize_dense(replace(job, inputs=inputs), method)


def test_decoded_weights_are_put_where_they_belong(tiny_qwen2_vl, samples):
    found = dense_at_2_bits(tiny_qwen2_vl, samples[0], COMPARED["vptq"])
    dense = load_model(tiny_qwen2_vl)
    for layer in found.plan.layers:
        before, after = (model.get_parameter(f"{layer.name}.weight").detach() for model in (dense, found.model))
        assert 0 < float((before - after).norm()) < float(before.norm())
    for name in found.plan.kept:
        assert torch.equal(found.model.get_parameter(name), dense.get_parameter(name))
    assert torch.equal(found.model.lm_head.weight, found.model.get_input_embeddings().weight)
    assert [x.name for x in found.layers] == [x.name for x in found.layers if 0 < x.relative_error < 1]


def test_a_stored_method_comes_out_the_same_in_memory(tiny_qwen2_vl, samples, tmp_path):
    """Rounding to nearest looks at no input, so that both ways must agree bit for bit."""

    def decoded(weights, moment, code, options, generator):
        group = METHODS["rtn"](weights, moment, code, options, generator)
        size = code.codebook_bytes + sum(x.codes.numel() + 2 * x.rows for x in group.layers)
        return ComparedGroup(tuple(x.decode() for x in group.layers), group.errors, group.references, size)

    quantize_checkpoint(tiny_qwen2_vl, samples[0], tmp_path / "out", QuantizeSettings(method="rtn", bits=2.0))
    stored = load_quantized(tmp_path / "out")
    found = dense_at_2_bits(tiny_qwen2_vl, samples[0], decoded)
    for layer in found.plan.layers:
        weight = found.model.get_parameter(f"{layer.name}.weight").flatten(1)
        assert torch.equal(weight, stored.get_submodule(layer.name).weight.flatten(1))


def test_sorting_tokens_changes_no_place(tiny_qwen2_vl, samples):
    """A method that gives back what it got leaves the model as it is; the tokens' places are counted."""

    def nothing_lost(weights, moment, code, options, generator):
        seen.append(all(bool((w.norm(dim=1).diff() >= 0).all()) for w in weights))
        return ComparedGroup(tuple(weights), (0.0,) * len(weights), (1.0,) * len(weights), 0)

    seen: list[bool] = []
    found = dense_at_2_bits(tiny_qwen2_vl, samples[0], nothing_lost)
    dense = load_model(tiny_qwen2_vl)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name))
    assert seen.count(True) == 1
    assert found.bits["embedding"].bytes == 2 * 512


def test_bytes_of_groups_are_counted_as_the_format_counts(tiny_qwen2_vl):
    config = read_config(tiny_qwen2_vl)
    specs, model = family_for(config).layers(config), load_model(tiny_qwen2_vl)
    plan = plan_bits(specs, kept_parameters(model, specs), bits=2.5)
    sizes: dict[str, int] = {}
    for layer in plan.layers:
        if not layer.tied_to:
            table = 0 if layer.group in sizes else layer.vq_code.codebook_bytes
            sizes[layer.group] = sizes.get(layer.group, 0) + table + layer.codes_bytes + layer.scales_bytes
    assert dense_bits(plan, sizes) == real_bits(plan)


def refuse(error, words, *arguments, **changes):
    with pytest.raises(error, match=words):
        compare_methods(*arguments, CompareSettings(**{"bits": (2.0,), "methods": ("rtn",)} | changes))


def test_what_cannot_be_compared_is_refused(tiny_qwen2_vl, samples):
    calibration, evaluation = samples
    both = (tiny_qwen2_vl, calibration, evaluation)
    refuse(UsageError, "'awq' is not known; use one of mgvq, .*, vptq", *both, methods=["rtn", "awq"])
    refuse(UsageError, "'rtn' is named twice", *both, methods=["rtn", "gptq", "rtn"])
    refuse(UsageError, "no method to compare", *both, methods=[])
    refuse(UsageError, "against 'gptq': expected one of the methods compared, rtn", *both, against="gptq")
    refuse(UsageError, "unknown part 'nothing'", *both, methods=["mgvq-nothing"])
    refuse(UsageError, r"seeds \[1, 1\]: expected", *both, seeds=[1, 1])
    refuse(UsageError, r"seeds \[\]: expected", *both, seeds=[])
    refuse(UsageError, "bits 9: expected", *both, bits=[2.0, 9.0])
    shared = [*evaluation, calibration[1]]
    refuse(InputDataError, "same bytes as calibration image", tiny_qwen2_vl, calibration, shared)
    refuse(InputDataError, "does not exist", tiny_qwen2_vl / "nowhere", calibration, evaluation)


def test_samples_without_answers_are_refused(samples):
    image = samples[0][0].image
    with pytest.raises(InputDataError, match=r'sample 2 .* has no "answer"'):
        check_answers([Sample(image, "?", "x"), Sample(image, "?")])
    with pytest.raises(InputDataError, match="found none"):
        check_answers([])


def test_the_verb_writes_what_it_prints(capsys, tiny_qwen2_vl, manifests, tmp_path):
    calib, data = (str(path) for path in manifests)
    arguments = ["compare", "-m", str(tiny_qwen2_vl), "--calib", calib, "--data", data, "--methods", "rtn,nearest"]
    out = tmp_path / "out"
    assert main([*arguments, "--samples", "2", "-o", str(out), "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in printed["rows"]] == ["fp", "rtn", "nearest"]
    assert printed["questions"] == 2
    assert json.loads((out / "compare.json").read_text(encoding="utf-8")) == printed
    assert printed["seeds"] == [0]
    assert (out / "compare.svg").read_text(encoding="utf-8").count("<polyline") == 2
    assert main([*arguments, "-o", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_verb_prints_a_table(capsys, tiny_qwen2_vl, manifests):
    calib, data = (str(path) for path in manifests)
    arguments = ["compare", "-m", str(tiny_qwen2_vl), "--calib", calib, "--data", data, "--samples", "1"]
    assert main([*arguments, "--methods", "rtn,nearest", "--against", "nearest", "--seeds", "0,1"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    lines = first.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "fp", "rtn", "nearest"]
    assert "KL / nearest" in lines[0]
    assert "KL over seeds" in lines[0]
    assert "1.00 – 1.00" in lines[3]
    assert second.startswith("worst layers of nearest at 2 bits")
    found = [line.split()[0] for line in second.splitlines()[2:]]
    assert found == ["language"] * 2 + ["vision"] * 2 + ["projector"] * 2 + ["embedding", "head"]


def test_the_verb_refuses_what_is_no_number(capsys, tiny_qwen2_vl, manifests):
    calib, data = (str(path) for path in manifests)
    arguments = ["compare", "-m", str(tiny_qwen2_vl), "--calib", calib, "--data", data, "--methods", "rtn"]
    assert main([*arguments, "--bits", "two"]) == 2
    assert "--bits 'two': expected numbers" in capsys.readouterr().err
    assert main([*arguments, "--seeds", "0,1.5"]) == 2
    assert "--seeds '0,1.5': expected whole numbers" in capsys.readouterr().err


def test_eval_measures_the_divergence_from_a_reference(capsys, tiny_qwen2_vl, manifests):
    arguments = ["eval", "-m", str(tiny_qwen2_vl), "--data", str(manifests[1]), "--format", "json"]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    assert "kl" not in json.loads(capsys.readouterr().out)
    assert main([*arguments, "--max-new-tokens", "2", "--reference", str(tiny_qwen2_vl)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kl"], found["kl_low"], found["kl_high"]) == (0.0, 0.0, 0.0)
    assert "layers" not in found


def test_eval_measures_layers(capsys, tiny_qwen2_vl, manifests, samples, tmp_path):
    """What eval says of a checkpoint is what compare said of the same one."""
    arguments = ["eval", "--data", str(manifests[1]), "--max-new-tokens", "2", "--layers"]
    assert main([*arguments, "-m", str(tiny_qwen2_vl)]) == 2
    assert "add --reference" in capsys.readouterr().err
    assert main([*arguments, "-m", str(tiny_qwen2_vl), "--reference", str(tiny_qwen2_vl)]) == 2
    assert "no layer of the model is quantized" in capsys.readouterr().err
    quantize_checkpoint(tiny_qwen2_vl, samples[0], tmp_path / "out", QuantizeSettings(method="rtn", bits=2.0))
    arguments += ["-m", str(tmp_path / "out"), "--reference", str(tiny_qwen2_vl)]
    assert main([*arguments, "--format", "json"]) == 0
    found = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    row = compare_methods(tiny_qwen2_vl, *samples, CompareSettings(bits=(2.0,), methods=("rtn",)))[1]
    assert {layer["name"] for layer in row["layers"]} == set(found)
    for layer in row["layers"]:
        assert found[layer["name"]]["error_both"] == pytest.approx(layer["error_both"], rel=1e-4)
        assert found[layer["name"]]["code"] == layer["code"]
    assert main(arguments) == 0
    assert "worst layers" in capsys.readouterr().out
