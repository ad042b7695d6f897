"""The three choices of codebooks, end to end: what is stored, what it costs, and that all that reads it agrees."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from heard_progress import Stops
from quantized_tiny import quantized_tiny
from safetensors.torch import load_file

from toolchain.bits.bitplan import real_bits
from toolchain.bits.codebook_sharing import UNIVERSAL, shared_codebook_id
from toolchain.bundle.manifest import write_bundle
from toolchain.calibration.gradients import answer_scores
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.install import CODEBOOKS
from toolchain.checkpoint.loading import load_model, load_quantized
from toolchain.checkpoint.modules import decode_weight, vq_modules
from toolchain.errors import UsageError
from toolchain.files.store import ObjectStore
from toolchain.graph.export import reference_graphs_from_model
from toolchain.graph.rewrite import device_form
from toolchain.graph.validate import validate_line
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.quantize.refine.kl_gradients import teacher_scores
from toolchain.quantize.refine.rounds import RoundOptions, Statistics, jacobi_round
from toolchain.run.inspection import inspect_folder
from toolchain.values import CODES, SILENT
from toolchain.vq import format as vq_format
from toolchain.vq.universal_codebooks import universal_codebooks
from toolchain.vq.weights import FixedCodebook, Options

FAST = Options(rounds=1, lloyd_rounds=2, samples=1_000)
SEGMENTS = ("*.layers.0.mlp.down_proj", "2,8,9@64+2,3,8")
UNIVERSAL_BYTES = {shared_codebook_id(UNIVERSAL, code): one.stored for code, one in universal_codebooks().items()}
# Codes by rate and not by sensitivity, so that plans of all choices have the same codes.
METHODS = {"group": "mgvq-mix", "part": "mgvq-mix+codebooks=part", "universal": "mgvq-mix+descent+codebooks=universal"}


def quantized(model, manifest, out, method, progress=SILENT, options=FAST, **limits):
    settings = QuantizeSettings(method=method, options=options, **limits)
    return quantize_checkpoint(model, read_manifest(manifest), out, settings, progress)


def codebooks_of(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(f"{CODEBOOKS}."): x for name, x in tensors.items() if name.startswith(f"{CODEBOOKS}.")}


@pytest.fixture(scope="module")
def made(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    """Choice → result, with one layer in segments. Read only."""
    root = tmp_path_factory.mktemp("codebooks")
    limits = {"bits": 2.25, "overrides": [SEGMENTS]}
    return {
        name: quantized(tiny_qwen2_vl, tiny_manifest, root / name, method, **limits) for name, method in METHODS.items()
    }


def test_every_codebook_is_stored_and_counted_once(made):
    sizes = {}
    for name, result in made.items():
        stored, planned = codebooks_of(result.folder), result.plan.codebooks()
        assert set(stored) == set(planned)
        sizes[name] = sum(codebook.nbytes for codebook in stored.values())
        assert sizes[name] == sum(code.codebook_bytes for code in planned.values())
    assert len({tuple(layer.code for layer in result.plan.layers) for result in made.values()}) == 1
    bytes_in_all = {name: real_bits(result.plan)["total"].bytes for name, result in made.items()}
    assert bytes_in_all["group"] - bytes_in_all["part"] == sizes["group"] - sizes["part"] > 0
    assert bytes_in_all["part"] - bytes_in_all["universal"] == sizes["part"] - sizes["universal"] > 0


def test_codebooks_are_those_of_the_choice(made):
    universal, part = (codebooks_of(made[name].folder) for name in ("universal", "part"))
    assert all(torch.equal(codebook, UNIVERSAL_BYTES[name]) for name, codebook in universal.items())
    owners = {layer.part for layer in made["part"].plan.layers if not layer.tied_to}
    assert {name.split("_")[0] for name in part} == owners
    assert not any(
        torch.equal(codebook, UNIVERSAL_BYTES[f"universal_{n.split('_', 1)[1]}"]) for n, codebook in part.items()
    )
    (cut,) = [layer for layer in made["part"].plan.layers if layer.segments]
    assert cut.table == "language_2_8_9+language_2_3_8"


@pytest.mark.parametrize("name", METHODS)
def test_what_is_stored_decodes_as_the_format_says(made, name):
    model = load_quantized(made[name].folder)
    for module in vq_modules(model).values():
        stored = (module.codes, module.codebook, module.scales, module.code, module.rows, module.columns)
        defined = vq_format.decode(*(x.numpy() for x in stored[:3]), *stored[3:])
        assert torch.equal(decode_weight(*stored, torch.float32), torch.from_numpy(defined))
        assert module.codebook is model.get_submodule(CODEBOOKS).get_buffer(module.codebook_id)


@pytest.mark.parametrize("name", ["part", "universal"])
def test_transformers_loads_shared_codebooks(made, tiny_qwen2_vl, tiny_manifest, name):
    from transformers import AutoModelForImageTextToText

    import toolchain.checkpoint.hf  # noqa: F401  registers the format

    folder = made[name].folder
    ours, theirs = load_quantized(folder), AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    one = calibration_inputs(processor, read_manifest(tiny_manifest))[0]
    with torch.no_grad():
        assert torch.equal(answer_scores(ours, one), answer_scores(theirs.eval(), one))


def test_inspect_says_whose_the_codebooks_are(made):
    data, text = inspect_folder(made["universal"].folder)
    assert data["codebooks"] == {n: CODES[str(c)].codebook_bytes for n, c in made["universal"].plan.codebooks().items()}
    assert f"codebooks: {len(data['codebooks'])}, {sum(data['codebooks'].values()):,} bytes" in text


def test_universal_codebooks_do_not_depend_on_the_model(tiny_internvl, tiny_manifest, tmp_path):
    """Nor on what is done to the whole model after the sweep."""
    result = quantized(tiny_internvl, tiny_manifest, tmp_path / "q", "mgvq-mix+tune+codebooks=universal", bits=2.25)
    tuned = json.loads((result.folder / "refinement.json").read_text())["tune"]
    stored = codebooks_of(result.folder)
    assert tuned["improved"]
    assert len(stored) > 1
    assert all(torch.equal(codebook, UNIVERSAL_BYTES[name]) for name, codebook in stored.items())


def test_a_plan_by_sensitivity_shares_codebooks_within_its_budget(tiny_qwen2_vl, tiny_manifest, tmp_path):
    looks = replace(FAST, segment_spread=1.0)  # every group is worth a look at its segments
    limits = {"bits": None, "budget_bytes": 100_000, "options": looks}
    result = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", "mgvq+segments+codebooks=universal", **limits)
    assert 99_000 < real_bits(result.plan)["total"].bytes <= 100_000
    assert set(codebooks_of(result.folder)) == set(result.plan.codebooks()) <= set(UNIVERSAL_BYTES)


def test_a_part_codebook_moves_for_all_its_users_when_it_is_tuned(made, tiny_qwen2_vl, tiny_manifest, tmp_path):
    method = "mgvq-mix+tune+codebooks=part"
    result = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", method, bits=2.25, overrides=[SEGMENTS])
    tuned = json.loads((result.folder / "refinement.json").read_text())["tune"]
    assert tuned["loss_after"] <= tuned["loss_before"]
    before, after = codebooks_of(made["part"].folder), codebooks_of(result.folder)
    assert before.keys() == after.keys()
    assert tuned["improved"] == any(not torch.equal(before[name], after[name]) for name in before)


def test_rounds_leave_codebooks_that_several_groups_use(tiny_qwen2_vl, tiny_manifest, tmp_path):
    """Even where nobody says so: a group that refitted a shared codebook would spoil the others' weights."""
    model, specs, plan = quantized_tiny(tiny_qwen2_vl, "2,4,8", UNIVERSAL)
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    inputs = calibration_inputs(processor, read_manifest(tiny_manifest))
    scores = teacher_scores(load_model(tiny_qwen2_vl).requires_grad_(False), inputs)
    language = [spec for spec in specs if spec.part == "language"]
    white = Statistics(lambda asked: {spec.group: torch.eye(spec.columns) for spec in asked}, lambda asked: {}, 0)
    pieces = ObjectStore(tmp_path / "run", {}).under("round")
    before = copy.deepcopy(model.state_dict())
    result = jacobi_round(model, scores, inputs, white, language, plan, pieces, RoundOptions(steps=(0.5,)), seed=0)
    after = model.state_dict()
    assert torch.equal(after[f"{CODEBOOKS}.universal_2_4_8"], before[f"{CODEBOOKS}.universal_2_4_8"])
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert bool(changed) == (result.step > 0)


