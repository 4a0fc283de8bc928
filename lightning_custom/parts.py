"""A batch in parts, for gradients that are accumulated over them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import share
from lightning_custom.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One of the equal parts of this process's share of a batch.

    >>> Part(1, 2).of(torch.arange(6)).tolist()
    [3, 4, 5]
    """

    index: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This part of ``[B, ...]``."""
        return tensor if self.count == 1 else tensor.chunk(self.count)[self.index]


WHOLE = Part(0, 1)
"""The batch as one part."""


def parts(count: int, draw: torch.Generator) -> Iterator[Part]:
    """The parts one after another, each with ``draw`` as it was before the first.

    So a part can draw for the whole global batch, as it must where the number of processes is to change nothing, and
    take its own.
    """
    before = draw.get_state() if count > 1 else None
    for index in range(count):
        if before is not None:
            draw.set_state(before)
        yield Part(index, count)


def mean_over_parts(losses: dict[str, Tensor], named: Mapping[str, Tensor], part: Part) -> Tensor:
    """The sum of the losses in ``named``, as a part of the batch counts; ``losses`` gets each one's mean over parts."""
    for tag, value in named.items():
        own = value.detach() if part.count == 1 else value.detach() / part.count
        losses[tag] = losses[tag] + own if part.index > 0 else own
    total = reduce(torch.add, named.values())
    return total if part.count == 1 else total / part.count


def require_parts(fabric: Fabric, batch_size: int, count: int) -> None:
    """:class:`ConfigError` unless every process's share of a batch has ``count`` equal parts."""
    if count == 1:
        share(batch_size, fabric, "batch_size")
    elif batch_size % (fabric.world_size * count):
        raise ConfigError(
            f"accumulate: {count}, but batch_size {batch_size} on {fabric.world_size} processes does not make equal "
            f"parts; set batch_size to a multiple of {fabric.world_size * count}"
        )
