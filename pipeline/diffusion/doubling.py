"""A 3x3 convolution of an image doubled by nearest neighbours, without the doubled image.

Of the nine products for each of its pixels, neighbours share most: a transposed convolution of the small image with a 4x4 kernel
takes 16 products for each small pixel instead of 36. On a CPU half the time forward; with gradients, too, but with AMX as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoublingConv2d(nn.Conv2d):
    """The parameters of a 3x3 convolution with padding 1, by their published names."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', 2 H, 2 W)."""
        if x.device.type != "cpu":  # where nobody has measured it
            return super().forward(doubled(x))
        return F.conv_transpose2d(x, doubling_kernel(self.weight), self.bias, stride=2, padding=1)

    @torch.no_grad()
    def as_transposed(self) -> nn.ConvTranspose2d:
        """What it computes on a CPU, with the kernel worked out once: for weights that change no more."""
        found = nn.ConvTranspose2d(self.in_channels, self.out_channels, 4, stride=2, padding=1)
        found.load_state_dict(self.state_dict() | {"weight": doubling_kernel(self.weight)})
        return found


def doubled(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 2 H, 2 W): every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def doubling_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of the transposed convolution, stride 2 and padding 1, that equals a convolution with `weight`,
    (C', C, 3, 3), of the doubled image: every product reaches the 2x2 copies of its pixel."""
    # Which of three weights reach each of four places; reversed, as transposed convolutions are.
    reach = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    # A product of matrices rather than a sum of slices, whose gradients are slow to put together; in full precision.
    with torch.autocast(weight.device.type, enabled=False):
        return torch.einsum("ijkl,ockl->coij", torch.einsum("ik,jl->ijkl", reach, reach), weight)
