"""Learning rates of a fine-tuning, step by step."""

from __future__ import annotations

import dataclasses

import pytest

from toolchain.quantize.refine.finetune_settings import FineTuneSettings, rates

FAST = FineTuneSettings()


def test_rates_rise_and_fall():
    settings = dataclasses.replace(FAST, warm_up=0.2, codebook_rate=1.0, scale_rate=0.1, kept_rate=0.0)
    found = [rates(step, 50, settings) for step in range(50)]
    codebooks = [x[0] for x in found]
    assert codebooks[:11] == sorted(codebooks[:11])
    assert codebooks[10:] == sorted(codebooks[10:], reverse=True)
    assert codebooks[10] == max(codebooks) == 1.0
    assert 0 < codebooks[-1] < 0.01
    assert all(x[1] == pytest.approx(0.1 * x[0]) and x[2] == 0 for x in found)
    assert rates(0, 1, dataclasses.replace(settings, warm_up=0.0))[0] == 1.0
