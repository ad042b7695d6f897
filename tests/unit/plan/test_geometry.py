"""Geometry: what config.json says, and what images of several sizes cost."""

from __future__ import annotations

import pytest
from published_models import INTERNVL_1B, QWEN2_VL_2B, qwen2_vl_2b

from toolchain.errors import InputDataError
from toolchain.plan.geometry import image_work, internvl_geometry, qwen2_vl_geometry


def test_qwen2_vl_2b_has_its_published_weight_counts():
    geometry = qwen2_vl_2b()
    assert geometry.language_weights == pytest.approx(1310.2e6, rel=0.001)
    assert geometry.vision_weights == pytest.approx(664.7e6, rel=0.06)  # projector and patch embedding left out
    assert (geometry.head_dim, geometry.merge, geometry.tied_head) == (128, 2, True)


def test_nested_and_flat_configs_give_the_same():
    text = {key: value for key, value in QWEN2_VL_2B.items() if key not in ("model_type", "vision_config")}
    nested = {"model_type": "qwen2_vl", "text_config": text, "vision_config": QWEN2_VL_2B["vision_config"]}
    assert qwen2_vl_geometry(nested) == qwen2_vl_2b()


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(448, 448, 256), (640, 480, 391), (1280, 720, 1196), (1920, 1080, 2691)]
)
def test_tokens_of_published_image_sizes(width, height, tokens):
    work = image_work(qwen2_vl_2b(), width, height, max_pixels=10**8)
    assert (work.tokens, work.patches) == (tokens, 4 * tokens)


def test_images_above_the_limit_are_made_smaller():
    work = image_work(qwen2_vl_2b(), 4032, 3024, max_pixels=602_112)
    assert work.tokens <= 768
    assert work.width * work.height <= 602_112


def test_internvl_counts_tiles_and_the_thumbnail():
    geometry = internvl_geometry(INTERNVL_1B)
    one = image_work(geometry, 448, 448, max_pixels=10**8)
    assert (one.sequences, one.patches, one.tokens) == (1, 1025, 256)
    wide = image_work(geometry, 1792, 448, max_pixels=10**8)
    assert (wide.sequences, wide.tokens) == (5, 5 * 256)


@pytest.mark.parametrize("size", [(0, 10), (-1, 5), (1000, 4)])
def test_impossible_images_are_refused(size):
    with pytest.raises(InputDataError, match="expected sides of at least 1"):
        image_work(qwen2_vl_2b(), *size, max_pixels=10**6)


def test_a_missing_key_is_named():
    with pytest.raises(InputDataError, match="no 'vision_config'"):
        qwen2_vl_geometry({"hidden_size": 1})
