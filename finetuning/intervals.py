"""How far a mean over samples can be trusted: bootstrap intervals over texts and, within a text, over its samples.

Texts differ more than the seeds of one text, and a voice will say other texts than these. So each resample draws as
many texts as there are, with replacement, and of each drawn text as many samples as it has, with replacement; its
figure is the mean of the texts' means. The middle 95 % of the figures of all resamples are the interval.

All resamples of equally shaped values draw the same places. So two voices that said the same texts can be compared pair
by pair: what a hard text costs both of them cancels out.
"""

from __future__ import annotations

import numpy as np

#: Resamples of an interval, the share of them inside, and the seed of their draws.
NUM_RESAMPLES, LEVEL, SEED = 2000, 0.95, 0


def mean_over_texts(values: np.ndarray) -> np.ndarray:
    """(…, num_texts, num_samples), NaN where a sample has no figure -> (…): the mean of the texts' means."""
    return _mean(_mean(values))


def resampled_means(values: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
    """(num_texts, num_samples), NaN where a sample has no figure -> (num_resamples,) figures of the resamples."""
    num_texts, num_samples = values.shape
    random = np.random.default_rng(seed)
    texts = random.integers(0, num_texts, (num_resamples, num_texts, 1))
    samples = random.integers(0, num_samples, (num_resamples, num_texts, num_samples))
    return mean_over_texts(values[texts, samples])


def interval(means: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """The middle ``level`` of the resamples' figures; None where none is finite."""
    means = means[np.isfinite(means)]
    if not len(means):
        return None
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_of_mean(values: np.ndarray) -> tuple[float, float] | None:
    """The interval of ``mean_over_texts``; None for fewer than two samples, which say nothing of how they vary."""
    return interval(resampled_means(values)) if np.isfinite(values).sum() > 1 else None


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is finite; NaN where nothing is."""
    is_there = np.isfinite(values)
    count = is_there.sum(-1)
    total = np.where(is_there, values, 0.0).sum(-1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
