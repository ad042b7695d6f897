"""Accuracy counts exactly equal answers, and refuses what it cannot judge."""

from __future__ import annotations

import numpy as np
import pytest

from toolchain.errors import InputDataError
from toolchain.evaluate.answers import answer_all, refuse_overlap
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.values import Sample


@pytest.fixture
def host(tiny_qwen2_vl):
    config = read_config(tiny_qwen2_vl)
    return family_for(config).load_host(config, tiny_qwen2_vl)


class Parrot:
    """Three graphs that answer every prompt with the same text."""

    def __init__(self, host, text: str) -> None:
        self.ids = [*host.encode(text).tolist(), host.stop_ids[0]]
        self.cache = host.settings["decoder"]["cache"]
        self.hidden = host.settings["decoder"]["hidden"]

    def vision(self, feeds):
        return {"image_features": np.zeros((feeds["pixel_values"].shape[0] // 4, self.hidden), np.float32)}

    def embed(self, feeds):
        return {"inputs_embeds": np.zeros((*feeds["input_ids"].shape, self.hidden), np.float32)}

    def decoder(self, feeds):
        batch, length = feeds["inputs_embeds"].shape[:2]
        prompt = feeds["past.0.key"].shape[0]
        step = 0 if prompt == 0 else feeds["attention_mask"].shape[1] - self.prompt
        self.prompt = length if prompt == 0 else self.prompt
        logits = np.zeros((batch, 512), np.float32)
        logits[:, self.ids[min(step, len(self.ids) - 1)]] = 1
        new = np.zeros((length, batch, self.cache["kv_heads"], self.cache["head_dim"]), np.float32)
        names = [f"present.{i}.{n}" for i in range(self.cache["layers"]) for n in ("key", "value")]
        return {"logits": logits, **dict.fromkeys(names, new)}

    def graphs(self):
        return {"vision": self.vision, "embed": self.embed, "decoder": self.decoder}


def test_exact_answers_count(host, tiny_manifest):
    image = tiny_manifest.parent / "0.png"
    samples = [
        Sample(image, "Read row 1.", a) for a in ("red circle", "red circle, nothing", " red circle ", "Red circle")
    ]
    found = answer_all(host, Parrot(host, "red circle").graphs(), samples)
    assert [a.is_right for a in found.answers] == [True, False, True, False]
    assert found.accuracy == 0.5


def test_samples_without_answers_are_refused(host, tiny_manifest):
    image = tiny_manifest.parent / "0.png"
    with pytest.raises(InputDataError, match=r'1 of 2 lines have no "answer"'):
        answer_all(host, {}, [Sample(image, "?", "x"), Sample(image, "?")])
    with pytest.raises(InputDataError, match="found none"):
        answer_all(host, {}, [])


def test_overlap_is_by_bytes_not_by_name(tiny_manifest, tmp_path):
    image = tiny_manifest.parent / "0.png"
    (tmp_path / "renamed.png").write_bytes(image.read_bytes())
    with pytest.raises(InputDataError, match=r"renamed\.png has the same bytes as calibration image"):
        refuse_overlap([Sample(image, "?")], [Sample(tmp_path / "renamed.png", "?")])
    refuse_overlap([Sample(image, "?")], [Sample(tiny_manifest.parent / "1.png", "?")])
