from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from toolchain.calibration.inputs import CalibrationInput
from toolchain.calibration.manifest import read_manifest, samples_hash
from toolchain.calibration.moments import collect_moments
from toolchain.errors import InputDataError
from toolchain.values import LayerSpec


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return tmp_path


def write(folder, *lines):
    path = folder / "calib.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


GOOD = {"image": "a.png", "prompt": "What?"}


def test_samples_in_order_with_absolute_images(folder):
    samples = read_manifest(write(folder, GOOD, "", GOOD | {"prompt": "Who?", "answer": "me"}))
    assert [s.prompt for s in samples] == ["What?", "Who?"]
    assert [s.answer for s in samples] == [None, "me"]
    assert samples[0].image == (folder / "a.png").absolute()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ([1, 2], "line 2: expected a JSON object, found list"),
        ({"image": "a.png"}, "line 2: missing prompt"),
        (GOOD | {"label": "x"}, "line 2: unknown label"),
        (GOOD | {"prompt": 3}, "line 2: prompt must be text, found int"),
        ({"image": "b.png", "prompt": "What?"}, r"line 2: image .*b\.png does not exist"),
        ({"image": "broken.png", "prompt": "What?"}, r"line 2: image .*broken\.png cannot be read"),
        ({"image": ".", "prompt": "What?"}, "line 2: image .* does not exist"),
    ],
)
def test_a_wrong_line_is_named(folder, line, message):
    path = write(folder, GOOD, line)
    with pytest.raises(InputDataError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 7


def test_a_truncated_image_is_refused(folder):
    Image.effect_noise((64, 64), 80).save(folder / "c.png")
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputDataError, match=r"c\.png cannot be read"):
        read_manifest(write(folder, {"image": "c.png", "prompt": "What?"}))


def test_missing_and_empty_manifests_are_refused(folder):
    with pytest.raises(InputDataError, match=r"none\.jsonl: cannot be read"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(InputDataError, match="holds no samples"):
        read_manifest(write(folder, "", "  "))


def test_the_hash_follows_text_and_pixels(folder):
    path = write(folder, GOOD)
    before = samples_hash(read_manifest(path))
    assert samples_hash(read_manifest(path)) == before
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    repainted = samples_hash(read_manifest(path))
    assert repainted != before
    assert samples_hash(read_manifest(write(folder, GOOD | {"answer": "x"}))) != repainted


class TwoLayers(nn.Module):
    """x [1, S, 4] → first → second; counts how often the second runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.ran = 0
        self.second.register_forward_hook(self._count)

    def _count(self, *_):
        self.ran += 1

    def forward(self, x, use_cache=False):
        return self.second(self.first(x))


def spec(name, columns, part="language", group=None):
    return LayerSpec(name, part, "linear", 1, columns, group or name, 0)


def passes(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = ((5, 3), (7, 2))
    masks = [torch.arange(length) < images for length, images in lengths]
    return [CalibrationInput({"x": torch.randn(1, len(mask), 4, generator=generator)}, mask) for mask in masks]


def test_modalities_have_equal_mass_in_the_decoder():
    inputs = passes()
    found = collect_moments(TwoLayers(), inputs, [spec("first", 4)])["first"]
    images = torch.cat([i.tensors["x"][0][i.is_image] for i in inputs])
    texts = torch.cat([i.tensors["x"][0][~i.is_image] for i in inputs])
    expected = (images.T @ images / len(images) + texts.T @ texts / len(texts)) / 2
    torch.testing.assert_close(found.second_moment, expected)
    assert found.tokens == 12


def test_elsewhere_every_token_counts_the_same():
    inputs = passes()
    found = collect_moments(TwoLayers(), inputs, [spec("first", 4, "vision")])["first"]
    rows = torch.cat([i.tensors["x"][0] for i in inputs])
    torch.testing.assert_close(found.second_moment, rows.T @ rows / len(rows))


def test_the_head_is_asked_about_text_only():
    inputs = passes()
    found = collect_moments(TwoLayers(), inputs, [spec("first", 4, "head")])["first"]
    texts = torch.cat([i.tensors["x"][0][~i.is_image] for i in inputs])
    torch.testing.assert_close(found.second_moment, texts.T @ texts / len(texts))


def test_a_pass_stops_at_the_last_layer_asked_about():
    model = TwoLayers()
    collect_moments(model, passes(), [spec("first", 4), spec("second", 3)])
    assert model.ran == 0
    model(torch.zeros(1, 1, 4))
    assert model.ran == 1
    assert not model.first._forward_pre_hooks


def test_layers_of_a_group_share_one_moment():
    model = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    model.forward = lambda x, use_cache: model["a"](x) + model["b"](x)
    found = collect_moments(model, passes(), [spec("a", 4, group="ab"), spec("b", 4, group="ab")])
    assert found["a"] is found["b"]


def test_a_layer_nothing_reaches_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
    model.forward = lambda x, use_cache: model["a"](x)
    with pytest.raises(InputDataError, match="layer b: no calibration input reaches it"):
        collect_moments(model, passes(), [spec("a", 4), spec("b", 4)])
