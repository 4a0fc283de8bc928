"""The gradients of several tasks by the parameters that they share, from the graph cut at the shared features.

    features = trunk(inputs)
    cuts = {task: Cut(features) for task in heads}
    outputs = {task: heads[task](cut.seen) for task, cut in cuts.items()}
    fabric.backward(task_losses(...).local.sum())     # each head's own gradient, and each task's at its cut
    rows = task_gradients(fabric, list(cuts.values()), parameters)
    mean_rows_(fabric, rows)                          # before the aggregator, which sees the gradients of all processes
    direction, weights = aggregate(aggregator, rows, rng.shared)
    set_gradient_(fabric, parameters, direction)

A head's graph is gone through once, for all tasks together; the trunk's once a task. Where every task has a batch of
its own, each has its own features, and both are once: as much work as for the sum of the losses. The cut is in
float32 in every precision. Shapes: T tasks, P trunk parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_custom.distributed import sum_over_processes
from lightning_custom.errors import ConfigError
from lightning_custom.layers import head_of
from lightning_custom.multitask.aggregator import Aggregator, GramAggregator, aggregate
from lightning_custom.multitask.gram import gram_matrix, tasks_named
from lightning_custom.precision import unwrap
from lightning_custom.state import Stateful


class Cut:
    """Features as a task's head sees them, apart from the trunk's graph; tensors, or containers of tensors."""

    def __init__(self, features: Any) -> None:
        self.features = [part for part in tree_leaves(features) if isinstance(part, Tensor) and part.requires_grad]
        """The trunk's, with their graph."""
        if not self.features:
            raise ConfigError(
                f"trunk: its features, a {type(features).__name__}, hold no tensor with a gradient; give tensors, or "
                "tuples, lists or dicts of them"
            )
        self._leaves: list[Tensor] = []
        self.seen = tree_map(self._detached, features)
        """The same numbers without it; the backward pass of a loss leaves its gradient here."""

    def _detached(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or not part.requires_grad:
            return part
        self._leaves.append(part.detach().requires_grad_())
        return self._leaves[-1]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient at each of :attr:`features`; 0 where the loss left none."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]

    def shares_graph_with(self, other: "Cut") -> bool:
        """Whether both are of the same pass through the trunk."""
        return any(one is another for one in self.features for another in other.features)


def task_gradients(
    fabric: Fabric, cuts: Sequence[Cut], parameters: Sequence[nn.Parameter], *, batched: bool = False
) -> Tensor:
    """Each task's gradient by the trunk's ``parameters``, a row each ``[T, P]``, in float32 or wider.

    One backward pass through the trunk a task; ``batched`` makes it one for all, with T times its memory, for layers
    that ``torch.vmap`` knows. It needs cuts of the same features. The loss scale of ``16-mixed`` is divided out.
    """
    sizes = [parameter.numel() for parameter in parameters]
    rows = torch.empty(len(cuts), sum(sizes), dtype=_wide(parameters), device=parameters[0].device)
    if batched and len(cuts) > 1:
        if not all(cut.shares_graph_with(cuts[0]) for cut in cuts):
            raise ConfigError("batched_backward: tasks with batches of their own have graphs apart; set it to false")
        at_features = [torch.stack(parts) for parts in zip(*(cut.gradients for cut in cuts), strict=True)]
        found = _gradient(cuts[0].features, parameters, at_features, is_grads_batched=True)
        torch.cat([part.flatten(1).to(rows.dtype) for part in found], dim=1, out=rows)
        return _unscaled_(fabric, rows)
    for i, cut in enumerate(cuts):
        more = any(cut.shares_graph_with(other) for other in cuts[i + 1 :])
        found = _gradient(cut.features, parameters, cut.gradients, retain_graph=more)
        torch.cat([part.flatten().to(rows.dtype) for part in found], out=rows[i])
    return _unscaled_(fabric, rows)


def _unscaled_(fabric: Fabric, rows: Tensor) -> Tensor:
    scale = loss_scale(fabric)
    return rows if scale == 1 else rows.div_(scale)


def last_layer_norms(fabric: Fabric, losses: Tensor, trunk: nn.Module) -> Tensor:
    """The norms ``[T]``, over all processes, of the gradients of whole ``losses [T]`` by the trunk's last layer.

    Their graph stays. A norm that overflowed in ``16-mixed`` is 0.
    """
    module, scale = unwrap(trunk), loss_scale(fabric)
    names = head_of(module)
    parameters = [part for name, part in module.named_parameters() if name.startswith(names) and part.requires_grad]
    if not parameters:
        raise ConfigError("trunk: its last layer has no parameter to train; gradnorm needs one, use another method")
    rows = torch.stack(
        [
            torch.cat([part.flatten().to(_wide(parameters)) for part in found])
            for found in (_gradient([loss * scale], parameters, None, retain_graph=True) for loss in losses)
        ]
    )
    mean_rows_(fabric, rows)
    norms: Tensor = (rows / scale).norm(dim=1)
    return norms if scale == 1 else norms.nan_to_num(0.0, 0.0, 0.0)


def _gradient(
    outputs: Sequence[Tensor], parameters: Sequence[nn.Parameter], at_outputs: Sequence[Tensor] | None, **options: Any
) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = torch.autograd.grad(
        outputs, parameters, at_outputs, allow_unused=True, materialize_grads=True, **options
    )
    return found


def _wide(parameters: Sequence[nn.Parameter]) -> torch.dtype:
    return torch.promote_types(parameters[0].dtype, torch.float32)


def mean_rows_(fabric: Fabric, rows: Tensor) -> None:
    """Replace the gradients ``rows [T, P]`` by their means over processes, in one reduction."""
    if fabric.world_size > 1:
        dist.all_reduce(rows)
        rows /= fabric.world_size


def feature_gram(fabric: Fabric, cuts: Sequence[Cut]) -> Tensor:
    """The Gram matrix ``[T, T]`` of the gradients at the features of all processes, float64 on the CPU.

    Its square root of the diagonal times the trunk's largest singular value bounds the gradients' norms (Sener and
    Koltun 2018, section 3.3). The features must be the same for all tasks.
    """
    if not all(cut.shares_graph_with(cuts[0]) for cut in cuts):
        raise ConfigError("gradients: features of tasks with batches of their own do not compare; use exact")
    gram = gram_matrix(torch.stack([torch.cat([part.flatten() for part in cut.gradients]) for cut in cuts]))
    if fabric.world_size > 1:
        # Each process has the gradients of its own samples, times the number of processes.
        gram = sum_over_processes(fabric, fabric.to_device(gram)).cpu() / fabric.world_size**2
    return gram / loss_scale(fabric) ** 2


def weighted_backward(cuts: Sequence[Cut], weights: Tensor) -> None:
    """Leave the sum of the tasks' gradients, times ``weights [T]``, in the trunk: one backward pass."""
    features = [part for cut in cuts for part in cut.features]
    # As numbers: MPS takes no float64.
    at_features = [weight * part for weight, cut in zip(weights.tolist(), cuts, strict=True) for part in cut.gradients]
    torch.autograd.backward(features, at_features)


def aggregate_present(
    aggregator: Aggregator, rows: Tensor, present: Sequence[bool], generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """:func:`aggregate` for ``rows`` of the tasks that are ``present [T]``: a direction, and weights ``[T]``.

    An aggregator that remembers something of each task gets zeros for the others; any other does not see them, since
    some would stand still for a gradient of zero.
    """
    if all(present):
        return aggregate(aggregator, rows, generator)
    if isinstance(aggregator, Stateful):
        whole = rows.new_zeros(len(present), rows.shape[1])
        whole[torch.tensor(present)] = rows
        return aggregate(aggregator, whole, generator)
    with tasks_named(_numbers(present)):
        direction, weights = aggregate(aggregator, rows, generator)
    return direction, None if weights is None else _among(weights, present)


def weights_of_present(
    aggregator: GramAggregator, gram: Tensor, present: Sequence[bool], generator: torch.Generator
) -> Tensor:
    """The same from the Gram matrix of the tasks that are ``present [T]``: weights ``[T]``."""
    if all(present):
        return aggregator.weights(gram, generator)
    if isinstance(aggregator, Stateful):
        rows = torch.stack([_among(row, present) for row in gram])
        return aggregator.weights(torch.stack([_among(column, present) for column in rows.T]), generator)
    with tasks_named(_numbers(present)):
        return _among(aggregator.weights(gram, generator), present)


def _numbers(present: Sequence[bool]) -> list[int]:
    return [task for task, is_there in enumerate(present) if is_there]


def _among(values: Tensor, present: Sequence[bool]) -> Tensor:
    among = values.new_zeros(len(present))
    among[torch.tensor(present)] = values
    return among


def remember_(weights: Tensor, found: Tensor | None, present: Sequence[bool]) -> None:
    """Put ``found [T]``, if there are any, into ``weights [T]``; those of absent tasks stay as they were."""
    if found is not None:
        weights.copy_(torch.where(torch.tensor(present), found, weights))


@torch.no_grad()
def set_gradient_(fabric: Fabric, parameters: Sequence[nn.Parameter], direction: Tensor) -> None:
    """Make ``direction [P]`` the gradient of ``parameters``, with the loss scale of ``16-mixed``."""
    scale = loss_scale(fabric)
    direction = direction if scale == 1 else direction * scale
    parts = direction.split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def loss_scale(fabric: Fabric) -> float:
    """What ``fabric.backward`` multiplies a loss by: 1 but in ``16-mixed``."""
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def overflowed(fabric: Fabric, values: Tensor) -> bool:
    """Whether 16-bit gradients ran out of range, for which the loss scaler of ``16-mixed`` leaves the step out."""
    return loss_scale(fabric) != 1 and not bool(values.isfinite().all())
