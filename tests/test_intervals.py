"""Bootstrap intervals against calculations that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from finetuning.intervals import interval, interval_of_mean, mean_over_texts, resampled_means


@pytest.mark.parametrize("shape", [(14, 1), (1, 14)], ids=["one sample a text", "one text"])
def test_a_single_level_is_scipys_percentile_bootstrap(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(1).gamma(2.0, 0.3, 14)
    low, high = interval_of_mean(values.reshape(shape))
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.05 * width)
    assert high == pytest.approx(theirs.high, abs=0.05 * width)


def test_a_resample_draws_texts_and_then_their_samples() -> None:
    """Written out with loops, one resample at a time, with draws of its own."""
    random = np.random.default_rng(3)
    values = random.normal(0, 1, (8, 1)) + random.normal(0, 0.4, (8, 3))
    figures = []
    for _ in range(4000):
        texts = [values[random.integers(8)] for _ in range(8)]
        figures.append(np.mean([np.mean([text[random.integers(3)] for _ in range(3)]) for text in texts]))
    made = resampled_means(values, 4000)
    assert np.std(made) == pytest.approx(np.std(figures), rel=0.06)
    assert np.mean(made) == pytest.approx(values.mean(), abs=0.02)
    assert interval(made) == pytest.approx(np.percentile(figures, [2.5, 97.5]), abs=0.08)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        values = random.normal(5, 1, (20, 1)) + random.normal(0, 0.5, (20, 2))
        low, high = interval(resampled_means(values, 400))
        covered += low <= 5 <= high
    assert 0.87 <= covered / 200 <= 0.99


def test_missing_figures_have_no_part() -> None:
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, np.nan]])
    assert mean_over_texts(values) == pytest.approx((1.0 + 4.0) / 2)
    low, high = interval_of_mean(values)
    assert 1.0 <= low < high <= 5.0
    assert np.isnan(mean_over_texts(np.full((2, 2), np.nan)))
    assert interval_of_mean(np.full((2, 2), np.nan)) is None


def test_a_single_sample_has_no_interval_and_draws_are_the_same_each_time() -> None:
    assert interval_of_mean(np.array([[1.0]])) is None
    values = np.random.default_rng(5).normal(size=(5, 3))
    assert interval_of_mean(values) == interval_of_mean(values.copy())


def test_what_is_hard_for_both_cancels_out() -> None:
    """Two lines that differ by the same in every text differ for certain, however much the texts differ."""
    values = np.random.default_rng(6).normal(0, 10, (6, 3))
    assert interval(resampled_means(values + 0.5) - resampled_means(values)) == pytest.approx((0.5, 0.5))
