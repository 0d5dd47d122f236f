"""The measures that a model's settings allow, each with what training photographs teach: Gaussians, and cells kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ScoringConfig
from pipeline.gaussian import (
    Moments,
    NormalGaussian,
    explained_by_place,
    general_gaussian,
    place_gaussians,
    place_projection,
)
from pipeline.kinds import CANDIDATES, KindGaussians, KindMoments, kind_gaussians
from pipeline.nearest import NearestNormal, SampledCells, nearest_normal
from pipeline.scoring import Evidence, Measure, Scorer

CONTEXT_WEIGHTS = (0.0, 0.5, 0.75)
"""Weights of the context in the feature branch that are tried where a model chooses its own."""
REACHES = (0, 1)
"""Cells that parts may lie from their places that are tried where a model chooses its own."""
TURNS = 4
"""Directions by quarter turns. Mirrored photographs would be another product where it is not symmetric, such as a screw."""
GENERAL_IMAGES = 32
"""Training photographs that shape the Gaussians for all places."""
PLACES_TELL = 0.15
"""Share of features' variance that places explain from which models choose neither kinds nor turned photographs: where products
lie as they should a misplaced part is a defect, which kinds cannot see, and which turned photographs would teach to be normal.
Seen were 0.06 to 0.09 of textures and products in any direction, 0.25 to 0.55 of others."""

Vectors = Callable[[Evidence], list[Tensor]]
"""What Gaussians measure of an image's features: with the prediction subtracted, or not, or both."""


class Taught(NamedTuple):
    """A measure, and the sums that its Gaussians come from, from which photographs can be taken out again."""

    measure: Measure
    pixel: Moments | None
    """Of the pixel branch at each place, where a Gaussian measures it."""
    feature: Moments | KindMoments | None
    """Of features, where a Gaussian measures them; where all places share one, of the photographs at `general_places` alone."""
    distances: Tensor | None = None
    """(G, G): the sum of all photographs' distances from kinds, over d, at each place."""


class Learning(NamedTuple):
    """Gaussians of features in the making."""

    moments: Moments | KindMoments
    subtracted: bool
    """Whether of what the prediction leaves of the features."""
    lying: bool
    """Whether they are a measure as taught by photographs as these lie."""
    turned: bool
    """Whether they are one, perhaps another, as taught by turned photographs, too."""


def gaussians_of(moments: Moments | KindMoments) -> NormalGaussian | KindGaussians:
    """Those of each kind or of each place, or that of all places."""
    if isinstance(moments, KindMoments):
        return kind_gaussians(moments)
    return place_gaussians(moments) if moments.by_place else general_gaussian(moments)


def distances_at_places(several: Sequence[KindGaussians], batches: Iterable[Tensor]) -> list[Tensor]:
    """The sum of distances over d of photographs' features (N, C, G, G), at least one, at each place, (G, G), from each."""
    plain = [replace(gaussians, usual=None) for gaussians in several]
    found = [[each.distance(features).sum(0) for each in plain] for features in batches]
    return [torch.stack(sums).sum(0) for sums in zip(*found, strict=True)]


