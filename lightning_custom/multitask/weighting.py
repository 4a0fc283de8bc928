"""What a weighting is: how much each task's loss counts in a step.

    total = weighting(task_losses, global_losses, rng.shared)
    fabric.backward(total)
    mean_gradients_(fabric, model)

``task_losses [T]`` are this process's, with their graph, scaled so that their mean over processes is
``global_losses [T]``: the losses over all processes, detached, equal on each. Weights are functions of the latter, so
that several processes give the run of one. A weight's own parameters get the gradient of the global losses, the same
on every process: averaging it changes nothing. They belong into the optimizer, in a group without weight decay.

A task that has no label in a step is False in ``present [T]`` and 0 in ``task_losses``; for its global loss the last
known one (1 before the first) stands in.
Weights that a paper fixes only up to a factor have mean 1, so that a learning rate found for equal weighting serves.

Everything that a weighting remembers is in its ``state_dict``, in float64, which MPS lacks: there use
``.to(device, torch.float32)``. A step never waits for the device, so a loss that a method cannot take makes the
weights nan; :meth:`Weighting.check` says whose it was. Call it where metrics are flushed, before the flush.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_custom.errors import ConfigError


class Weighting(nn.Module, ABC):
    """Losses ``[T]`` to their weighted sum; a weighting of one's own has a :meth:`weigh`, and its state in buffers.

    >>> class Inverse(Weighting):
    ...     def weigh(self, losses, generator):
    ...         return 1 / losses
    """

    losses_must_be: ClassVar[Literal["any", "not negative", "positive"]] = "any"
    needs_norms: ClassVar[bool] = False
    """Whether each step ends its backward pass with :meth:`after_backward`."""
    needs_losses_after: ClassVar[bool] = False
    """Whether each step ends with :meth:`after_update`."""

    known: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) < len(tasks):
            raise ConfigError(f"tasks: {list(tasks)}; give at least one, each once")
        self.tasks = tuple(tasks)
        self.weights = self.numbers(1.0)
        """``[T]`` as last used, detached, for the logs."""
        self.register_buffer("known", self.numbers(1.0))
        self._present: Tensor | None = None
        self._lowest: Tensor | None = None

    def numbers(self, value: float) -> Tensor:
        """``[T]`` of one value, to begin with."""
        return torch.full((len(self.tasks),), value, dtype=torch.float64)

    def forward(
        self, task_losses: Tensor, global_losses: Tensor, generator: torch.Generator, present: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of ``task_losses [T]``; ``generator`` is the step's shared one."""
        if task_losses.shape != self.known.shape:
            shape = tuple(task_losses.shape)
            raise ConfigError(f"task_losses: shape {shape} for {len(self.tasks)} tasks; give one loss for each")
        losses = global_losses.detach().to(self.known.dtype, copy=True)
        self.known = losses if present is None else torch.where(present, losses, self.known)
        self._present = present
        losses = self._allowed(self.known)
        weights = self.weigh(losses, generator)
        self.weights = weights.detach()
        total = (self.weights * task_losses).sum()
        if weights.requires_grad:
            # Adds 0, and to the weights' own parameters the gradient of the global losses.
            total = total + ((weights - self.weights) * losses).sum()
        return total

    def _allowed(self, losses: Tensor) -> Tensor:
        """``losses`` with nan in place of what the method cannot take; :meth:`check` finds it later."""
        if self.losses_must_be == "any":
            return losses
        self._lowest = losses if self._lowest is None else torch.fmin(self._lowest, losses)
        allowed = losses > 0 if self.losses_must_be == "positive" else losses >= 0
        return torch.where(allowed, losses, torch.nan)

    @abstractmethod
    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]`` for global losses ``[T]``; with a graph only to parameters of the weighting itself."""

    def after_backward(self, norms: Tensor) -> None:
        """Learn from ``norms [T]``: of each unweighted task's gradient at the last shared layer, over all processes."""

    def after_update(self, global_losses: Tensor) -> None:
        """Learn from the losses ``[T]`` on the same batch after the optimizer's step, over all processes."""

    def check(self) -> None:
        """:class:`ConfigError` for a loss that the method could not take since the last check; waits for the device."""
        lowest, self._lowest = self._lowest, None
        for task, loss in zip(self.tasks, [] if lowest is None else lowest.tolist(), strict=False):
            if loss < 0 or (loss == 0 and self.losses_must_be == "positive"):
                raise ConfigError(
                    f"weighting: the loss of task {task!r} was {loss:g}, but {type(self).__name__} needs losses that "
                    f"are {self.losses_must_be}; add a constant to that loss, or use another weighting"
                )
