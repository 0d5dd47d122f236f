"""TensorFlow's "same" padding, as EfficientNets have it, without a padded copy of the image.

Where a side is halved it puts one more zero behind than before, which no convolution of PyTorch's can: timm pads a copy, which
for the largest maps takes longer than the convolution. A kernel with a row of zeros in front, and as many zeros around the
image as belong behind, sums the same products.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn


class SameConv2d(Conv2dSame):
    """timm's Conv2dSame, number for number where these are finite."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride))."""
        # Measured on CPUs; elsewhere kernels of an even side may well be slower. Dilated, zeros in front would lie further away.
        if x.device.type != "cpu" or max(self.dilation) > 1:
            return super().forward(x)
        sides = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        zeros = [get_same_padding(side, kernel, stride, 1) for side, kernel, stride in sides]
        height, width = (total % 2 for total in zeros)
        weight = F.pad(self.weight, (width, 0, height, 0))
        return F.conv2d(x, weight, self.bias, self.stride, [(total + 1) // 2 for total in zeros], groups=self.groups)


def use_same_convolutions(network: nn.Module) -> None:
    """Let the network's convolutions with "same" padding do without the copy; their weights, names and hooks stay."""
    for module in network.modules():
        if type(module) is Conv2dSame:
            module.__class__ = SameConv2d
