"""From evidence of photographs to anomaly maps and scores: pixel map, feature map, ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Config
from pipeline.denoiser import Denoiser
from pipeline.evidence import Evidence, evidence_source
from pipeline.features import FeatureExtractor, resize_features
from pipeline.gaussian import NormalGaussian
from pipeline.images import to_unit_range
from pipeline.kinds import KindGaussians
from pipeline.nearest import NearestNormal
from pipeline.rounding import rounded_once
from pipeline.smoothing import gaussian_blur

Distance = Callable[..., Tensor]
"""As `distance_from`."""


def distance_from(normal: NormalGaussian | KindGaussians | NearestNormal, cells: Tensor, *reach: int) -> Tensor:
    """How far cells (N, C, G, G) lie from what is normal: (N, G, G). reach: as Gaussians of places take it."""
    return normal.distance(cells, *reach)


class Measure(NamedTuple):
    """How evidence becomes two maps."""

    pixel: NormalGaussian | None
    """Measures `Evidence.denoising`; None takes `Evidence.pixel`, as published."""
    feature: NormalGaussian | KindGaussians | None
    """Measures residuals or features; None takes `Evidence.feature`, as published."""
    subtract_prediction: bool
    """Whether `feature` measures residuals rather than features."""
    context: NearestNormal | None = None
    """Measures `Evidence.context`, which sees more of the surroundings."""
    context_weight: float = 0.0
    """Share of `context` in the feature map; distances are about 1 for normal cells in both."""
    reach: int = 0
    """Cells that a part may lie from its place, where `feature` is by place."""
    turned: bool = False
    """Whether `feature` learned from turned photographs, too."""

    @property
    def covariance(self) -> str:
        """What measures features: none, general, place or kind."""
        return "none" if self.feature is None else self.feature.covariance

    def of_features(self, vectors: Tensor, context: Tensor | None, distance: Distance = distance_from) -> Tensor:
        """How far features lie from normal ones: (N, G, G), where there is a Gaussian of them.

        vectors (N, C, G, G): what the Gaussian measures, the features or their residuals; context: as `Features` has it.
        distance: `distance_from`, or one that remembers what it found.
        """
        assert self.feature is not None
        found = distance(self.feature, vectors, *([self.reach] if self.reach else []))
        if self.context is None:
            return found
        assert context is not None, "an extractor with context stages"
        around = resize_features(distance(self.context, context)[:, None], found.shape[-1])
        return found.lerp(around[:, 0], self.context_weight)


class BranchMaps(NamedTuple):
    """The two maps of N images, not yet calibrated: (N, T', s, s) of the pixel branch, (N, T', G, G) of the feature branch."""

    pixel: Tensor
    feature: Tensor


@dataclass(frozen=True)
class Calibration:
    """What normal images say of the evidence, and what follows from it. Tensors are float32 on the scorer's device."""

    measure: Measure
    pixel_mean: Tensor
    """(T',) of the pixel branch over held-out normal images; T' is 1 where a Gaussian makes one map of all noise scales."""
    pixel_std: Tensor
    feature_mean: Tensor
    """(T',) of the feature branch."""
    feature_std: Tensor
    alpha: float
    """Weight of the pixel branch in the combined map."""
    top_pixels: int
    """The image score is the mean of this many largest map values."""
    normal_scores: Tensor
    """(n,) sorted image scores of normal images: what the threshold comes from."""
    threshold: float
    """Image score above which an image is anomalous at the configured false-alarm rate."""
    pixel_threshold: float
    """Map value above which a pixel belongs to a region, at the same rate per image."""
    false_alarms_low: float
    """Lower end of the 95 % confidence interval of the rate at which normal images exceed `threshold`."""
    false_alarms_high: float
    """Its upper end: wide, where `normal_scores` are few."""


class Maps(NamedTuple):
    """Calibrated maps (N, map_size, map_size) float32: the ensemble and its two branches."""

    combined: Tensor
    pixel: Tensor
    feature: Tensor


@dataclass(frozen=True)
class ScoredImages:
    """Results for n images, in the order given."""

    maps: np.ndarray
    """float16 (n, map_size, map_size)."""
    scores: np.ndarray
    """float64 (n,): the mean of the largest pixels of the map, at float16."""
    kl_scores: np.ndarray
    """float64 (n,): the same of the pixel branch (KL and denoising, or restoration) alone."""
    feature_scores: np.ndarray
    """float64 (n,): the same of the feature branch alone."""


def top_means(maps: Tensor, counts: Sequence[int]) -> Tensor:
    """Lu et al. 2023, released code: image scores, the mean of the largest map values, for each count of them.

    (N, H, W) -> float64 (len(counts), N).
    """
    limits = [min(count, maps[0].numel()) for count in counts]
    largest = maps.flatten(1).topk(max(limits)).values.double()
    return torch.stack([largest[:, :limit].mean(1) for limit in limits])