@pytest.mark.parametrize("choice", ["part", "universal"])
def test_a_run_that_goes_on_ends_in_the_same_bytes(made, tiny_qwen2_vl, tiny_manifest, tmp_path, choice, monkeypatch):
    settings = {"method": METHODS[choice], "bits": 2.25, "overrides": [SEGMENTS]}
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", progress=Stops(layers_done=4), **settings)
    assert bool(list((tmp_path / "q.partial").glob("*/codebooks.*.safetensors"))) == (choice == "part")
    monkeypatch.setattr("toolchain.vq.shared_codebooks.Pool.codebook", None)  # what was trained is not trained again
    again = quantized(tiny_qwen2_vl, tiny_manifest, tmp_path / "q", resume="required", **settings)
    for name in ("model.safetensors", "bitplan.json", "config.json"):
        assert (again.folder / name).read_bytes() == (made[choice].folder / name).read_bytes(), name


def test_graphs_hold_each_shared_codebook_once_and_agree(made, tiny_qwen2_vl, tiny_manifest, tmp_path):
    family, quantized_folder = family_for(read_config(tiny_qwen2_vl)), made["universal"].folder
    for name in ("reference", "device"):
        (tmp_path / name).mkdir()
    reference_graphs_from_model(load_quantized(quantized_folder), family, tmp_path / "reference")
    device_form(tmp_path / "reference", tmp_path / "device")
    names = {n for n in load_file(tmp_path / "device" / "weights.safetensors") if n.startswith(CODEBOOKS)}
    assert names == {f"{CODEBOOKS}.{codebook}" for codebook in made["universal"].plan.codebooks()}
    stages = (tiny_qwen2_vl, quantized_folder, tmp_path / "reference", tmp_path / "device")
    result = validate_line(family, *stages, read_manifest(tiny_manifest)[:2], tmp_path, steps=1)
    assert result.passed
    pieces = {"device": tmp_path / "device", "bitplan.json": quantized_folder / "bitplan.json"}
    bundle = write_bundle(pieces, tmp_path / "bundle", target={"name": "x"})
    assert inspect_folder(bundle.folder)[0]["codebooks"].keys() == made["universal"].plan.codebooks().keys()


def test_codebooks_in_the_options_are_refused(tiny_qwen2_vl, tiny_manifest, tmp_path):
    options = Options(codebooks={CODES["2,4,8"]: FixedCodebook(torch.zeros(256, 2, dtype=torch.float16), 1.0)})
    with pytest.raises(UsageError, match=r"options.codebooks: expected none, found 1; .* mgvq\+codebooks=universal"):
        quantize_checkpoint(
            tiny_qwen2_vl, read_manifest(tiny_manifest), tmp_path / "q", QuantizeSettings(options=options)
        )
