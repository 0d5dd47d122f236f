"""The U-Net of Dhariwal & Nichol 2021 with the second output head of Lu et al. 2023, which predicts clean features.

Parameter names and arithmetic follow the published guided-diffusion checkpoints (`input_blocks.N.M.*` and so on), so
that their weights load as they are. Only the feature head is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.diffusion.doubling import DoublingConv2d, doubled
from pipeline.diffusion.group_norm import GroupNorm, group_norm


class UNetOutput(NamedTuple):
    """prediction (N, 6, H, W): noise and raw variance fraction; features (N, C, G, G), unless the head was not asked; states
    (N, c, G, G): what the head sees. Neither without a feature head."""

    prediction: Tensor
    features: Tensor | None = None
    states: Tensor | None = None


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: cosines then sines of t at dim/2 frequencies from 1 to 1e-4; float32 (T, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def norm_of(channels: int) -> GroupNorm:
    """32 groups, as published."""
    return GroupNorm(32, channels)


def modulated(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """SiLU(norm(x) (1 + scale) + shift) of x (N, C, H, W); scale and shift (T, C), one for every N / T consecutive images.

    Each image's numbers are the same whatever N / T is, one image alone included.
    """
    if not isinstance(norm, GroupNorm) or len(scale) == len(x) > 1:
        scale, shift = (each[:, :, None, None] for each in (scale, shift))
        return F.silu(torch.addcmul(shift, norm(x), 1 + scale))
    # The norm multiplies and adds anyway: images that share a timestep spare a pass over memory.
    factors = 1 + scale.to(norm.weight.dtype)
    weights, biases = norm.weight * factors, torch.addcmul(shift, norm.bias, factors)
    parts = zip(x.chunk(len(scale)), weights, biases, strict=True)
    normed = [group_norm(part, norm.num_groups, weight, bias, norm.eps) for part, weight, bias in parts]
    if torch.is_grad_enabled():
        return F.silu(torch.cat(normed))
    result = torch.empty_like(x, dtype=normed[0].dtype)  # which autocast makes float32 on a GPU
    for part, place in zip(normed, result.chunk(len(scale)), strict=True):
        torch.ops.aten.silu.out(part, out=place)
    return result


def zeroed(module: nn.Conv2d | nn.Conv1d) -> nn.Module:
    """The same convolution starting at zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """BigGAN-style residual block with scale-shift time conditioning; halves or doubles the side when asked.

    forward: x (N, channels, H, W) and embeddings (T, embedding), one for every N / T consecutive images.
    """

    def __init__(self, channels: int, embedding: int, out_channels: int, resample: float = 1) -> None:
        super().__init__()
        self.resample = resample
        convolution = (
            DoublingConv2d(channels, out_channels) if resample > 1 else nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.in_layers = nn.Sequential(norm_of(channels), nn.SiLU(), convolution)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(
            norm_of(out_channels),
            nn.SiLU(),  # this, which `modulated` does, and the next keep the published numbering: the convolution is out_layers.3
            nn.Dropout(0.0),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = activation(norm(x))
        if self.resample < 1:
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h = convolution(h)  # doubles by itself
        scale, shift = self.emb_layers(embedding).chunk(2, dim=1)
        norm, _, _, convolution = self.out_layers
        assert isinstance(norm, nn.GroupNorm)
        h = convolution(modulated(norm, h, scale, shift))
        return self.skip_connection(doubled(x) if self.resample > 1 else x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions, in heads of `head_channels`."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        assert channels % head_channels == 0, f"{channels} channels do not split into heads of {head_channels}"
        self.heads = channels // head_channels
        self.norm = norm_of(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).reshape(n, c, height * width))
        # Published order: heads outermost, then q, k, v.
        qkv = qkv.reshape(n, self.heads, 3, c // self.heads, height * width).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*(part.contiguous() for part in qkv.unbind(2)))
        h = self.proj_out(h.transpose(-1, -2).reshape(n, c, height * width))
        return x + h.reshape(n, c, height, width)


class Stage(nn.ModuleList):
    """A sequence in which residual blocks also receive the time embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class FeatureHead(nn.Sequential):
    """Lu et al. 2023: GroupNorm, SiLU, 1x1 convolution from a decoder stage to the extractor's channels, in float32."""

    def __init__(self, channels: int, feature_channels: int) -> None:
        super().__init__(norm_of(channels), nn.SiLU(), nn.Conv2d(channels, feature_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())

    def mean(self, x: Tensor, scales: int) -> Tensor:
        """The mean over noise scales of what it says of N images on each, averaged before its convolution, which is linear:
        (scales N, channels, G, G) -> (N, feature_channels, G, G)."""
        norm, activation, convolution = self
        with torch.autocast(x.device.type, enabled=False):
            # A sum of slices, which PyTorch adds up sooner than it takes a mean over a dimension.
            return convolution(sum(activation(norm(x.float())).chunk(scales)) / scales)


class UNet(nn.Module):
    """Noise and variance prediction with an optional clean-feature head.

    image_size is in pixels; attention_resolutions are down-sampling rates (image side / feature side) as in the
    published code; feature_rate is the down-sampling rate of the decoder level that carries the feature head.
    """

    def __init__(
        self,
        *,
        image_size: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_head_channels: int,
        in_channels: int = 3,
        out_channels: int = 6,
        num_classes: int | None = None,
        feature_channels: int | None = None,
        feature_rate: int = 4,
    ) -> None:
        super().__init__()
        deepest = 2 ** (len(channel_mult) - 1)
        assert image_size % deepest == 0, f"image_size {image_size} must be a multiple of {deepest}"
        self.image_size = image_size
        self.model_channels = model_channels
        embedding = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label_emb = nn.Embedding(num_classes, embedding) if num_classes is not None else None

        def stage(channels: int, out: int, rate: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(channels, embedding, out)]
            if rate in attention_resolutions:
                layers.append(AttentionBlock(out, num_head_channels))
            return layers

        channels, rate = channel_mult[0] * model_channels, 1
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Stage(stage(channels, mult * model_channels, rate)))
                channels = mult * model_channels
                skips.append(channels)
            if level + 1 < len(channel_mult):
                self.input_blocks.append(Stage([ResBlock(channels, embedding, channels, resample=0.5)]))
                skips.append(channels)
                rate *= 2

        self.middle_block = Stage(
            [
                ResBlock(channels, embedding, channels),
                AttentionBlock(channels, num_head_channels),
                ResBlock(channels, embedding, channels),
            ]
        )

        self.output_blocks = nn.ModuleList()
        self.feature_head: FeatureHead | None = None
        self.feature_stage = -1
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), mult * model_channels, rate)
                channels = mult * model_channels
                # The published position: the last block of the level that does not yet up-sample.
                if feature_channels is not None and rate == feature_rate and i == num_res_blocks - 1:
                    self.feature_stage = len(self.output_blocks)
                    self.feature_head = FeatureHead(channels, feature_channels)
                if level > 0 and i == num_res_blocks:
                    layers.append(ResBlock(channels, embedding, channels, resample=2))
                    rate //= 2
                self.output_blocks.append(Stage(layers))
        assert feature_channels is None or self.feature_head is not None, f"no decoder level at rate {feature_rate}"

        self.out = nn.Sequential(norm_of(channels), nn.SiLU(), zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)))

    def forward(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, *, ask_head: bool = True
    ) -> UNetOutput:
        """x (N, 3, H, W) in about [-1, 1] plus noise; timesteps (T,) original steps, one for every N / T consecutive images;
        labels (T,) when class-conditional.

        ask_head: whether the feature head answers, which takes long where features have many channels.
        """
        assert (labels is not None) == (self.label_emb is not None), "labels go with num_classes"
        assert len(x) % len(timesteps) == 0, "as many images to each timestep"
        embedding = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)
        skips, features, states = [], None, None
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for i, block in enumerate(self.output_blocks):
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
            if self.feature_head is not None and i == self.feature_stage:
                states, features = x, self.feature_head(x) if ask_head else None
        return UNetOutput(self.out(x), features, states)

    @classmethod
    def from_guided_diffusion(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        image_size: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_head_channels: int,
        out_channels: int = 6,
        num_classes: int | None = None,
    ) -> UNet:
        """The published network with the published weights (fp16 or fp32), computed in float32, without a feature head.

        attention_resolutions are down-sampling rates. A label embedding in the checkpoint is dropped unless num_classes
        is given. Raises ValueError naming the first key that is missing, unexpected or of another shape.
        """
        network = cls(
            image_size=image_size,
            model_channels=model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
            channel_mult=channel_mult,
            num_head_channels=num_head_channels,
            out_channels=out_channels,
            num_classes=num_classes,
        )
        network.load_guided_diffusion(state_dict)
        return network

    def load_guided_diffusion(self, state_dict: Mapping[str, Tensor], *, labels: bool = True) -> None:
        """Copy a published checkpoint into this network; the feature head, which it cannot hold, keeps its values.

        labels: whether a class-conditional network takes the checkpoint's label embedding too or keeps its own. Raises
        ValueError as from_guided_diffusion does.
        """
        take_labels = labels and self.label_emb is not None
        weights = {k: v for k, v in state_dict.items() if take_labels or k != "label_emb.weight"}
        own = self.state_dict()
        kept = ("feature_head.",) if take_labels else ("feature_head.", "label_emb.")
        expected = {k for k in own if not k.startswith(kept)}
        for problem, keys in (
            ("lacks", expected - weights.keys()),
            ("has an unexpected", weights.keys() - expected),
        ):
            if keys:
                raise ValueError(f"the checkpoint {problem} tensor {min(keys)} (and {len(keys) - 1} more)")
        for key in sorted(expected):
            if own[key].shape != weights[key].shape:
                raise ValueError(f"{key} has shape {tuple(weights[key].shape)}, the network {tuple(own[key].shape)}")
        self.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
