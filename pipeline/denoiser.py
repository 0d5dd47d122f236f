"""What training produces: the averaged U-Net and the scaling of the features that it predicts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.sampling import Predict, Prediction
from pipeline.diffusion.unet import UNet, UNetOutput
from pipeline.features import FeatureExtractor, Features


class Denoiser(nn.Module):
    """The network of a model, and how photographs and features are brought to its scale."""

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: Config, feature_channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        net = config.network
        self.config = config
        self.unet = UNet(
            **net.model_dump(),
            num_classes=num_classes,
            feature_channels=feature_channels,
            feature_rate=net.image_size // config.features.grid,
        )
        self.register_buffer("feature_mean", torch.zeros(feature_channels, 1, 1))
        self.register_buffer("feature_std", torch.ones(feature_channels, 1, 1))

    def autocast(self, device: torch.device) -> torch.autocast:
        """The arithmetic that the network is trained with."""
        low_precision = self.config.training.precision == "bfloat16"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low_precision)

    def predict(self, process: DiffusionProcess, x_t: Tensor, t: Tensor, label: int | None = None) -> UNetOutput:
        """What the network makes of x_t (N, 3, S, S) at the process's indices t (T,), one for every N / T consecutive images,
        its feature head not asked; label: the class, where it has classes."""
        labels = None if label is None else torch.full_like(t, label)
        with self.autocast(x_t.device):
            x_t = x_t.contiguous(memory_format=torch.channels_last)
            return self.unet(x_t, process.network_timesteps(t), labels, ask_head=False)

    def predictor(self, process: DiffusionProcess, label: int | None = None) -> Predict:
        """The network as sampling asks it: what it says of the noise in x_t, in float32."""

        def predict(x_t: Tensor, t: Tensor) -> Prediction:
            return Prediction(*self.predict(process, x_t, t, label).prediction.float().chunk(2, dim=1))

        return predict

    def target(self, details: Tensor) -> Tensor:
        """The extractor's details (N, C, G, G) on the scale that the network predicts."""
        return torch.addcmul(-self.feature_mean / self.feature_std, details, 1 / self.feature_std)

    def features(self, extractor: FeatureExtractor, x: Tensor) -> Features:
        """Features of photographs (N, 3, map_size, map_size), as the extractor gives them."""
        with self.autocast(x.device):
            return extractor(x.contiguous(memory_format=torch.channels_last))

    def shrink(self, x: Tensor) -> Tensor:
        """Photographs (N, 3, map_size, map_size) -> the network's side, by area average."""
        factor = x.shape[-1] // self.config.network.image_size
        return F.avg_pool2d(x, factor) if factor > 1 else x


def repainted(photographs: Tensor, change: Tensor) -> Tensor:
    """Photographs (N, 3, H, W) with a change at the network's side, (N, 3, S, S), enlarged and added: what the network cannot
    see stays."""
    return photographs + F.interpolate(change, size=photographs.shape[-2:], mode="bilinear", align_corners=False)
