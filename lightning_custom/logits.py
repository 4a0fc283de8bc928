"""What the discriminator says of real and of generated samples, as distributions."""

from collections.abc import Sequence

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.metrics import MetricLogger


def show_logits(fabric: Fabric, metrics: MetricLogger, step: int, parts: Sequence[Tensor]) -> dict[str, float]:
    """Write histograms of a batch's logits, over all processes and ``parts``, and return numbers for the row.

    A part ``[2 * B]`` is of real samples and then of as many generated ones.
    ``logit/real`` and ``logit/fake`` are their means; ``logit/told_apart`` is the share of pairs in which the real
    sample has the higher logit, whatever the loss: 0.5 where the discriminator guesses, 1 where it errs in no pair.
    """
    halves = zip(*(part.chunk(2) for part in parts), strict=True)
    real, fake = (gather_shares(torch.cat(half).float(), fabric).cpu() for half in halves)
    metrics.histogram(step, "logit/real", real)
    metrics.histogram(step, "logit/fake", fake)
    return {
        "logit/real": real.mean().item(),
        "logit/fake": fake.mean().item(),
        "logit/told_apart": pairs_told_apart(real, fake),
    }


def pairs_told_apart(real: Tensor, fake: Tensor) -> float:
    """The share of pairs with ``real [N]`` above ``fake [M]``, equal ones by half: the area under the ROC curve."""
    difference = real[:, None] - fake[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()
