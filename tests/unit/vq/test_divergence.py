"""Divergences and intervals on cases worked by hand, and the properties any of them must have."""

from __future__ import annotations

import math

import pytest
import torch

from toolchain.errors import ShapeError
from toolchain.vq.divergence import Interval, Paired, bootstrap, log_probabilities, paired_bootstrap, token_divergences


def logs(*rows):
    return torch.tensor(rows).log()


def test_log_probabilities_by_hand():
    found = log_probabilities(torch.tensor([[0.0, math.log(3.0)], [1000.0, 1000.0]]))
    torch.testing.assert_close(found.exp(), torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    assert log_probabilities(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float32


def test_divergence_by_hand():
    # ½ ln(½ / ¼) + ½ ln(½ / ¾) = ½ ln(4 / 3); the other way ¼ ln ½ + ¾ ln(3/2).
    half, quarter = logs([0.5, 0.5]), logs([0.25, 0.75])
    assert float(token_divergences(half, quarter)) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(token_divergences(quarter, half)) == pytest.approx(expected, rel=1e-6)


def test_what_the_reference_never_says_costs_nothing():
    found = token_divergences(logs([1.0, 0.0]), logs([0.5, 0.5]))
    assert found.tolist() == pytest.approx([math.log(2)])


def test_divergences_are_not_negative_and_zero_of_itself():
    generator = torch.Generator().manual_seed(0)
    first, second = (log_probabilities(3 * torch.randn(50, 20, generator=generator)) for _ in range(2))
    assert bool((token_divergences(first, second) > 0).all())
    assert token_divergences(first, first).tolist() == [0.0] * 50


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match=r"found \[1, 2\] and \[1, 3\]"):
        token_divergences(torch.zeros(1, 2), torch.zeros(1, 3))


def test_the_mean_is_over_tokens_not_over_samples():
    found = bootstrap([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])], ["a", "b"], seed=0)
    assert found.mean == 2.0
    assert (found.low, found.high) == (1.0, 5.0)  # a quarter of all draws has a alone, a quarter b alone


def test_equal_clusters_leave_no_doubt():
    found = bootstrap([torch.tensor([0.5, 1.5])] * 7, range(7), seed=0)
    assert found == Interval(1.0, 1.0, 1.0)


def test_one_cluster_shows_no_spread():
    found = bootstrap([torch.tensor([0.0]), torch.tensor([4.0])], ["a", "a"], seed=0)
    assert found == Interval(2.0, 2.0, 2.0)


def test_questions_of_one_image_are_drawn_together():
    """Copies of a question on its image say nothing new; as images of their own they would."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(3, generator=generator) for _ in range(10)]
    once = bootstrap(values, range(10), seed=1)
    copied = bootstrap(values * 4, [*range(10)] * 4, seed=1)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    apart = bootstrap(values * 4, range(40), seed=1)
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_the_interval_is_that_of_the_mean():
    """Against the normal approximation, 1.96 standard errors to either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 3
    found = bootstrap([v[None] for v in values], range(400), seed=0)
    error = 1.96 * float(values.std()) / 20
    assert found.low == pytest.approx(found.mean - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + error, abs=0.1 * error)


def test_the_seed_is_all_that_is_random():
    values = [torch.rand(2, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    assert bootstrap(values, range(9), seed=3) == bootstrap(values, range(9), seed=3)
    assert bootstrap(values, range(9), seed=3) != bootstrap(values, range(9), seed=4)


def test_text_and_json():
    interval = Interval(0.12345, 0.1, 0.2)
    assert str(interval) == "0.1235 (0.1000 – 0.2000)"
    assert interval.to_json() == {"kl": 0.12345, "kl_low": 0.1, "kl_high": 0.2}


def noisy(seed, images=30):
    """Divergences of two models on images easy and hard, the second 1.5 times the first but for noise."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.exp(2 * torch.randn(images, generator=generator))
    first = [h * (1 + 0.1 * torch.rand(4, generator=generator)) for h in hard]
    return first, [1.5 * h * (1 + 0.1 * torch.rand(4, generator=generator)) for h in hard]


def test_a_pair_by_hand():
    found = paired_bootstrap([torch.tensor([2.0, 4.0])], [torch.tensor([1.0, 2.0])], ["a"], seed=0)
    assert found == Paired(Interval(2.0, 2.0, 2.0), Interval(1.5, 1.5, 1.5))


def test_beside_itself_a_model_is_certain():
    first, _ = noisy(0)
    assert paired_bootstrap(first, first, range(30), seed=0) == Paired(Interval(1, 1, 1), Interval(0, 0, 0))


def test_a_constant_factor_leaves_no_doubt_about_the_ratio():
    first, _ = noisy(0)
    found = paired_bootstrap([3 * x for x in first], first, range(30), seed=0)
    assert (found.ratio.low, found.ratio.high) == (pytest.approx(3), pytest.approx(3))
    assert found.difference.low < found.difference.high


def test_pairing_takes_the_images_out():
    """The two intervals overlap widely, the paired one is sure which is better."""
    first, second = noisy(0)
    mine, theirs = (bootstrap(x, range(30), seed=0) for x in (second, first))
    found = paired_bootstrap(second, first, range(30), seed=0)
    assert mine.low < theirs.high
    assert found.ratio.low > 1.3
    assert found.difference.low > 0
    assert found.ratio.mean == pytest.approx(mine.mean / theirs.mean)
    assert found.difference.mean == pytest.approx(mine.mean - theirs.mean)


def test_the_same_images_are_drawn_as_for_one_model():
    """A difference from a model that is exact has the interval of the model alone."""
    first, _ = noisy(1)
    exact = [torch.zeros(4)] * 30
    found = paired_bootstrap(first, exact, range(30), seed=5)
    assert found.difference == bootstrap(first, range(30), seed=5)
    assert found.ratio is None


def test_a_pair_is_of_the_same_tokens():
    with pytest.raises(ShapeError, match=r"found \[2\] and \[1\]"):
        paired_bootstrap([torch.zeros(2)], [torch.zeros(1)], ["a"], seed=0)
