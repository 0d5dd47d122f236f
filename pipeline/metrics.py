"""Exact pixel AUROC, AP and PRO of defect maps, in one pass and constant memory, mergeable across workers.

Maps are compared at float16, which has only 65 536 bit patterns. So three histograms over the patterns hold
all that the pixel metrics depend on: normal pixels, defect pixels, and defect pixels weighted by 1 / size of
their region. Histograms add up, hence any split of the images over workers gives the same result.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

PATTERNS = 1 << 16
NEGATIVE_ZERO = 0x8000
INFINITY = 0x7C00  # the first pattern that is not finite; the sign bit makes it 0xFC00
CHUNK_PIXELS = 1 << 18  # keeps the widened indices of one histogram pass (2 MiB) in cache

# Every finite pattern from the largest value to the smallest; +0 stands for both zeros.
DESCENDING = np.concatenate([np.arange(INFINITY - 1, -1, -1), np.arange(NEGATIVE_ZERO + 1, NEGATIVE_ZERO + INFINITY)])
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)

Counts = NDArray[np.signedinteger]  # int64; bincount gives the platform's intp
Floats = NDArray[np.float64]


def rate_curve(counts: Counts | Floats, total: float) -> Floats:
    """Share of `total` at or above each threshold, [K + 1] from 0; `counts` [K] go from the highest score."""
    return np.concatenate([[0.0], np.cumsum(counts) / total])


def auroc(negatives: Counts, positives: Counts) -> float:
    """Area under the ROC curve from counts per distinct score, highest first; ties count one half."""
    ahead = np.cumsum(positives) - positives / 2  # of each negative: the positives above it, half of its equals
    return float(np.dot(negatives, ahead) / (float(negatives.sum()) * float(positives.sum())))


def score_counts(scores_n: Floats, anomalous_n: NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """How many normal and how many anomalous images have each distinct score, highest first."""
    distinct, rank = np.unique(-scores_n, return_inverse=True)
    normal = np.bincount(rank[~anomalous_n], minlength=len(distinct))
    return normal, np.bincount(rank[anomalous_n], minlength=len(distinct))


def average_precision(negatives: Counts, positives: Counts) -> float:
    """Sum of precision x gain in recall over counts per distinct score, highest first (no interpolation)."""
    true_positives = np.cumsum(positives)
    found = true_positives + np.cumsum(negatives)
    return float(np.dot(positives, true_positives / found) / positives.sum())


def area_to_limit(fpr: Floats, pro: Floats, limit: float) -> float:
    """Area under the PRO curve for FPR in [0, limit], divided by `limit`; linear between thresholds."""
    inside = int(np.searchsorted(fpr, limit, side="right"))
    x, y = fpr[:inside], pro[:inside]
    if inside < len(fpr):
        share = (limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        x = np.append(x, limit)
        y = np.append(y, pro[inside - 1] + share * (pro[inside] - pro[inside - 1]))
    area = np.dot(np.diff(x), y[1:] + y[:-1]) / 2
    return min(1.0, float(area) / limit)  # 1 / size weights may add up to a rounding error over 1


def descending(histogram: NDArray) -> NDArray:
    """Histogram [65536] over float16 patterns -> finite values' bins, highest first, both zeros joined."""
    ordered = histogram[DESCENDING]
    ordered[INFINITY - 1] += histogram[NEGATIVE_ZERO]
    return ordered


