"""A copy of a network that lags behind it, to compute targets with."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_custom.precision import unwrap


class TargetNetwork:
    """A copy of ``module`` that moves towards it when told to: Mnih et al. 2015 (all the way), Lillicrap et al. 2016.

    Without gradients, and in float32 where the module is in half precision, whose rounding would swallow small
    moves. Buffers are copied. Make it after ``fabric.setup``.

    >>> target = TargetNetwork(nn.Linear(2, 2))
    >>> target.update_(0.005)
    """

    def __init__(self, module: nn.Module) -> None:
        source = unwrap(module)
        self.module = copy.deepcopy(source).requires_grad_(False)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        # Walking a module's tree costs as much as the update of a small network.
        self._targets: list[Tensor] = list(self.module.parameters())
        self._values: list[Tensor] = list(source.parameters())
        self._buffers = list(zip(self.module.buffers(), source.buffers(), strict=True))

    @torch.no_grad()
    def update_(self, share: float) -> None:
        """Move by ``share`` of the way to the module's weights of now; 1 copies them."""
        # No copy where the dtypes are equal.
        values = [value.to(target.dtype) for value, target in zip(self._values, self._targets, strict=True)]
        if share == 1:
            torch._foreach_copy_(self._targets, values)
        else:
            torch._foreach_lerp_(self._targets, values, share)
        for target, value in self._buffers:
            target.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over parameters and buffers."""
        self.module.load_state_dict(state_dict)
