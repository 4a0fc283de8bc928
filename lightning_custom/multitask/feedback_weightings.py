"""Weightings that learn from what a step did: GradNorm from gradients' norms, FAMO from the losses afterwards."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.weighting import Weighting


class GradNorm(Weighting):
    """GradNorm: weights under which tasks that learn slower have larger gradients (Chen et al. 2018, algorithm 1).

    They descend ``sum_t |G_t - mean(G) r_t^alpha|`` (eq. 2), whose last factor is held constant: ``G_t`` is the norm
    of the weighted task's gradient at the last shared layer, ``r_t`` the loss over its first value, relative to the
    mean over tasks. The descent is Adam's with ``lr``; then weights are made at least 0.001 and of mean 1.

    Costs the gradients of T losses at one layer, and their average over processes, in each step. State: weights,
    first losses, Adam's moments. When tasks differ in how fast they learn, and T is small.
    """

    losses_must_be = "not negative"
    needs_norms = True
    learned: Tensor
    first: Tensor

    def __init__(self, tasks: Sequence[str], *, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        self.alpha = alpha
        self.register_buffer("learned", self.numbers(1.0))
        self.register_buffer("first", self.numbers(0.0))
        self.adam = _Adam(len(tasks), lr)

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The learned weights."""
        seen = losses if self._present is None else losses * self._present
        self.first = torch.where(self.first > 0, self.first, seen)
        return self.learned

    @torch.no_grad()
    def after_backward(self, norms: Tensor) -> None:
        """One step of the weights towards their targets."""
        norms = norms.to(self.learned.dtype)
        counts = self.first > 0 if self._present is None else (self.first > 0) & self._present
        share = counts / counts.sum().clamp_min(1)
        ratios = torch.where(counts, self.known / self.first, 0.0)
        relative = ratios / (ratios * share).sum().clamp_min(torch.finfo(ratios.dtype).tiny)
        own = self.learned * torch.where(counts, norms, 0.0)
        target = (own * share).sum() * relative**self.alpha
        gradient = torch.where(counts, torch.sign(own - target) * norms, 0.0)
        moved = self.adam.descended(self.learned, gradient).clamp_min(1e-3)
        self.learned = moved * (len(moved) / moved.sum())


class FAMO(Weighting):
    """FAMO: all losses fall at an equal relative rate, without task gradients (Liu et al. 2023, algorithm 1).

    Weights are ``z_t / L_t`` made of mean 1, with ``z`` the softmax of T logits. After the step these move against
    ``log L_t before - log L_t after`` taken through the softmax, with Adam's ``lr`` and weight ``decay`` gamma, as in
    the authors' code, but without its lower bounds of losses.

    Costs one more forward pass on the same batch in each step. State: logits, Adam's moments. When tasks are many.
    """

    losses_must_be = "positive"
    needs_losses_after = True
    logits: Tensor

    def __init__(self, tasks: Sequence[str], *, lr: float = 0.025, decay: float = 0.01) -> None:
        super().__init__(tasks)
        self.decay = decay
        self.register_buffer("logits", self.numbers(0.0))
        self.adam = _Adam(len(tasks), lr)

    def weigh(self, losses: Tensor, generator: torch.Generator) -> Tensor:
        """The softmax of the logits over the losses, of mean 1."""
        weights = self.logits.softmax(0) / losses
        return weights / weights.mean()

    @torch.no_grad()
    def after_update(self, global_losses: Tensor) -> None:
        """One step of the logits: less weight for the losses that fell most."""
        after = global_losses.to(self.known.dtype)
        after = self._allowed(after if self._present is None else torch.where(self._present, after, self.known))
        fall = self.known.log() - after.log()
        shares = self.logits.softmax(0)
        gradient = shares * (fall - (shares * fall).sum())
        self.logits = self.adam.descended(self.logits, gradient + self.decay * self.logits)


class _Adam(nn.Module):
    """Adam (Kingma and Ba 2015, algorithm 1) for T numbers, its whole state in buffers."""

    mean: Tensor
    square: Tensor
    updates: Tensor

    def __init__(self, size: int, lr: float) -> None:
        super().__init__()
        if not lr > 0:
            raise ConfigError(f"lr: {lr}; give a number above 0")
        self.lr = lr
        for name, shape in (("mean", (size,)), ("square", (size,)), ("updates", ())):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def descended(self, values: Tensor, gradient: Tensor) -> Tensor:
        """``values`` after one update."""
        self.mean = self.mean.lerp(gradient, 1 - 0.9)
        self.square = self.square.lerp(gradient.square(), 1 - 0.999)
        self.updates = self.updates + 1
        mean, square = self.mean / (1 - 0.9**self.updates), self.square / (1 - 0.999**self.updates)
        return values - self.lr * mean / (square.sqrt() + 1e-8)