def fit_measures(scorer: Scorer, training_nhwc: np.ndarray) -> list[Taught]:
    """The measures that the config allows, taught by training photographs, uint8 (n, map_size, map_size, 3)."""
    scoring = scorer.config.scoring
    subtract = {"subtract": [True], "ignore": [False], "select": [True, False]}[scoring.prediction]
    if scoring.covariance == "none":
        subtract = []

    def vectors(evidence: Evidence) -> list[Tensor]:
        return [evidence.residuals if subtracted else evidence.features for subtracted in subtract]

    of_pixels, of_features = _of_all_places(scorer, training_nhwc, len(subtract), vectors)
    generals = dict(zip(subtract, map(general_gaussian, of_features), strict=True))
    learning = _begun(scorer, training_nhwc, generals)
    with_context = bool(subtract and scorer.config.features.context_stages and scoring.context_weight != 0)
    pixels, context = _of_all_photographs(scorer, training_nhwc, of_pixels, learning, with_context)
    pixel = place_gaussians(pixels) if pixels else None
    if not subtract:
        return [Taught(Measure(pixel, None, True), pixels, None)]

    def learned(each: Learning, *, turned: bool) -> Taught:
        measure = Measure(pixel, gaussians_of(each.moments), each.subtracted, turned=turned)
        return Taught(measure, pixels, copy(each.moments))  # which may go on learning

    found = []
    if scoring.covariance in ("general", "select"):
        found += [
            Taught(Measure(pixel, generals[subtracted], subtracted), pixels, moments)
            for subtracted, moments in zip(subtract, of_features, strict=True)
        ]
    found += [learned(each, turned=False) for each in learning if each.lying]
    if turning := [each for each in learning if each.turned]:
        for features in features_of_turned(scorer, training_nhwc):
            for each in turning:
                each.moments.add(features)
        found += [learned(each, turned=True) for each in turning]
    _count_by_place(scorer, found, training_nhwc)
    return [taught._replace(measure=mixed) for taught in found for mixed in _mixtures(scoring, taught.measure, context)]


def _count_by_place(scorer: Scorer, found: list[Taught], training_nhwc: np.ndarray) -> None:
    """Has distances from kinds, in place, count by what is usual where they are found; one look at the photographs for all."""
    kinds = {i: each.measure.feature for i, each in enumerate(found) if isinstance(each.measure.feature, KindGaussians)}
    if not kinds:
        return
    sums = distances_at_places(list(kinds.values()), _features_of(scorer, training_nhwc))
    for (i, plain), distances in zip(kinds.items(), sums, strict=True):
        feature = plain.counting_by_place(distances / len(training_nhwc))
        found[i] = found[i]._replace(measure=found[i].measure._replace(feature=feature), distances=distances)


def evidence_of(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Evidence]:
    """The evidence of images, uint8 (n, map_size, map_size, 3), batch by batch."""
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.evidence(images_nhwc[start : start + batch])


def _of_all_places(
    scorer: Scorer, training_nhwc: np.ndarray, count: int, vectors: Vectors
) -> tuple[NormalGaussian | None, list[Moments]]:
    """For all places together: the Gaussian of the pixel branch if it is measured by one, and the sums of so many vectors."""
    of_pixels = Moments(by_place=False) if scorer.config.scoring.pixel == "gaussian" else None
    of_features = [Moments(by_place=False) for _ in range(count)]
    if of_pixels is None and not of_features:
        return None, []
    # Every cell is a sample: a few images, spread over all, are many.
    for evidence in evidence_of(scorer, _some(training_nhwc)):
        if of_pixels is not None:
            of_pixels.add(evidence.denoising)
        for moments, cells in zip(of_features, vectors(evidence), strict=True):
            moments.add(cells)
    return general_gaussian(of_pixels) if of_pixels else None, of_features


def _begun(scorer: Scorer, training_nhwc: np.ndarray, generals: Mapping[bool, NormalGaussian]) -> list[Learning]:
    """The Gaussians by place and by kind that the config allows, whitened by those for all places; these by whether the
    prediction is subtracted."""
    scoring, seed = scorer.config.scoring, scorer.config.training.seed
    if not (scoring.by_place or scoring.by_kind):
        return []
    projections = {
        subtracted: place_projection(general, scoring.place_dimensions, seed)
        for subtracted, general in generals.items()
    }
    choosing = scoring.place_turns is None or (scoring.by_kind and scoring.covariance == "select")
    asked = choosing and False in projections
    tell = asked and _explained_by_place(scorer, training_nhwc, projections[False]) >= PLACES_TELL
    lying = scoring.place_turns is not True
    turned = not tell if scoring.place_turns is None else scoring.place_turns
    begun = []
    if scoring.by_place:
        begun += [
            Learning(Moments(each, by_place=True), subtracted, lying or subtracted, turned and not subtracted)
            for subtracted, each in projections.items()
        ]
    by_kind = scoring.by_kind and (scoring.covariance == "kind" or not tell)
    for turns in [False] * lying + [True] * turned if by_kind else []:  # which see other kinds
        samples = _kind_samples(scorer, training_nhwc, TURNS if turns else 1)
        begun.append(Learning(KindMoments(samples, scoring.kinds, projections[False], seed), False, not turns, turns))
    return begun


