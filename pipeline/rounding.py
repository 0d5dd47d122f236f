"""Networks whose weights are rounded to bfloat16 once, where autocast rounds them at every call: the same numbers, sooner.

On a CPU this is a twentieth of the time of a batch of `fast`. Only for networks that learn no more.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

from pipeline.diffusion.doubling import DoublingConv2d
from pipeline.diffusion.unet import FeatureHead

Network = TypeVar("Network", bound=nn.Module)

ROUNDED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""What autocast computes in bfloat16."""
EXACT = (FeatureHead,)
"""What computes in float32 whatever autocast says."""


def rounded_once(network: Network) -> Network:
    """A copy to be asked under bfloat16 autocast; what computes in float32 is shared with the given network."""
    twin = deepcopy(network, {id(module): module for module in network.modules() if isinstance(module, EXACT)})
    _round(twin)
    return twin


def _round(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        if isinstance(child, EXACT):
            continue
        if isinstance(child, DoublingConv2d) and child.weight.device.type == "cpu":
            child = child.as_transposed()
            setattr(parent, name, child)
        if isinstance(child, ROUNDED):
            child.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
        else:
            _round(child)
