"""What fine-tuning minimises, by hand, and where its text begins."""

from __future__ import annotations

import dataclasses

import torch

from toolchain.calibration.gradients import answer_scores
from toolchain.calibration.inputs import calibration_inputs
from toolchain.calibration.manifest import read_manifest
from toolchain.checkpoint.loading import load_model
from toolchain.models.configs import read_config
from toolchain.models.registry import family_for
from toolchain.quantize.refine.finetune_loss import sample_loss, teacher_target, text_tokens
from toolchain.quantize.refine.finetune_settings import FineTuneSettings
from toolchain.vq.divergence import log_probabilities, token_divergences

FAST = FineTuneSettings()


def test_text_is_what_stands_after_the_image(tiny_qwen2_vl, tiny_manifest):
    teacher = load_model(tiny_qwen2_vl)
    processor = family_for(read_config(tiny_qwen2_vl)).load_processor(tiny_qwen2_vl)
    inputs = calibration_inputs(processor, read_manifest(tiny_manifest)[:1])
    one = inputs[0]
    ids = one.tensors["input_ids"][0]
    assert text_tokens(one) == len(ids) - 1 - int((ids == teacher.config.image_token_id).nonzero()[-1])
    target = teacher_target(teacher, one, FAST)
    assert len(target.log_probabilities) == text_tokens(one)
    torch.testing.assert_close(target.log_probabilities[-target.answer :], answer_scores(teacher, one))
    alone = teacher_target(teacher, one, dataclasses.replace(FAST, text_weight=0.0))
    torch.testing.assert_close(alone.log_probabilities, answer_scores(teacher, one))


def test_loss_by_hand():
    """At temperature 1 without text it is the answer's KL; softening flattens logits and is made up for by τ²."""
    generator = torch.Generator().manual_seed(0)
    expected, found = (log_probabilities(torch.randn(3, 5, generator=generator)) for _ in range(2))
    plain = dataclasses.replace(FAST, temperature=1.0, text_weight=0.0)
    each = token_divergences(expected, found)
    loss, own = sample_loss(expected, found, 2, plain)
    torch.testing.assert_close(loss, each[-2:].sum())
    torch.testing.assert_close(own, each[-2:].sum())
    with_text, _ = sample_loss(expected, found, 2, dataclasses.replace(plain, text_weight=0.5))
    torch.testing.assert_close(with_text, each[-2:].sum() + 0.5 * 2 * each.mean())
    soft, own = sample_loss(expected, found, 2, dataclasses.replace(plain, temperature=2.0))
    flat = token_divergences(log_probabilities(expected[-2:] / 2), log_probabilities(found[-2:] / 2))
    torch.testing.assert_close(soft, 4 * flat.sum())
    torch.testing.assert_close(own, each[-2:].sum())
