"""Sampling: what each setting keeps, equal seeds, and frequencies that are the probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from toolchain.device.generation.sampling import Sampler, SamplingPlan, kept_shares
from toolchain.errors import NumericGateError, UsageError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=50).astype(np.float32) * 2


def softmax(values):
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def test_greedy_takes_the_first_of_the_largest():
    assert Sampler().choose(np.array([1.0, 3.0, 3.0, 2.0], np.float32)) == 1


@pytest.mark.parametrize("plan", [SamplingPlan(0.8, top_k=1), SamplingPlan(0.8, top_p=1e-6), SamplingPlan(1e-4)])
def test_plans_that_leave_one_token_are_greedy(plan):
    sampler = Sampler(plan)
    assert {sampler.choose(LOGITS) for _ in range(50)} == {int(LOGITS.argmax())}


def test_equal_seeds_give_equal_tokens_and_others_do_not():
    def drawn(seed):
        sampler = Sampler(SamplingPlan(1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_frequencies_are_the_probabilities_at_that_temperature():
    sampler, count = Sampler(SamplingPlan(2.0, seed=1)), 20_000
    found = np.bincount([sampler.choose(LOGITS) for _ in range(count)], minlength=50) / count
    expected = softmax(LOGITS.astype(np.float64) / 2)
    # Five standard deviations of a share.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_top_k_keeps_the_most_probable():
    tokens, shares = kept_shares(LOGITS, SamplingPlan(1.0, top_k=7))
    assert set(tokens) == set(np.argsort(-LOGITS)[:7])
    np.testing.assert_allclose(shares, softmax(LOGITS[tokens].astype(np.float64)))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_the_share(top_p):
    tokens, shares = kept_shares(LOGITS, SamplingPlan(1.0, top_p=top_p))
    everything = softmax(LOGITS.astype(np.float64))
    assert everything[tokens].sum() >= top_p
    assert everything[tokens[:-1]].sum() < top_p
    assert shares.sum() == pytest.approx(1)


def test_top_p_worked_by_hand():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        assert len(kept_shares(logits, SamplingPlan(1.0, top_p=top_p))[0]) == kept, top_p


@pytest.mark.parametrize("plan", [SamplingPlan(), SamplingPlan(temperature=0.7, seed=1)])
@pytest.mark.parametrize(("value", "words"), [(np.nan, "1 NaN and 0 infinite of 3"), (np.inf, "0 NaN and 1 infinite")])
def test_an_overflow_is_refused_and_a_masked_token_is_not(plan, value, words):
    logits = np.array([0.0, 2.0, -1.0], dtype=np.float32)
    with pytest.raises(NumericGateError, match=words) as caught:
        Sampler(plan).choose(np.where(np.arange(3) == 2, value, logits))
    assert caught.value.exit_code == 4
    assert Sampler(plan).choose(np.array([-np.inf, 2.0, -np.inf])) == 1


def test_top_p_counts_within_top_k():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    tokens, shares = kept_shares(logits, SamplingPlan(1.0, top_k=2, top_p=0.6))
    assert tokens.tolist() == [0, 1]  # 0.4 is 4/7 of the two
    np.testing.assert_allclose(shares, [4 / 7, 3 / 7])


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"temperature": -0.1}, "at least 0; 0 is greedy"),
        ({"temperature": float("nan")}, "at least 0; 0 is greedy"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p in"),
        ({"temperature": 1.0, "top_k": -1}, "expected top-k"),
        ({"seed": 3}, "no effect at temperature 0"),
        ({"top_k": 3}, "no effect at temperature 0"),
    ],
)
def test_wrong_or_idle_settings_are_refused(numbers, words):
    with pytest.raises(UsageError, match=words):
        SamplingPlan(**numbers)
