"""Models as they are judged: in evaluation mode, without gradients, by numbers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_custom.errors import ConfigError
from lightning_custom.precision import unwrap


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within the block all parts of ``modules`` are in evaluation mode and no graph is kept.

    Afterwards each part is in the mode that it was in: a BatchNorm that was frozen in evaluation mode stays there.
    """
    parts = [part for module in modules for part in unwrap(module).modules()]
    were_training = [part.training for part in parts]
    for part in parts:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was_training in zip(parts, were_training, strict=True):
            part.training = was_training


def computed(metric: Metric | MetricCollection) -> dict[str, float]:
    """What the metrics have found over all processes, by their names; they begin anew.

    :class:`ConfigError` for one that gives more than a number, such as a value a class.
    """
    found = metric.compute()
    values = found if isinstance(found, Mapping) else {type(metric).__name__: found}
    metric.reset()
    for name, value in values.items():
        if getattr(value, "numel", lambda: 1)() != 1:
            raise ConfigError(f"metrics: {name} gives {value.numel()} numbers; give one that is averaged to a number")
    return {name: float(value) for name, value in values.items()}
