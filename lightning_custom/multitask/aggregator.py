"""From the gradients of several tasks to one direction for the parameters that they share.

    rows = ...                                               # [T, P]: a gradient a task, averaged over processes
    direction, weights = aggregate(aggregator, rows, rng)    # [P], and [T] to log; rng: the step's shared generator

Average the rows over processes *before*: the mean of what each process would make of its own rows is another method.
Most methods need the Gram matrix ``G = J J^T`` alone (:class:`GramAggregator`): a step moves ``[T, T]`` numbers to the
host, solves there in float64, and combines the rows on the device. Your own is a class with that one method:

    class Normalised:
        '''The mean of the gradients, each brought to the mean norm.'''

        def weights(self, gram, generator):
            norms = gram.diagonal().sqrt()
            return norms.mean() / norms / len(norms)

What changes while training goes into ``state_dict`` and ``load_state_dict``, as in :class:`GradVac`; what is random
comes from ``generator`` alone.

Shapes: T tasks, P parameters. Directions have the scale of the sum of the gradients or of their mean, as each says:
the learning rates of one kind are T times those of the other. A task with a zero gradient takes no part. Where a
problem has no solution, or none was found, :class:`SolverError` says so: there is no fallback.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_custom.errors import ConfigError, NonFiniteError
from lightning_custom.multitask.gram import gram_matrix


@runtime_checkable
class GramAggregator(Protocol):
    """A direction that is a weighted sum of the gradients, with weights that depend on their Gram matrix."""

    def weights(self, gram: Tensor, generator: torch.Generator, /) -> Tensor:
        """Weights ``[T]`` for the Gram matrix ``[T, T]``, both float64 on the CPU."""
        ...


@runtime_checkable
class JacobianAggregator(Protocol):
    """A direction that depends on the gradients entry by entry."""

    def direction(self, jacobian: Tensor, generator: torch.Generator, /) -> Tensor:
        """The direction ``[P]`` for gradients ``[T, P]``."""
        ...


Aggregator = GramAggregator | JacobianAggregator


def aggregate(aggregator: Aggregator, jacobian: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """The direction ``[P]`` for the gradients ``jacobian [T, P]``, and the weights ``[T]`` where it has some.

    ``generator`` is a CPU generator in the same state on every process. Costs ``O(T^2 P)`` for the Gram matrix, of
    which a float64 copy of a slice is the only memory, and what the method says. :class:`NonFiniteError` for gradients
    with infinities or NaN; unscale the gradients of 16-bit precision before, and skip a step that overflowed.
    """
    if jacobian.dim() != 2 or not len(jacobian):
        raise ConfigError(f"jacobian: shape {tuple(jacobian.shape)}; give a row a task, [T, P]")
    jacobian = jacobian.detach()
    if not isinstance(aggregator, GramAggregator):
        direction = aggregator.direction(jacobian, generator)
        if not direction.isfinite().all():
            raise NonFiniteError("the direction of the shared parameters is not finite")
        return direction, None
    weights = aggregator.weights(gram_matrix(jacobian), generator)
    # In 16 bits the weights themselves would be rounded.
    exact = torch.promote_types(jacobian.dtype, torch.float32)
    direction = weights.to(jacobian.device, exact) @ jacobian.to(exact)
    return direction.to(jacobian.dtype), weights
