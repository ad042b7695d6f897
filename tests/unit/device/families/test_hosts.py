"""The host halves equal what transformers' own processors and models compute: pixels, ids, positions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from PIL import Image
from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.image_utils import load_image

from toolchain.device.families import host_from_folder
from toolchain.device.families.base import open_image
from toolchain.device.families.images import patches_from_image
from toolchain.device.families.internvl import InternVLHost
from toolchain.errors import InputDataError, UnsupportedError
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.plan.images import ImagePlan, resized_shape, tile_grid

SIZES = [(56, 56), (99, 87), (31, 200), (224, 140), (641, 479)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def qwen_host(folder):
    config = read_config(folder)
    return family_for(config).load_host(config, folder)


@pytest.mark.parametrize("size", SIZES)
def test_qwen2_vl_patches_equal_the_image_processor(size):
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 168)
    expected = processor(images=[noise(*size)], return_tensors="np")
    patches, grid = patches_from_image(noise(*size), ImagePlan(56 * 56, 112 * 168))
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    np.testing.assert_array_equal(patches, expected["pixel_values"])


def test_qwen2_vl_ids_equal_tokenizer_and_template(tiny_qwen2_vl):
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2_vl)
    content = [{"type": "image"}, {"type": "text", "text": "What is in row 1, column 2?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    prepared = qwen_host(tiny_qwen2_vl).prepare(noise(99, 87), "What is in row 1, column 2?")
    tokens = prepared.vision_feeds[0]["pixel_values"].shape[0] // 4
    expected = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens))["input_ids"]
    assert prepared.input_ids.tolist() == expected


@pytest.mark.parametrize("size", [(84, 56), (56, 112), (112, 112)])
def test_qwen2_vl_positions_equal_the_model(tiny_qwen2_vl, size):
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_qwen2_vl)
    prepared = qwen_host(tiny_qwen2_vl).prepare(noise(*size), "Read row 1.")
    ids = torch.from_numpy(prepared.input_ids)[None]
    grid = torch.tensor([[1, size[1] // 14, size[0] // 14]])
    is_image = (ids == model.config.image_token_id).int()
    expected, delta = model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid)
    np.testing.assert_array_equal(prepared.positions, expected[:, 0].numpy())
    assert prepared.next_position == ids.shape[1] + int(delta)


def test_text_alone_counts_up(tiny_qwen2_vl):
    prepared = qwen_host(tiny_qwen2_vl).prepare(None, "Read row 1.")
    assert prepared.vision_feeds == ()
    assert prepared.positions.tolist() == [list(range(prepared.length))] * 3


@pytest.mark.parametrize("size", [*SIZES, (300, 100), (100, 290)])
def test_internvl_tiles_equal_the_image_processor(tiny_internvl, size):
    processor = GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    expected = processor(images=[noise(*size)], return_tensors="np")["pixel_values"]
    config = read_config(tiny_internvl)
    tiles = family_for(config).load_host(config, tiny_internvl).tiles(noise(*size))
    np.testing.assert_array_equal(tiles, np.stack(list(expected)))


# Of any size and shape a camera gives: both sides of every rounding, tiny images and those beyond the limits.
SIDES = strategies.integers(8, 640)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=SIDES, height=SIDES)
def test_qwen2_vl_patches_of_any_size_equal_the_image_processors(width, height):
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 168)
    expected = processor(images=[noise(width, height)], return_tensors="np")
    patches, grid = patches_from_image(noise(width, height), ImagePlan(56 * 56, 112 * 168))
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    np.testing.assert_array_equal(patches, expected["pixel_values"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=SIDES, height=SIDES)
def test_internvl_tiles_of_any_size_equal_the_image_processors(width, height):
    size, image = {"height": 28, "width": 28}, {"tile": 28, "min_tiles": 1, "max_tiles": 12}
    processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    expected = processor(images=[noise(width, height)], return_tensors="np")["pixel_values"]
    host = SimpleNamespace(settings={"image": image | {"mean": processor.image_mean, "std": processor.image_std}})
    np.testing.assert_array_equal(InternVLHost.tiles(host, noise(width, height)), np.stack(list(expected)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_a_file_is_opened_as_transformers_opens_it(tmp_path, mode, orientation):
    """Cameras store images as the sensor lay, and how to turn them beside it (EXIF)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    noise(40, 24).convert(mode).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


def test_tile_grid_worked_by_hand():
    # twice as wide as tall: two tiles side by side; a large square takes more tiles of the same shape than a small one
    assert tile_grid(200, 100, 56, 1, 6) == (2, 1)
    assert tile_grid(56, 56, 56, 1, 6) == (1, 1)
    assert tile_grid(200, 200, 56, 1, 6) == (2, 2)


def test_sides_too_different_are_refused():
    with pytest.raises(InputDataError, match="factor of 200"):
        resized_shape(10, 3000, ImagePlan(56 * 56, 112 * 112))


def test_unreadable_images_are_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    with pytest.raises(InputDataError, match=r"broken\.png cannot be read"):
        open_image(broken)
    with pytest.raises(InputDataError, match="does not exist"):
        open_image(tmp_path / "missing.png")


def test_host_folder_is_checked(tmp_path):
    with pytest.raises(InputDataError, match=r"missing \['host.json', 'tokenizer.json', 'chat_template.jinja'\]"):
        host_from_folder(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "host.json").write_text('{"family": "moondream"}')
    with pytest.raises(UnsupportedError, match="family 'moondream' is not one of"):
        host_from_folder(tmp_path)
