"""What happens inside a network, at chosen steps: activations, gradients, weights and how far an update moves them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_custom.errors import ConfigError
from lightning_custom.loop import due
from lightning_custom.metrics import MetricLogger
from lightning_custom.precision import unwrap
from lightning_custom.sharded import whole


class Watch:
    """Records statistics of every layer of ``model`` in each ``every``-th step, and costs nothing in the others.

        watch = Watch(model, every=config.watch_every)     # 0: never
        ...
        watch.begin(state.step + 1)                        # before the forward pass
        ...
        optimizer.step()
        watch.end(state.metrics)                           # the only host sync

    A layer is a module that holds parameters of its own; its tags are ``watch/STATISTIC/NAME``: ``activation_mean``,
    ``activation_std``, ``activation_dead`` (the share of a layer's output that is zero or less for the whole batch, so
    that a ReLU behind it passes nothing), ``grad_norm``, ``weight_norm`` and ``update_ratio`` (norm of the update over
    norm of the weights; about 1e-3 is usual). Weights and gradients are shown as histograms too. Activations are of
    the step's last forward pass, on process 0; gradients are as the optimizer saw them.
    """

    def __init__(self, model: nn.Module, *, every: int, histograms: bool = True) -> None:
        if every and any(module._compiled_call_impl is not None for module in unwrap(model).modules()):
            raise ConfigError(
                f"watch_every: {every}, but a compiled model calls no hooks; set it to 0, or do not compile"
            )
        self._layers = {
            name or "model": module
            for name, module in unwrap(model).named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        self._every, self._histograms = every, histograms
        self._step: int | None = None
        self._handles: list[RemovableHandle] = []
        self._values: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Start recording if ``step`` is one of the chosen ones."""
        if not due(step, self._every):
            return
        self._step, self._values = step, {}
        self._before = {name: _flat_weights(layer).clone() for name, layer in self._layers.items()}
        self._handles = [layer.register_forward_hook(self._observe(name)) for name, layer in self._layers.items()]

    def _observe(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def observe(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                activation = output.detach().float()
                self._values[f"watch/activation_mean/{name}"] = activation.mean()
                self._values[f"watch/activation_std/{name}"] = activation.std(correction=0)
                self._values[f"watch/activation_dead/{name}"] = (activation <= 0).all(0).float().mean()

        return observe

    def end(self, metrics: MetricLogger) -> None:
        """Write what was recorded since :meth:`begin`, if anything was."""
        if self._step is None:
            return
        for handle in self._handles:
            handle.remove()
        for name, layer in self._layers.items():
            self._measure(name, layer)
        host = torch.stack([value.float() for value in self._values.values()]).tolist()
        metrics.record(self._step, dict(zip(self._values, host, strict=True)))
        if self._histograms:
            self._write_histograms(metrics, self._step)
        self._step, self._handles, self._values, self._before = None, [], {}, {}

    def _measure(self, name: str, layer: nn.Module) -> None:
        weights = _flat_weights(layer)
        norm = weights.norm()
        self._values[f"watch/weight_norm/{name}"] = norm
        self._values[f"watch/update_ratio/{name}"] = (weights - self._before[name]).norm() / norm.clamp_min(1e-12)
        gradients = _flat_gradients(layer)
        if gradients is not None:
            self._values[f"watch/grad_norm/{name}"] = gradients.norm()

    def _write_histograms(self, metrics: MetricLogger, step: int) -> None:
        for name, layer in self._layers.items():
            metrics.histogram(step, f"watch/weights/{name}", _flat_weights(layer))
            gradients = _flat_gradients(layer)
            if gradients is not None:
                metrics.histogram(step, f"watch/gradients/{name}", gradients)


def _flat_weights(layer: nn.Module) -> Tensor:
    return torch.cat([whole(parameter.detach()).reshape(-1) for parameter in layer.parameters(recurse=False)])


def _flat_gradients(layer: nn.Module) -> Tensor | None:
    gradients = [whole(p.grad).reshape(-1) for p in layer.parameters(recurse=False) if p.grad is not None]
    return torch.cat(gradients) if gradients else None
