from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import toolchain.checkpoint.hf  # noqa: F401 - registers the quantization method
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_quantized
from toolchain.checkpoint.modules import vq_modules
from toolchain.checkpoint.segmented import vq_layers
from toolchain.errors import InputDataError
from toolchain.models.registry import family_for
from toolchain.quantize.checkpoint import quantize_checkpoint
from toolchain.quantize.driver.request import QuantizeSettings
from toolchain.vq.weights import Options


@pytest.fixture(scope="module")
def quantized(tiny_qwen2_vl, tiny_manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "out"
    quantize_checkpoint(tiny_qwen2_vl, read_manifest(tiny_manifest), out, QuantizeSettings(method="rtn", bits=2.5))
    return out


@pytest.fixture(scope="module")
def inputs(quantized, tiny_manifest):
    processor = family_for({"model_type": "qwen2_vl"}).load_processor(quantized)
    return processor.model_inputs(read_manifest(tiny_manifest)[0])


def load(folder, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_buffers(first, second):
    ours, theirs = vq_modules(first), vq_modules(second)
    assert set(ours) == set(theirs)
    for name, module in ours.items():
        for kind in ("codes", "scales", "codebook"):
            mine, other = getattr(module, kind), getattr(theirs[name], kind)
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)


def test_from_pretrained_equals_our_loader_bit_for_bit(quantized, inputs):
    ours, theirs = load_quantized(quantized), load(quantized)
    assert_same_buffers(ours, theirs)
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))
    assert theirs.lm_head.codes is theirs.get_input_embeddings().codes


def test_generate_gives_the_same_tokens(quantized, inputs):
    found = [m.generate(**inputs, max_new_tokens=6) for m in (load_quantized(quantized), load(quantized))]
    assert torch.equal(*found)


def test_save_pretrained_round_trip(quantized, inputs, tmp_path):
    first = load(quantized)
    first.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same_buffers(first, again)
    assert torch.equal(logits(first, inputs), logits(again, inputs))
    stored, original = (load_file(f / "model.safetensors") for f in (tmp_path / "again", quantized))
    assert set(stored) == set(original)
    assert torch.equal(logits(load_quantized(tmp_path / "again"), inputs), logits(first, inputs))


def test_a_narrower_dtype_leaves_the_format_alone(quantized, inputs):
    model = load(quantized, torch.bfloat16)
    assert_same_buffers(load_quantized(quantized), model)
    pixels = {name: t.bfloat16() if t.is_floating_point() else t for name, t in inputs.items()}
    assert logits(model, pixels).dtype == torch.bfloat16


def test_a_missing_tensor_is_refused(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.visual.blocks.0.mlp.fc1.codes"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputDataError, match=r"lacks 1 tensors .model\.visual\.blocks\.0\.mlp\.fc1\.codes"):
        load(folder)


def test_a_checkpoint_with_segments_loads_as_any_other(tiny_qwen2_vl, tiny_manifest, tmp_path, inputs):
    """Names, biases and codebooks are those of the plan; saved again, it is the same checkpoint."""
    text = "2,6,8@64+2,4,8"
    options = Options(rounds=1, lloyd_rounds=1, samples=500)
    out = tmp_path / "q"
    quantize_checkpoint(
        tiny_qwen2_vl,
        read_manifest(tiny_manifest),
        out,
        QuantizeSettings(bits=2.5, overrides=[("*.down_proj", text)], options=options),
    )
    model = load(out)
    assert {m.code for name, m in vq_layers(model).items() if name.endswith("down_proj")} == {text}
    assert torch.equal(logits(model, inputs), logits(load_quantized(out), inputs))
    model.save_pretrained(tmp_path / "again")
    stored, again = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert set(stored) == set(again)
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
    assert any(".down_proj.segments.1.codes" in name for name in stored)
