"""Surgery on gradients one against the other, and entry by entry, at random; see :mod:`.aggregator`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.gram import RANK_TOLERANCE, FloatArray, TaskGradients


class PCGrad:
    """Each gradient without its component against every other, one after the other in random order; their sum.

    Yu et al. 2020, algorithm 1. ``O(T^3)`` in T - 1 vectorised steps. No state.
    """

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``."""
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        surgery = np.eye(len(gradients.tasks))
        rows = np.arange(len(surgery))
        for others in _random_order(gradients, generator):
            inner = (surgery * gradients.cosines[others]).sum(1)
            surgery[rows, others] -= np.minimum(inner, 0)
        return gradients.weights(gradients.norms @ surgery)


class GradVac:
    """Each gradient brought, by adding of every other in random order, to the cosine that is usual with it; their sum.

    Wang et al. 2021, eq. 3 and algorithm 1; with targets of zero it is :class:`PCGrad`. ``beta`` is the share of the
    newest cosine in the moving target. ``O(T^3)``. State: the targets ``[T, T]``, zero at first. A target is cut at
    1 - 1e-6, as a cosine of 1 would need an infinite multiple.
    """

    def __init__(self, num_tasks: int, *, beta: float = 0.01) -> None:
        if num_tasks < 1:
            raise ConfigError(f"num_tasks: {num_tasks}; give at least 1")
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta: {beta}; give a share from 0 to 1")
        self.beta = beta
        self.targets = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
        """The moving average of the cosine of each gradient, under surgery (row), with each other one (column)."""

    def weights(self, gram: Tensor, generator: torch.Generator) -> Tensor:
        """Weights ``[T]``; moves the targets."""
        if gram.shape != self.targets.shape:
            raise ConfigError(f"num_tasks: {len(self.targets)}, but there are gradients of {len(gram)} tasks")
        gradients = TaskGradients.from_gram(gram, type(self).__name__)
        cosines, among = gradients.cosines, np.ix_(gradients.tasks, gradients.tasks)
        targets: FloatArray = self.targets.numpy()[among]
        surgery = np.eye(len(cosines))
        rows = np.arange(len(surgery))
        for others in _random_order(gradients, generator):
            products = surgery @ cosines
            squares = (products * surgery).sum(1)
            # A gradient that surgery has cancelled has no cosine.
            left = squares > RANK_TOLERANCE * np.square(np.abs(surgery).sum(1))
            norms = np.sqrt(squares, where=left, out=np.ones_like(squares))
            cosine = np.clip(products[rows, others] / norms, -1, 1)
            target = np.minimum(targets[rows, others], 1 - 1e-6)
            missing = left & (cosine < target)
            sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
            added = norms * (target * sine - cosine * target_sine) / np.where(missing, target_sine, 1)
            surgery[rows, others] += np.where(missing, added, 0)
            targets[rows, others] += np.where(left, self.beta * (cosine - targets[rows, others]), 0)
        self.targets.numpy()[among] = targets
        return gradients.weights(gradients.norms @ surgery)

    def state_dict(self) -> dict[str, Any]:
        """The targets."""
        return {"targets": self.targets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over targets."""
        self.targets.copy_(state_dict["targets"])


def _random_order(gradients: TaskGradients, generator: torch.Generator) -> NDArray[np.intp]:
    """``[A - 1, A]``: column i is the other tasks in an order of its own."""
    # Drawn for all T tasks, so that a zero gradient does not shift what comes after.
    keys = torch.rand(gradients.num_tasks, gradients.num_tasks, dtype=torch.float64, generator=generator).numpy()
    keys = keys[np.ix_(gradients.tasks, gradients.tasks)]
    np.fill_diagonal(keys, 2)
    order: NDArray[np.intp] = keys.argsort(1)[:, :-1].T
    return order


@dataclass(frozen=True)
class GradDrop:
    """Entry by entry the sum of the gradients of one sign, drawn with the share of that sign in their absolute sum.

    Chen et al. 2020, algorithm 1 and eq. 1, here on gradients of parameters: the scale of the sum. ``leak`` is the
    share of each gradient that passes whatever its sign (their l, the same for all tasks). ``O(T P)``, and P random
    numbers drawn on the CPU and moved, so that processes and devices agree. No state.
    """

    leak: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.leak <= 1:
            raise ConfigError(f"leak: {self.leak}; give a share from 0 to 1")

    def direction(self, jacobian: Tensor, generator: torch.Generator) -> Tensor:
        """The direction ``[P]``."""
        draws = torch.rand(jacobian.shape[1], generator=generator).to(jacobian.device)
        positive = torch.zeros_like(jacobian[0])
        negative = torch.zeros_like(positive)
        for gradient in jacobian:
            positive += gradient.clamp(min=0)
            negative += gradient.clamp(max=0)
        # Below, because draws can be 0 and are never 1: an entry of one sign alone always stays.
        one_sign = torch.where(draws * (positive - negative) < positive, positive, negative)
        return one_sign.lerp(positive + negative, self.leak)
