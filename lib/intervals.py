"""Means over seeds with their intervals."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

SPREAD = "95 % bootstrap interval (of two or three seeds: their range)"  # what captions call ``low`` to ``high``


class Interval(NamedTuple):
    """A mean with its 95 % interval; ``low`` and ``high`` are NaN when ``n`` is below 2."""

    mean: float
    low: float
    high: float
    n: int


def t_interval(values: ArrayLike) -> Interval:
    """Mean and 95 % Student t interval of ``values`` (NaN are left out): what decides between two methods.

    Of two or three values a bootstrap gives hardly more than their range, and would call any shared sign a difference.
    """
    sample = np.asarray(values, dtype=float).ravel()
    sample = sample[~np.isnan(sample)]
    if sample.size < 2:
        return bootstrap_interval(sample)
    mean, half = float(sample.mean()), float(stats.t.ppf(0.975, sample.size - 1) * stats.sem(sample))
    return Interval(mean, mean - half, mean + half, sample.size)


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 9999) -> Interval:
    """Mean and 95 % percentile-bootstrap interval of ``values`` (NaN are left out).

    With a handful of seeds the interval is narrow by construction: it shows the spread that was seen, not all there is.
    Of two or three values it is their range, since one mean in four or in 27 resamples is the least of them; captions
    say so (``SPREAD``).
    """
    sample = np.asarray(values, dtype=float).ravel()
    sample = sample[~np.isnan(sample)]
    if sample.size == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    if sample.size == 1 or np.ptp(sample) == 0:
        bound = float("nan") if sample.size == 1 else float(sample[0])
        return Interval(float(sample[0]), bound, bound, sample.size)
    random = np.random.default_rng(seed)
    result = stats.bootstrap((sample,), np.mean, n_resamples=resamples, method="percentile", rng=random)
    low, high = result.confidence_interval
    return Interval(float(sample.mean()), float(low), float(high), sample.size)
