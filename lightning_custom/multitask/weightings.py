"""Weightings by the losses alone, with or without parameters, and the names of all; see :mod:`.weighting`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.feedback_weightings import FAMO, GradNorm
from lightning_custom.multitask.weighting import Weighting


class Equal(Weighting):
    """Every loss counts 1: the baseline, which well tuned is hard to beat (Kurin et al. 2022; Xin et al. 2022).

    When losses have comparable scales, and first of all. No state.
    """

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """Ones."""
        return torch.ones_like(losses)


class Static(Weighting):
    """Every loss counts what ``fixed``, a mapping by task, says. When the weights are known or searched for."""

    fixed: Tensor

    def __init__(self, tasks: Sequence[str], fixed: Mapping[str, float]) -> None:
        super().__init__(tasks)
        if set(fixed) != set(tasks) or any(weight < 0 for weight in fixed.values()):
            raise ConfigError(f"fixed: {dict(fixed)}; give a weight of at least 0 for each of {', '.join(tasks)}")
        # A setting and not a state: what the config says counts.
        fixed_weights = torch.tensor([fixed[task] for task in tasks], dtype=torch.float64)
        self.register_buffer("fixed", fixed_weights, persistent=False)

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The fixed weights."""
        return self.fixed


class Random(Weighting):
    """RLW: the softmax of normal numbers, new in each step (Lin et al. 2022, section 3.1), times T.

    The baseline that a clever weighting has to beat. No state: the numbers are the step's.
    """

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """T times a random point of the simplex."""
        numbers = torch.randn(len(self.tasks), dtype=torch.float64, generator=generator)
        return len(self.tasks) * numbers.softmax(0).to(losses, non_blocking=True)


class Uncertainty(Weighting):
    """Homoscedastic uncertainty, ``sum_t L_t / (2 sigma_t^2) + log sigma_t`` (Kendall et al. 2018, eq. 7).

    The parameters are ``log_variances [T]``, from 0; at their optimum ``sigma_t^2 = L_t``. The paper's form for
    classification (eq. 10) has ``sigma^2 / 2`` in the place of ``sigma^2``, and the same optimum. When losses have
    different units; it lags behind losses that fall faster than its parameters are learned.
    """

    losses_must_be = "not negative"

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_variances = nn.Parameter(self.numbers(0.0))

    def forward(
        self, task_losses: Tensor, global_losses: Tensor, generator: torch.Generator, present: Tensor | None = None
    ) -> Tensor:
        """The weighted sum, and the log of each sigma."""
        total: Tensor = super().forward(task_losses, global_losses, generator, present)
        return total + self.log_variances.sum() / 2

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """Half the inverse variances."""
        return torch.exp(-self.log_variances) / 2


class IMTLL(Weighting):
    """IMTL-L, ``sum_t exp(s_t) L_t - s_t`` (Liu et al. 2021, section 3.2): every weighted loss is led to 1.

    The parameters are ``log_scales [T]``, from 0. It is :class:`Uncertainty` without its prior, and twice as heavy.
    """

    losses_must_be = "not negative"

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_scales = nn.Parameter(self.numbers(0.0))

    def forward(
        self, task_losses: Tensor, global_losses: Tensor, generator: torch.Generator, present: Tensor | None = None
    ) -> Tensor:
        """The weighted sum, less the logs of the weights."""
        total: Tensor = super().forward(task_losses, global_losses, generator, present)
        return total - self.log_scales.sum()

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The scales."""
        return self.log_scales.exp()


class GeometricMean(Weighting):
    """GLS: the geometric mean ``(prod_t L_t)^(1/T)`` (Chennupati et al. 2019, geometric loss strategy).

    Weights are ``mean / (T L_t)``. Multiplying one loss by a constant changes no direction; the whole gradient
    shrinks with the losses, unlike :class:`ScaleInvariant`'s. No state.
    """

    losses_must_be = "positive"

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The geometric mean over T times each loss."""
        return losses.log().mean().exp() / (len(self.tasks) * losses)


class ScaleInvariant(Weighting):
    """The sum of the logs of the losses, whose gradient no unit of a loss can change.

    Weights are ``1 / L_t``: those of IMTL-L at its optimum in each step (Liu et al. 2021, section 3.2), and, made of
    mean 1, FAMO's first. When losses have different units and all should fall by equal shares. No state.
    """

    losses_must_be = "positive"

    def forward(
        self, task_losses: Tensor, global_losses: Tensor, generator: torch.Generator, present: Tensor | None = None
    ) -> Tensor:
        """The sum of the logs."""
        total: Tensor = super().forward(task_losses, global_losses, generator, present)
        # The weighted sum itself is always T.
        return total + (self.known.log() - 1).sum()

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The inverse losses."""
        return 1 / losses


class DWA(Weighting):
    """Dynamic weight average: T times the softmax of ``L_t(k-1) / L_t(k-2) / temperature`` (Liu et al. 2019, eq. 7).

    ``L_t(k)`` is the mean over the k-th ``window`` of steps, an epoch in the paper; weights are 1 in the first two.
    The task whose loss falls slowest counts most, and where none rises at most ``exp(1 / temperature)`` times as much
    as another. State: three times T numbers.
    """

    losses_must_be = "not negative"
    sums: Tensor
    recent: Tensor
    before: Tensor

    def __init__(self, tasks: Sequence[str], *, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if window < 1 or not temperature > 0:
            raise ConfigError(f"window: {window}, temperature: {temperature}; give at least 1, and a number above 0")
        self.window, self.temperature = window, temperature
        self._steps = 0
        for name, value in (("sums", 0.0), ("recent", 1.0), ("before", 1.0)):
            self.register_buffer(name, self.numbers(value))

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """T times a softmax of the last two windows' ratios; takes the losses into the open window."""
        ratios = torch.ones_like(losses)
        if self._steps >= 2 * self.window:
            # A loss that was 0 for a whole window has no ratio to it.
            ratios = torch.where(self.before == 0, ratios, self.recent / self.before)
        self.sums = self.sums + losses
        self._steps += 1
        if self._steps % self.window == 0:
            self.before, self.recent, self.sums = self.recent, self.sums / self.window, torch.zeros_like(losses)
        return len(self.tasks) * (ratios / self.temperature).softmax(0)

    def get_extra_state(self) -> dict[str, Any]:
        """The number of steps, which on a device would have to be waited for."""
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over the number of steps."""
        self._steps = state["steps"]


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "equal": Equal,
    "static": Static,
    "random": Random,
    "uncertainty": Uncertainty,
    "imtl-l": IMTLL,
    "geometric-mean": GeometricMean,
    "scale-invariant": ScaleInvariant,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "famo": FAMO,
}
"""The weightings by the names that a config uses; each takes the tasks' names, ``static`` their weights too."""
