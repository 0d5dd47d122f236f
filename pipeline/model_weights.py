"""The weights of stored models: a calibrated scorer to safetensors and back. What else is stored is in model_store.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.config import Config
from pipeline.denoiser import Denoiser
from pipeline.errors import UserError
from pipeline.features import FeatureExtractor, stage_channels
from pipeline.gaussian import NormalGaussian
from pipeline.kinds import KindGaussians
from pipeline.model_store import FOLDED, FORMAT, ModelInfo
from pipeline.nearest import NearestNormal
from pipeline.scoring import Calibration, Measure, Scorer
from pipeline.storage import Location

_TENSORS = ("pixel_mean", "pixel_std", "feature_mean", "feature_std", "normal_scores")
_NUMBERS = ("alpha", "top_pixels", "threshold", "pixel_threshold", "false_alarms_low", "false_alarms_high")
_GAUSSIANS = ("pixel", "feature")
_CONTEXT = ("scale", "cells")
_HEAD = "denoiser.unet.feature_head.2"
_PREDICTED = ("denoiser.feature_mean", "denoiser.feature_std", f"{_HEAD}.weight", f"{_HEAD}.bias")
"""Tensors with one entry per channel that the network predicts."""


def save_model(
    models: Location,
    category: str,
    version: str,
    scorer: Scorer,
    classes: Sequence[str] | None,
    provenance: dict[str, Any],
    selection: Sequence[Mapping[str, Any]] = (),
) -> Location:
    """Store a calibrated scorer as MODELS/<category>/<version>; `publish` makes it the one in use. Returns its folder."""
    assert scorer.calibration is not None
    folder = models / category / version
    tensors = {f"denoiser.{name}": tensor for name, tensor in scorer.denoiser.state_dict().items()}
    tensors |= {f"calibration.{name}": getattr(scorer.calibration, name) for name in _TENSORS}
    measure = scorer.calibration.measure
    for branch in _GAUSSIANS:
        gaussian = getattr(measure, branch)
        if gaussian is not None:
            known = {name: tensor for name, tensor in asdict(gaussian).items() if tensor is not None}
            tensors |= {f"{branch}_gaussian.{name}": tensor for name, tensor in known.items()}
            if len(gaussian.whitening) > 1:  # rounded to this when fitted; the largest part of a model
                tensors[f"{branch}_gaussian.whitening"] = gaussian.whitening.half()
    if measure.context is not None:
        tensors |= {f"context.{name}": getattr(measure.context, name) for name in _CONTEXT}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    (folder / "weights.safetensors").write_bytes(save_tensors(plain))
    (folder / "model.json").write_json(
        {
            "format": FORMAT if scorer.extractor.folded else FOLDED - 1,
            "category": category,
            "version": version,
            "config": scorer.config.model_dump(mode="json"),
            "calibration": {name: getattr(scorer.calibration, name) for name in _NUMBERS},
            "subtract_prediction": measure.subtract_prediction,
            "context_weight": measure.context_weight,
            "reach": measure.reach,
            "turned": measure.turned,
            "classes": None if classes is None else list(classes),
            "provenance": provenance,
            "selection": list(selection),
            "normal_scores": scorer.calibration.normal_scores.tolist(),
        }
    )
    return folder


def load_scorer(info: ModelInfo, *, device: torch.device | str = "cpu") -> Scorer:
    """A stored model ready to score; not an outdated one. Raises UserError when its weights do not fit its config."""
    assert not info.outdated
    with _reading(info):
        tensors = _tensors(info, device)
        extractor = FeatureExtractor.of(info.config.features, context=info.context_weight > 0, folded=info.folded)
        parts = {branch: _under(f"{branch}_gaussian.", tensors) for branch in _GAUSSIANS}
        gaussians: dict[str, Any] = {branch: _gaussian(part) if part else None for branch, part in parts.items()}
        context = {name: tensor.float() for name, tensor in _under("context.", tensors).items()}
        measure = Measure(
            subtract_prediction=info.subtract_prediction,
            context_weight=info.context_weight,
            reach=info.reach,
            turned=info.turned,
            context=NearestNormal(**context) if context else None,
            **gaussians,
        )
        known: dict[str, Any] = {**_under("calibration.", tensors), **info.calibration}
        calibration = Calibration(measure=measure, **known)
        denoiser = _denoiser(info, info.config, tensors, extractor)
    return Scorer(denoiser, extractor, calibration, device=device, label=_label(info))


def load_uncalibrated(
    info: ModelInfo, config: Config, *, folded: bool = True, device: torch.device | str = "cpu"
) -> Scorer:
    """The network of a stored model under other settings of scoring, not calibrated; folded: as FeatureExtractor takes it. Raises
    UserError as load_scorer does."""
    with _reading(info):
        extractor = FeatureExtractor.of(config.features, context=True, folded=folded)
        denoiser = _denoiser(info, config, _tensors(info, device), extractor)
    return Scorer(denoiser, extractor, device=device, label=_label(info))


@contextmanager
def _reading(info: ModelInfo) -> Iterator[None]:
    """Says in one line what is wrong with the model's weights."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (FileNotFoundError, SafetensorError, RuntimeError, TypeError, IndexError) as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"the weights of {info.location} cannot be used ({first}): train the category again") from error


def _tensors(info: ModelInfo, device: torch.device | str) -> dict[str, Tensor]:
    tensors = load_tensors((info.location / "weights.safetensors").read_bytes())
    # Copied, since they lie anywhere in the file: products round by where in memory their factors begin.
    tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    return _without_context(info, tensors) if info.predicts_context else tensors


def _without_context(info: ModelInfo, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is left of a network that predicts context stages, too, and of the Gaussian of its features, without these."""
    features = info.config.features
    channels = stage_channels(features.extractor, [*features.stages, *features.context_stages])
    kept = torch.cat([torch.full((count,), stage in features.stages) for stage, count in channels.items()])
    found = {name: tensors[name][kept] for name in _PREDICTED if name in tensors}
    if (projection := tensors.get("feature_gaussian.projection")) is not None:
        found["feature_gaussian.projection"] = projection[:, kept]
    return tensors | found


def _denoiser(info: ModelInfo, config: Config, tensors: dict[str, Tensor], extractor: FeatureExtractor) -> Denoiser:
    denoiser = Denoiser(config, extractor.channels, len(info.classes) if info.classes else None)
    denoiser.load_state_dict(_under("denoiser.", tensors))
    return denoiser


def _gaussian(tensors: Mapping[str, Tensor]) -> NormalGaussian | KindGaussians:
    found = {name: tensor.float() for name, tensor in tensors.items()}
    return KindGaussians(**found) if "centres" in found else NormalGaussian(**found)


def _label(info: ModelInfo) -> int | None:
    return info.classes.index(info.category) if info.classes else None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