def region_pixels(
    patterns_hw: NDArray[np.uint16], mask_hw: NDArray[np.bool_]
) -> tuple[NDArray[np.uint16], Floats, int]:
    """Patterns [P] of an image's defect pixels (one or more), 1 / size of their regions [P], region count."""
    rows = np.flatnonzero(mask_hw.any(axis=1))
    columns = np.flatnonzero(mask_hw.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # labelling costs by area: label little
    inside = mask_hw[box]
    labels, regions = ndimage.label(inside, structure=EIGHT_NEIGHBOURS)
    region = labels[inside]
    return patterns_hw[box][inside], 1.0 / np.bincount(region)[region], regions


def map_maxima(patterns_nhw: NDArray[np.uint16]) -> Floats:
    """Largest value of each float16 map, read from its patterns [N, H, W]; float64 [N]."""
    # As int16, patterns of positive values ascend with the value and those of negative values descend.
    signed = patterns_nhw.view(np.int16).reshape(len(patterns_nhw), -1)
    highest = signed.max(axis=1)
    negative = np.flatnonzero(highest < 0)
    highest[negative] = signed[negative].min(axis=1)
    return highest.view(np.float16).astype(np.float64)


def checked_masks(masks: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    masks = np.asarray(masks)
    if masks.shape != shape:
        raise ValueError(f"masks have shape {masks.shape} but maps {shape}; give one mask pixel per map pixel")
    if masks.dtype == np.bool_:
        return masks
    if masks.dtype.kind not in "iu":
        raise ValueError(f"masks have dtype {masks.dtype}; give bool, or integers 0 and 1")
    if masks.size and (masks.min() < 0 or masks.max() > 1):
        raise ValueError(f"masks hold values from {masks.min()} to {masks.max()}; give bool, or integers 0 and 1")
    return masks.astype(np.bool_)


def checked_maps(maps: ArrayLike) -> NDArray:
    maps = np.asarray(maps)
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps have shape {maps.shape}; give images x height x width, at least 1 x 1 pixels each")
    if maps.dtype.kind != "f":
        raise ValueError(f"maps have dtype {maps.dtype}; give float16, float32 or float64")
    return maps


def checked_scores(scores: ArrayLike, images: int) -> Floats:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (images,):
        raise ValueError(f"scores have shape {scores.shape}; give one per map, shape ({images},)")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of image {np.argmin(np.isfinite(scores))} of the batch is not finite")
    return scores


def raise_if_not_finite(histogram: Counts) -> None:
    magnitudes = histogram.reshape(2, -1).sum(axis=0)
    if magnitudes[INFINITY + 1 :].any():
        raise ValueError(f"maps hold NaN in {magnitudes[INFINITY + 1 :].sum()} pixels; drop those images first")
    if magnitudes[INFINITY]:
        raise ValueError(
            f"maps go beyond the float16 range, +-65504, in {magnitudes[INFINITY]} pixels; scale them down"
        )


class LocalizationMetrics:
    """Running pixel and image metrics of one category.

    Memory is 1.5 MiB whatever the number of maps, plus 9 bytes per image for its score and label. It pickles.
    `fpr_limit` is where the PRO integral ends: over 0 and up to 1, in whole hundredths, because the metric is
    named by it ("pro_0.30"); otherwise ValueError.
    """

    def __init__(self, fpr_limit: float = 0.3) -> None:
        self.fpr_limit = round(float(fpr_limit), 2)
        if not (0 < self.fpr_limit <= 1 and abs(self.fpr_limit - fpr_limit) < 1e-9):
            raise ValueError(f"fpr_limit is {fpr_limit}; give a multiple of 0.01 from 0.01 to 1")
        self.regions = 0
        self._normal: Counts = np.zeros(PATTERNS, dtype=np.int64)
        self._defect: Counts = np.zeros(PATTERNS, dtype=np.int64)
        self._covered: Floats = np.zeros(PATTERNS, dtype=np.float64)
        self._scores = array("d")
        self._anomalous = array("b")

    @property
    def images(self) -> int:
        return len(self._scores)

    @property
    def pro_name(self) -> str:
        return f"pro_{self.fpr_limit:.2f}"

    def update(self, maps_nhw: ArrayLike, masks_nhw: ArrayLike, scores_n: ArrayLike | None = None) -> None:
        """Add N images; N may be 0, and H, W may differ from call to call.

        maps_nhw: float [N, H, W], higher is more anomalous, any sign; rounded to float16, so within +-65504.
        masks_nhw: bool or 0/1 integers [N, H, W], true where defective.
        scores_n: finite image scores [N], compared at float64; None takes each rounded map's maximum.
        Raises ValueError, and leaves the object as it was, for a wrong shape, dtype or value.
        """
        maps = checked_maps(maps_nhw)
        masks = checked_masks(masks_nhw, maps.shape)
        images, height, width = maps.shape
        scores = np.empty(images) if scores_n is None else checked_scores(scores_n, images)
        anomalous = np.logical_or.reduce(masks.reshape(images, height * width), axis=1)
        every: Counts = np.zeros(PATTERNS, dtype=np.int64)
        defect_patterns, weights, regions = [np.empty(0, np.uint16)], [np.empty(0)], 0
        step = max(1, CHUNK_PIXELS // (height * width))
        for start in range(0, images, step):
            part = slice(start, start + step)
            # Infinities and NaN show up in the histogram, which names them in an error.
            with np.errstate(over="ignore", invalid="ignore"):
                patterns = np.ascontiguousarray(maps[part], dtype=np.float16).view(np.uint16)
            every += np.bincount(patterns.ravel(), minlength=PATTERNS)
            if scores_n is None:
                scores[part] = map_maxima(patterns)
            for image in np.flatnonzero(anomalous[part]):
                found, weight, count = region_pixels(patterns[image], masks[start + image])
                defect_patterns.append(found)
                weights.append(weight)
                regions += count
        raise_if_not_finite(every)
        pixels = np.concatenate(defect_patterns)
        defect = np.bincount(pixels, minlength=PATTERNS)
        covered = np.bincount(pixels, weights=np.concatenate(weights), minlength=PATTERNS)
        self._add(every - defect, defect, covered, regions)
        self._scores.frombytes(scores.tobytes())
        self._anomalous.frombytes(anomalous.tobytes())

    def merge(self, other: LocalizationMetrics) -> LocalizationMetrics:
        """Add all that `other` has seen to this object and return it; ValueError if the FPR limits differ."""
        if other.fpr_limit != self.fpr_limit:
            raise ValueError(f"cannot merge fpr_limit {other.fpr_limit} into {self.fpr_limit}; use one limit")
        self._add(other._normal, other._defect, other._covered, other.regions)
        self._scores = self._scores + other._scores
        self._anomalous = self._anomalous + other._anomalous
        return self

    def compute(self) -> dict[str, float | int]:
        """pixel_auroc, pixel_ap, pro_X.XX, image_auroc, image_ap in [0, 1], and the counts images, regions.

        An image is anomalous if its mask has any true pixel. FPR is over the normal pixels of all images, PRO
        the mean over regions (8-connected) of their covered share, integrated over every distinct threshold
        and divided by the limit. A pixel metric is NaN without a defect pixel or without a normal one, an
        image metric without an anomalous image or without a normal one; `reasons` says which. ValueError if
        no image was added.
        """
        undefined = self.reasons()
        values = dict.fromkeys(["pixel_auroc", "pixel_ap", self.pro_name, "image_auroc", "image_ap"], float("nan"))
        if "pixel_auroc" not in undefined:
            normal, defect, covered = self._by_threshold()
            values["pixel_auroc"] = auroc(normal, defect)
            values["pixel_ap"] = average_precision(normal, defect)
            fpr, pro = rate_curve(normal, normal.sum()), rate_curve(covered, self.regions)
            values[self.pro_name] = area_to_limit(fpr, pro, self.fpr_limit)
        if "image_auroc" not in undefined:
            normal, defect = score_counts(np.array(self._scores), np.array(self._anomalous, dtype=bool))
            values["image_auroc"] = auroc(normal, defect)
            values["image_ap"] = average_precision(normal, defect)
        return {**values, "images": self.images, "regions": self.regions}

    def reasons(self) -> dict[str, str]:
        """Why each metric that `compute` gives as NaN is undefined; ValueError if no image was added."""
        if not self.images:
            raise ValueError("no image was added; call update with the maps and masks of at least one")
        found: dict[str, str] = {}
        if not self.regions:
            found |= dict.fromkeys(["pixel_auroc", "pixel_ap", self.pro_name], "no mask has a defect pixel")
        elif not self._normal.any():
            found |= dict.fromkeys(["pixel_auroc", "pixel_ap", self.pro_name], "no mask has a normal pixel")
        if not any(self._anomalous):
            found |= dict.fromkeys(["image_auroc", "image_ap"], "no image is anomalous")
        elif all(self._anomalous):
            found |= dict.fromkeys(["image_auroc", "image_ap"], "no image is normal")
        return found

    def curves(self, points: int = 200) -> dict[str, Floats]:
        """The pixel ROC (fpr, tpr) and PRO (fpr, pro) curves for drawing: three float64 arrays of one length.

        At most `points` (2 or more) of the exact points, from (0, 0, 0) to (1, 1, 1), spread evenly along the
        curves. The arrays are empty where the pixel metrics are NaN. ValueError if no image was added.
        """
        if points < 2:
            raise ValueError(f"points is {points}; give 2 or more")
        if "pixel_auroc" in self.reasons():
            return {"fpr": np.empty(0), "tpr": np.empty(0), "pro": np.empty(0)}
        normal, defect, covered = self._by_threshold()
        fpr, tpr = rate_curve(normal, normal.sum()), rate_curve(defect, defect.sum())
        pro = rate_curve(covered, self.regions)
        kept = np.arange(len(fpr))
        if len(fpr) > points:
            travelled = fpr + tpr + pro  # all three only rise, so their sum measures the way along the curves
            kept = np.searchsorted(travelled, np.linspace(0, travelled[-1], points))
            kept = np.unique(kept)
        return {"fpr": fpr[kept], "tpr": tpr[kept], "pro": pro[kept]}

    def _add(self, normal: Counts, defect: Counts, covered: NDArray, regions: int) -> None:
        # New arrays, not +=: after a trip through shared memory the histograms may be read-only.
        self._normal = self._normal + normal
        self._defect = self._defect + defect
        self._covered = self._covered + covered
        self.regions += regions

    def _by_threshold(self) -> tuple[Counts, Counts, Floats]:
        """Normal, defect and weighted defect pixels at each distinct map value that occurs, highest first."""
        normal, defect, covered = (descending(h) for h in (self._normal, self._defect, self._covered))
        seen = (normal + defect) > 0
        return normal[seen], defect[seen], covered[seen]
