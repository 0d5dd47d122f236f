"""Bounds that few normal photographs exceed, from the values of those at hand, and how sure that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import special, stats

TAILS = (0.025, 0.975)
"""Where the 95 % intervals end."""
BY_HEART = 0.01
"""Significance of `known_by_heart`."""


class Bound(NamedTuple):
    """An upper bound, and the 95 % confidence interval of the probability that a further value exceeds it."""

    value: float
    low: float
    high: float


def false_alarm_bound(values: np.ndarray, rate: float) -> Bound:
    """Bound that a further value exceeds with probability `rate` at most: by rank where there are enough values for that.

    values float (n,), n >= 2.
    """
    return rank_bound(values, rate) or normal_bound(values, rate)


def rank_bound(values: np.ndarray, rate: float) -> Bound | None:
    """Wilks 1941: the k-th largest of n values, which a further one exceeds with probability k / (n + 1), whatever their law.

    That probability of the bound at hand has Beta's law with k and n + 1 - k. None where it takes more than n values.
    """
    n = len(values)
    if not enough_for_rank(n, rate):
        return None
    k = _rank(n, rate)
    low, high = stats.beta.ppf(TAILS, k, n + 1 - k)
    return Bound(float(np.partition(values, n - k)[n - k]), float(low), float(high))


def enough_for_rank(count: int, rate: float) -> bool:
    """Whether so many values tell what a share of `rate` exceeds: 99 for one in a hundred."""
    return _rank(count, rate) >= 1


def _rank(count: int, rate: float) -> int:
    # No more than rounding may take from what is a whole number.
    return int(rate * (count + 1) * (1 + 1e-12))


def normal_bound(values: np.ndarray, rate: float) -> Bound:
    """Student's one-sided prediction interval: what a further value exceeds with probability `rate`, if values follow a normal
    law. Wider than that law's quantile, because mean and deviation come from only n values.
    """
    n = len(values)
    quantile = stats.t.ppf(1 - rate, n - 1)
    bound = float(values.mean() + quantile * values.std(ddof=1) * np.sqrt(1 + 1 / n))
    return Bound(bound, *exceedance_interval(values, bound))


def known_by_heart(held_out: np.ndarray, others: np.ndarray) -> bool:
    """Mann and Whitney 1947: whether scores of photographs that the network was trained on are lower than those of others, which
    at most one in a hundred networks that do not know them is taken for. float (n,) and (m,).
    """
    return bool(stats.mannwhitneyu(held_out, others, alternative="greater").pvalue < BY_HEART)


def exceedance_interval(values: np.ndarray, bound: float) -> tuple[float, float]:
    """Interval of the probability that a further value exceeds `bound`, if values follow a normal law.

    values float (n,), n >= 2, not all equal, else (0, 1). Owen 1968: sqrt(n) (bound - mean) / deviation is noncentral t with
    n - 1 degrees of freedom and noncentrality sqrt(n) z, where z is the true quantile of the bound.
    """
    n, deviation = len(values), values.std(ddof=1)
    if deviation == 0:
        return 0.0, 1.0
    statistic = np.sqrt(n) * (bound - values.mean()) / deviation
    low, high = sorted(stats.norm.sf(special.nctdtrinc(n - 1, np.array(TAILS), statistic) / np.sqrt(n)))
    return float(low), float(high)