class Scorer:
    """A trained network made ready to score on one device. Build once, call often."""

    def __init__(
        self,
        denoiser: Denoiser,
        extractor: FeatureExtractor,
        calibration: Calibration | None = None,
        *,
        device: torch.device | str = "cpu",
        label: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.denoiser = denoiser.to(self.device).to(memory_format=torch.channels_last).eval()
        self.extractor = extractor.to(self.device).to(memory_format=torch.channels_last)
        self.label = label
        # What is stored stays exact; evidence asks a copy, which later changes of these weights do not reach.
        low_precision = denoiser.config.training.precision == "bfloat16"
        self._asked = (
            (rounded_once(self.denoiser), self.extractor.rounded_once())
            if low_precision
            else (self.denoiser, self.extractor)
        )
        self.calibration: Calibration | None = None
        self.configure(denoiser.config)
        self.calibration = calibration

    def configure(self, config: Config) -> None:
        """Score with other settings of the same network and extractor; the calibration is forgotten."""
        self.config = config
        self.source = evidence_source(config, *self._asked, self.label)
        self.calibration = None

    @torch.inference_mode()
    def evidence(self, images_nhwc: np.ndarray) -> Evidence:
        """uint8 (N, map_size, map_size, 3), N <= scoring.batch_size -> evidence of every noise scale, on the device."""
        return self.source(self._batch(images_nhwc), len(images_nhwc))

    @torch.inference_mode()
    def features(self, images_nhwc: np.ndarray) -> Tensor:
        """uint8 (N, map_size, map_size, 3), N <= scoring.batch_size -> `Evidence.features`, without asking the network."""
        return self.source.seen(self._batch(images_nhwc), len(images_nhwc)).details

    def _batch(self, images_nhwc: np.ndarray) -> Tensor:
        """A full batch on the device: a fixed shape makes every image's arithmetic the same whatever its company."""
        missing = self.config.scoring.batch_size - len(images_nhwc)
        padded = np.concatenate([images_nhwc, np.repeat(images_nhwc[-1:], missing, axis=0)])
        return torch.from_numpy(to_unit_range(padded)).to(self.device, memory_format=torch.channels_last)

    def upsample(self, maps: Tensor) -> Tensor:
        """(N, T, s, s) -> (N, T, map_size, map_size), bilinear."""
        side = self.config.scoring.map_size
        return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)

    @torch.inference_mode()
    def branch_maps(self, evidence: Evidence, measure: Measure, distance: Distance = distance_from) -> BranchMaps:
        """The two maps of N images: the evidence as published, smoothed KL (Lu et al. 2023, section 3.1) and squared feature
        residuals (eq. 10) of every noise scale or the distances from the restored image, or the distances of denoising and
        features from normal, one map each. distance: as `Measure.of_features` takes it."""
        if measure.pixel is not None:
            pixel = distance(measure.pixel, evidence.denoising)[:, None]
        else:
            sigma = self.config.scoring.kl_sigma * evidence.pixel.shape[-1] / self.config.scoring.map_size
            pixel = gaussian_blur(evidence.pixel, sigma)
        if measure.feature is None:
            return BranchMaps(pixel, evidence.feature)
        vectors = evidence.residuals if measure.subtract_prediction else evidence.features
        return BranchMaps(pixel, measure.of_features(vectors, evidence.context, distance)[:, None])

    @torch.inference_mode()
    def maps(self, branches: BranchMaps, calibration: Calibration) -> Maps:
        """Lu et al. 2023, eq. 11: A = mean over t of alpha s_pixel + (1 - alpha) s_feature, both calibrated."""
        scoring = self.config.scoring
        pixel, feature = self.upsample(branches.pixel), self.upsample(branches.feature)
        if scoring.normalisation == "image":
            # The released code: KL scaled by its own image, features left raw.
            pixel = (pixel - pixel.mean((2, 3), keepdim=True)) / pixel.std((2, 3), keepdim=True)
        else:
            pixel = (pixel - calibration.pixel_mean[:, None, None]) / calibration.pixel_std[:, None, None]
            feature = (feature - calibration.feature_mean[:, None, None]) / calibration.feature_std[:, None, None]
        pixel, feature = (gaussian_blur(part.mean(1), scoring.map_sigma) for part in (pixel, feature))
        return Maps(calibration.alpha * pixel + (1 - calibration.alpha) * feature, pixel, feature)

    def score(self, images_nhwc: np.ndarray) -> ScoredImages:
        """Maps and scores of any number of photographs, uint8 (n, map_size, map_size, 3), n >= 1."""
        assert self.calibration is not None, "a scorer without calibration only gives raw maps"
        batch = self.config.scoring.batch_size
        batches = (images_nhwc[start : start + batch] for start in range(0, len(images_nhwc), batch))
        return self.score_evidence(map(self.evidence, batches), self.calibration)

    def score_evidence(self, batches: Iterable[Evidence], calibration: Calibration) -> ScoredImages:
        """The same of their evidence, batch by batch, at least one, under a calibration."""
        maps, scores = [], []
        for evidence in batches:
            found = self.maps(self.branch_maps(evidence, calibration.measure), calibration)
            # Everything downstream sees float16: scores are taken from what is stored.
            stored = stored_map(found.combined)
            maps.append(stored.cpu().numpy())
            branches = [
                top_means(part.float(), [calibration.top_pixels]) for part in (stored, found.pixel, found.feature)
            ]
            scores.append(torch.cat(branches).cpu().numpy())
        combined, pixel, feature = np.concatenate(scores, axis=1)
        return ScoredImages(np.concatenate(maps), combined, pixel, feature)


def stored_map(combined: Tensor) -> Tensor:
    """A map as it is stored and measured: float16, limited to its finite range."""
    return combined.clamp(-65504, 65504).half()
