"""What choices are made on: implanted defects of every size, marks and structure alike."""

from __future__ import annotations

import numpy as np

from pipeline.calibration import measured
from pipeline.choice import Judged, implanted, judge, judged_images
from pipeline.measures import fit_measures
from pipeline.textures import photograph


def test_implanted_defects_are_the_same_every_time_and_all_marked(held_out):
    images, masks, _ = implanted(held_out, seed=1)
    again, _, _ = implanted(held_out, seed=1)
    np.testing.assert_array_equal(images, again)
    assert len(images) == 4 * len(held_out)
    assert masks.any(axis=(1, 2)).all()


def test_choices_are_made_on_defects_of_every_size():
    normal = np.stack([photograph("brick")[i : i + 160, i : i + 160] for i in range(8)])
    areas = judged_images(normal, seed=1).masks[:-8].sum((1, 2))
    easily_seen = implanted(normal, seed=1, smallest=1.0)[1].sum((1, 2))
    assert np.median(areas) < np.median(easily_seen) / 3
    assert areas.max() > np.median(easily_seen)


def test_marks_and_structure_count_alike_however_many_there_are_of_each(scorer, photographs, held_out):
    normal = np.concatenate([held_out, held_out[::-1]])
    judged = judged_images(normal, seed=1)
    marks, structure = judged.families
    defective = judged.masks.any(axis=(1, 2))
    assert (marks & defective).sum() == 43
    assert (structure & defective).sum() == 13
    assert (marks & structure).sum() == (~defective).sum() == len(normal)
    (candidate,) = measured(
        scorer, [taught.measure for taught in fit_measures(scorer, photographs)], normal, judged.images
    )

    def figures(families):
        (choice, *_) = judge(scorer, candidate, Judged(judged.images, judged.masks, families))
        return np.array([choice.pixel_auroc, choice.pro, choice.image_auroc])

    alone = [figures(family[None]) for family in judged.families]
    assert not np.allclose(*alone, atol=0.01), "families that are found equally well show nothing"
    np.testing.assert_allclose(figures(judged.families), np.mean(alone, axis=0))


def test_a_family_of_few_images_does_not_count_by_itself(held_out):
    (family,) = judged_images(held_out, seed=1).families
    assert family.all()
