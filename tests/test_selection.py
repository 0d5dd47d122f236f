"""What --select tries, and which of it is kept."""

from __future__ import annotations

import pytest

from pipeline.choice import Choice
from pipeline.errors import UserError
from pipeline.presets import load_config
from pipeline.selection import DEFAULT_SPACE, best, candidates, summary


def test_scoring_settings_share_a_network() -> None:
    (candidate,) = candidates("fast", [], ["scoring.map_sigma=[1,2]", "scoring.top_pixels=[16,64,256]"])
    assert {(v.map_sigma, v.top_pixels) for v in candidate.variants} == {(s, p) for s in (1, 2) for p in (16, 64, 256)}
    assert candidate.config.scoring == candidate.variants[0]


def test_other_settings_train_a_network_for_every_value() -> None:
    found = candidates("fast", ["training.seed=3"], ["features.stages=[[1,2],[2,3]]", "scoring.map_sigma=[1,2]"])
    assert [candidate.config.features.stages for candidate in found] == [(1, 2), (2, 3)]
    assert [candidate.settings for candidate in found] == [
        ("features.stages=[1, 2]",),
        ("features.stages=[2, 3]",),
    ]
    assert all([v.map_sigma for v in candidate.variants] == [1, 2] for candidate in found)
    assert all(candidate.config.training.seed == 3 for candidate in found)
    assert len({candidate.config.digest() for candidate in found}) == 2


def test_nothing_listed_is_the_preset_alone() -> None:
    (candidate,) = candidates("paper", [], [])
    assert candidate.config == load_config("paper")
    assert candidate.variants == (load_config("paper").scoring,)


@pytest.mark.parametrize("preset", ["demo", "fast", "best"])
def test_the_default_space_suits_the_presets(preset: str) -> None:
    (candidate,) = candidates(preset, [], DEFAULT_SPACE)  # type: ignore[arg-type]
    assert len(candidate.variants) == 9


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ("scoring.map_sigma=2", "expected SECTION.FIELD=[VALUE,VALUE]"),
        ("scoring.map_sigma=[]", "expected SECTION.FIELD=[VALUE,VALUE]"),
        ("scoring.map_sigma", "expected SECTION.FIELD=[VALUE,VALUE]"),
        ("scoring.map_sigma=[1,", "expected SECTION.FIELD=[VALUE,VALUE]"),
        ("scoring.map_sigma=[1,-1]", "scoring.map_sigma"),
        ("scoring.colour=[1]", "expected SECTION.FIELD=VALUE"),
        ("scoring.false_alarm_rate=[0.1,0.01]", "chosen with --set"),
        ("training.seed=[0,1]", "chosen with --set"),
        ('schedule=["linear","cosine"]', "expected SECTION.FIELD=[VALUE,VALUE]"),
    ],
)
def test_a_bad_list_is_told(listed: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        candidates("fast", [], [listed])
    assert told in str(caught.value)


def test_the_best_has_the_highest_sum_and_a_summary_names_what_differs() -> None:
    (candidate,) = candidates("fast", [], ["scoring.map_sigma=[1,2]"])
    choices = [
        Choice(scoring, "place", True, 0.25, 1, False, 0.3, 256, pixel_auroc=0.9, pro=pro, image_auroc=0.95)
        for scoring, pro in zip(candidate.variants, (0.7, 0.8), strict=True)
    ]
    found = {str(i): summary(choice, candidate.variants) for i, choice in enumerate(choices)}
    assert best(found) == "1"
    assert found["1"] == {
        "map_sigma": 2.0,
        "covariance": "place",
        "subtract_prediction": True,
        "context_weight": 0.25,
        "reach": 1,
        "turned": False,
        "alpha": 0.3,
        "top_pixels": 256,
        "pixel_auroc": 0.9,
        "pro_0.30": 0.8,
        "image_auroc": 0.95,
    }
    assert "map_sigma" not in summary(choices[0])
