"""Bounds keep the false-alarm rate that was asked for, and their intervals cover what they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pipeline.thresholds import exceedance_interval, false_alarm_bound, known_by_heart, normal_bound, rank_bound

LAWS = {"normal": stats.norm(5, 3), "exponential": stats.expon(2), "heavy": stats.t(2)}


@pytest.mark.parametrize(("count", "rate"), [(4, 0.01), (10, 0.05), (60, 0.01)])
def test_the_normal_bound_keeps_its_rate(count: int, rate: float) -> None:
    rng = np.random.default_rng(count)
    bounds = [normal_bound(rng.normal(5, 3, count), rate).value for _ in range(1500)]
    # The chance that a further value exceeds each bound, averaged over many calibrations.
    exceeded = stats.norm.sf(bounds, 5, 3)
    assert exceeded.mean() == pytest.approx(rate, abs=4 * exceeded.std() / np.sqrt(len(bounds)))
    assert exceeded.mean() == pytest.approx(rate, rel=0.2)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (264, 0.01), (45, 0.05)])
def test_the_bound_by_rank_keeps_its_rate_whatever_the_law(law: str, count: int, rate: float) -> None:
    rng = np.random.default_rng(count)
    kept, covered, turns = [], 0, 1500
    for _ in range(turns):
        bound = rank_bound(LAWS[law].rvs(count, random_state=rng), rate)
        assert bound is not None
        kept.append(LAWS[law].sf(bound.value))
        covered += bound.low <= kept[-1] <= bound.high
    expected = int(rate * (count + 1) + 1e-9) / (count + 1)
    assert expected <= rate + 1e-12
    assert np.mean(kept) == pytest.approx(expected, abs=4 * np.std(kept) / np.sqrt(turns))
    assert 0.93 <= covered / turns <= 0.97


def test_the_normal_bound_raises_more_alarms_where_values_have_a_heavy_tail() -> None:
    """Why ranks count where there are enough values: scores of photographs have such tails."""
    rng = np.random.default_rng(0)

    def alarms(bound: Callable[[np.ndarray, float], object]) -> float:
        found = [bound(LAWS["exponential"].rvs(264, random_state=rng), 0.01) for _ in range(300)]
        return float(np.mean([LAWS["exponential"].sf(each.value) for each in found]))  # type: ignore[attr-defined]

    assert alarms(false_alarm_bound) < 0.011
    assert alarms(normal_bound) > 0.025


@pytest.mark.parametrize(("count", "rate", "largest"), [(98, 0.01, None), (99, 0.01, 1), (199, 0.01, 2), (9, 0.1, 1)])
def test_ranks_count_from_where_they_can_keep_the_rate(count: int, rate: float, largest: int | None) -> None:
    values = np.random.default_rng(0).permutation(count).astype(float)
    bound = rank_bound(values, rate)
    assert (bound and bound.value) == (None if largest is None else count - largest)
    assert false_alarm_bound(values, rate) == (bound or normal_bound(values, rate))


@pytest.mark.parametrize("count", [5, 20])
def test_exceedance_interval_covers_the_true_rate(count: int) -> None:
    rng = np.random.default_rng(count)
    covered, widths = 0, []
    for _ in range(400):
        bound = normal_bound(rng.normal(5, 3, count), 0.01)
        covered += bound.low <= stats.norm.sf(bound.value, 5, 3) <= bound.high
        widths.append(bound.high - bound.low)
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(widths) > 0.01, "few images promise little"


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_an_interval_is_there_for_every_count(rate: float) -> None:
    rng = np.random.default_rng(0)
    for count in range(4, 201):
        values = rng.normal(5, 3, count)
        for bound in (normal_bound(values, rate), false_alarm_bound(values, rate)):
            assert 0 < bound.low < rate < bound.high < 1, count


def test_exceedance_interval_narrows_with_more_images() -> None:
    values = np.random.default_rng(0).normal(5, 3, 2000)
    _, low, high = normal_bound(values, 0.05)
    assert 0.03 < low < 0.05 < high < 0.07
    assert exceedance_interval(np.full(9, 2.0), 2.0) == (0.0, 1.0)


def test_scores_that_are_lower_by_far_are_known_by_heart() -> None:
    rng = np.random.default_rng(0)
    alike = [known_by_heart(rng.exponential(2, 26), rng.exponential(2, 238)) for _ in range(600)]
    assert 0 < np.mean(alike) < 0.025
    assert all(known_by_heart(rng.normal(5.5, 1, 26), rng.normal(4, 1, 238)) for _ in range(20))
    assert not any(known_by_heart(rng.normal(4, 1, 26), rng.normal(5, 1, 238)) for _ in range(20))
    assert not known_by_heart(np.full(4, 2.0), np.full(9, 2.0))