def _explained_by_place(scorer: Scorer, training_nhwc: np.ndarray, projection: Tensor) -> float:
    moments = Moments(projection, by_place=True)
    for features in _features_of(scorer, _some(training_nhwc)):
        moments.add(features)
    return explained_by_place(moments)


def _kind_samples(scorer: Scorer, training_nhwc: np.ndarray, directions: int) -> Tensor:
    """(n, C): features of cells that kinds are told from, of some photographs in so many directions."""
    some = _some(training_nhwc)
    sampled = SampledCells(directions * len(some), scorer.config.training.seed, count=CANDIDATES)
    for turn in range(directions):
        for features in _features_of(scorer, np.rot90(some, turn, axes=(1, 2))):
            sampled.add(features)
    return sampled.samples().flatten(0, 1)


def _some(training_nhwc: np.ndarray) -> np.ndarray:
    """Those at `general_places`."""
    return training_nhwc[general_places(len(training_nhwc))]


def general_places(count: int) -> slice:
    """Where, of so many training photographs, the about `GENERAL_IMAGES` lie that shape what all places share."""
    return slice(None, None, max(1, count // GENERAL_IMAGES))


def _of_all_photographs(
    scorer: Scorer,
    training_nhwc: np.ndarray,
    of_pixels: NormalGaussian | None,
    learning: Sequence[Learning],
    with_context: bool,
) -> tuple[Moments | None, NearestNormal | None]:
    """What takes all photographs: sums of the pixel branch at each place, whitened by the given Gaussian of all places, and the
    cells that are kept of the context; Gaussians of features learn on the way."""
    if of_pixels is None and not learning and not with_context:
        return None, None
    pixels = Moments(of_pixels.whitening[0], by_place=True) if of_pixels else None
    sampled = SampledCells(len(training_nhwc), scorer.config.training.seed) if with_context else None
    for evidence in evidence_of(scorer, training_nhwc):
        if pixels is not None:
            pixels.add(evidence.denoising)
        for each in learning:
            each.moments.add(evidence.residuals if each.subtracted else evidence.features)
        if sampled is not None:
            assert evidence.context is not None, "an extractor with context stages"
            sampled.add(evidence.context)
    return pixels, _context(scorer, sampled.samples()) if sampled else None


def features_of_turned(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Tensor]:
    """The features of images in the other directions, batch by batch."""
    for turn in range(1, TURNS):
        yield from _features_of(scorer, np.rot90(images_nhwc, turn, axes=(1, 2)))


def _features_of(scorer: Scorer, images_nhwc: np.ndarray) -> Iterator[Tensor]:
    """Their features as they are, batch by batch."""
    batch = scorer.config.scoring.batch_size
    for start in range(0, len(images_nhwc), batch):
        yield scorer.features(images_nhwc[start : start + batch])


def _context(scorer: Scorer, samples: Tensor) -> NearestNormal:
    config, extractor = scorer.config, scorer.extractor
    stages = [extractor.stage_channels[stage] for stage in extractor.context_stages]
    return nearest_normal(samples, stages, config.scoring.context_cells, config.training.seed)


def _mixtures(scoring: ScoringConfig, details: Measure, context: NearestNormal | None) -> list[Measure]:
    """The measure with each reach and weight of the context that the config allows."""
    reaches: Sequence[int] = (0,)
    if details.covariance == "place":
        reaches = REACHES if scoring.place_reach is None else (scoring.place_reach,)
    weights: Sequence[float] = (0.0,)
    if context is not None:
        weights = CONTEXT_WEIGHTS if scoring.context_weight is None else (scoring.context_weight,)
    return [
        details._replace(context=context if weight > 0 else None, context_weight=weight, reach=reach)
        for reach in reaches
        for weight in weights
    ]
