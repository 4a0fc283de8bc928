"""An exponential moving average of a network's weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_custom.precision import unwrap


class EMA:
    """A copy of ``module`` whose parameters follow the module's with a half-life counted in samples.

    After an update on ``batch_size`` samples of which ``samples_seen`` have been seen in all, the copy keeps
    ``0.5 ** (batch_size / half_life)`` of itself; early on the half-life is at most ``ramp * samples_seen``, so that
    the first random weights are soon forgotten (Karras et al. 2020, StyleGAN2-ADA, training loop). Buffers are
    copied. The copy is in evaluation mode, without gradients, and in float32 where the module is in half precision,
    whose rounding would swallow the small updates. Make it after ``fabric.setup``.

    >>> average = EMA(nn.Linear(2, 2), half_life=1000)
    >>> average.decay(batch_size=500, samples_seen=100_000) == 0.5**0.5
    True
    """

    def __init__(self, module: nn.Module, *, half_life: float, ramp: float = 0.05) -> None:
        self.half_life = half_life
        self.ramp = ramp
        source = unwrap(module)
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.float()
        # Walking a module's tree costs as much as the update of a small network.
        self._averages: list[Tensor] = list(self.module.parameters())
        self._values: list[Tensor] = list(source.parameters())
        self._buffers = list(zip(self.module.buffers(), source.buffers(), strict=True))

    def decay(self, batch_size: int, samples_seen: int) -> float:
        """The share of itself that the average keeps at this update, in [0, 1)."""
        half_life = min(self.half_life, self.ramp * samples_seen) if self.ramp > 0 else self.half_life
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update_(self, *, batch_size: int, samples_seen: int) -> None:
        """Move the average towards the module's weights of now."""
        # No copy where the dtypes are equal.
        values = [value.to(average.dtype) for value, average in zip(self._values, self._averages, strict=True)]
        if values:
            torch._foreach_lerp_(self._averages, values, 1 - self.decay(batch_size, samples_seen))
        for average, value in self._buffers:
            average.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averaged parameters and the buffers."""
        return self.module.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averaged parameters and buffers."""
        self.module.load_state_dict(state_dict)
