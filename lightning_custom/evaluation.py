"""Models as they are judged: in evaluation mode, and without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
