"""How many floating-point operations a piece of work needs.

A multiplication with an addition counts as two. Only products count (convolutions, matrices, attention), as is usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.benchmarks.timing import Work


def count_flops(work: Work) -> dict[str, int]:
    """Operations of one run by the name of the module's class and path, such as "UNet.middle_block"; "Global" is all."""
    with FlopCounterMode(display=False) as counter:
        work()
    return {module: sum(by_operator.values()) for module, by_operator in counter.get_flop_counts().items()}


@dataclass(frozen=True)
class Convolution:
    """The shapes of one call of a convolution without stride, dilation or groups."""

    input: tuple[int, ...]
    """(N, C, H, W)."""
    weight: tuple[int, ...]
    """(C', C, k, k)."""
    padding: int

    @property
    def flops(self) -> int:
        """Of one forward pass."""
        n, _, height, width = self.input
        grown = 2 * self.padding - self.weight[-1] + 1
        return 2 * n * (height + grown) * (width + grown) * math.prod(self.weight)


def largest_convolution(network: nn.Module, work: Work) -> Convolution:
    """The call with the most operations among all that one run makes of the network's plain convolutions."""
    calls: list[Convolution] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        calls.append(Convolution(tuple(inputs[0].shape), tuple(module.weight.shape), int(module.padding[0])))

    plain = [m for m in network.modules() if type(m) is nn.Conv2d and m.stride == (1, 1) and m.groups == 1]
    hooks = [module.register_forward_pre_hook(note) for module in plain]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return max(calls, key=lambda call: call.flops)
