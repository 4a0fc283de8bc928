"""Adam on all parameters as one vector, for small networks, whose many tensors cost more than their arithmetic."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_custom.errors import ConfigError
from lightning_custom.state import unwrap_optimizer


class FlatAdam(Adam):
    """Adam (Kingma and Ba 2015), and from :meth:`flatten_` on the same on one vector instead of every parameter.

    :attr:`vector` then holds all parameters and ``vector.grad`` all gradients, of which the parameters and their
    gradients are views: whatever reads or writes either reads or writes both. So ``loss.backward()`` adds to it, and
    ``clip_norm_([optimizer.vector], 1.0)`` is one norm. Two things differ from Adam: a gradient that a backward pass
    does not reach is 0 instead of absent, and is stepped on; and the sums of a norm are in another order. The state is
    stored as Adam's own, a part for each parameter, so that either goes on from the other's checkpoint.

    >>> module = nn.Linear(2, 1)
    >>> optimizer = flattened(FlatAdam(module.parameters(), 0.1))
    >>> module(torch.ones(3, 2)).sum().backward()
    >>> optimizer.vector.grad.tolist(), module.bias.grad.tolist()
    ([3.0, 3.0, 3.0], [3.0])
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, fused=True)
        self._vector: Tensor | None = None
        self._gradients: list[Tensor] = []
        self.parameters: list[nn.Parameter] = []
        """Those whose views :meth:`views` gives, in their order."""
        self._averages: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def vector(self) -> Tensor:
        """``[P]``, once flattened."""
        if self._vector is None:
            raise AttributeError("vector: there is none before flatten_()")
        return self._vector

    def flatten_(self) -> None:
        """Move parameters, gradients and averages together; after ``fabric.setup``, before anything keeps a view.

        Frozen parameters stay where they are. :class:`ConfigError` for several dtypes or devices, and for a sharded
        module.
        """
        parameters = [part for group in self.param_groups for part in group["params"] if part.requires_grad]
        kinds = {(part.dtype, part.device, type(part.data)) for part in parameters}
        if len(self.param_groups) != 1 or len(kinds) != 1 or next(iter(kinds))[2] is not Tensor:
            raise ConfigError(
                "optimizer: one vector needs whole parameters of one group, dtype and device; here are "
                f"{len(self.param_groups)} groups of {sorted(map(str, {kind[0] for kind in kinds}))}; make them alike"
            )
        self.parameters = parameters
        self._vector = vector = _joined(parameters)
        vector.grad = torch.zeros_like(vector)
        self._gradients = self.views(vector.grad)
        for part, view, gradient in zip(parameters, self.views(vector), self._gradients, strict=True):
            if part.grad is not None:
                gradient.copy_(part.grad)
            part.data, part.grad = view, gradient
        self._averages = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, in place once flattened."""
        if self._vector is None:
            super().zero_grad(set_to_none)
        else:
            assert self._vector.grad is not None
            self._vector.grad.zero_()
            for part, gradient in zip(self.parameters, self._gradients, strict=True):
                if part.grad is not gradient:
                    part.grad = gradient

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """An update; returns what ``closure``, which computes the gradient, returns.

        :class:`ConfigError` where a parameter's gradient is no longer part of the vector's.
        """
        if self._vector is None:
            return super().step(closure)
        assert self._vector.grad is not None
        with torch.enable_grad():
            found = None if closure is None else closure()
        if any(part.grad is not gradient for part, gradient in zip(self.parameters, self._gradients, strict=True)):
            raise ConfigError(
                "optimizer: a gradient was put in place of the one in its vector, as by module.zero_grad(); "
                "clear gradients with the optimizer's zero_grad()"
            )
        self.step_along(self._vector.grad)
        return found

    @torch.no_grad()
    def step_along(self, gradient: Tensor) -> None:
        """An update by a gradient ``[P]`` from elsewhere; only once flattened."""
        (group,), (average, square, counts) = self.param_groups, self._averages or self._join_averages()
        # A number each: one that all share would be counted up for every parameter by an Adam that goes on from here.
        counts += 1
        # The kernel of Adam with fused=True, without sorting one tensor by dtype and device.
        torch._fused_adam_(
            [self.vector], [gradient], [average], [square], [], [counts[0]], amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"],
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages and counts, Adam's own or another's of this kind."""
        super().load_state_dict(state_dict)
        self._averages = None

    def _join_averages(self) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self.parameters
        states = [self.state[part] for part in parameters]
        updates = {float(state.get("step", 0)) for state in states}
        if len(updates) != 1:
            raise ConfigError(f"optimizer: parameters have had {sorted(updates)} updates, one vector has one; use Adam")
        counts = torch.full((len(parameters),), updates.pop(), device=self.vector.device)
        average, square = (
            _joined([state.get(name, torch.zeros_like(part)) for state, part in zip(states, parameters, strict=True)])
            for name in ("exp_avg", "exp_avg_sq")
        )
        views = zip(states, counts, self.views(average), self.views(square), strict=True)
        for state, count, first, second in views:
            state |= {"step": count, "exp_avg": first, "exp_avg_sq": second}
        self._averages = (average, square, counts)
        return self._averages

    def views(self, vector: Tensor) -> list[Tensor]:
        """The part ``[...]`` of each parameter in a vector ``[P]`` like :attr:`vector`."""
        shapes = [part.shape for part in self.parameters]
        return [part.view(shape) for part, shape in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]


def flattened(optimizer: Optimizer) -> FlatAdam:
    """The :class:`FlatAdam` behind Fabric's wrapper, flattened."""
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, FlatAdam):
        raise ConfigError(f"optimizer: {type(inner).__name__} cannot be flattened; give a FlatAdam")
    inner.flatten_()
    return inner


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])
