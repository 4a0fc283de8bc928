"""What the discriminator says of real and of generated samples, as distributions."""

from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import gather_shares
from lightning_custom.metrics import MetricLogger


def show_logits(fabric: Fabric, metrics: MetricLogger, step: int, real: Tensor, fake: Tensor) -> dict[str, float]:
    """Write histograms of this process's logits ``[B]`` together with all others', and return numbers for the row.

    ``logit/real`` and ``logit/fake`` are their means; ``logit/told_apart`` is the share of pairs in which the real
    sample has the higher logit, whatever the loss: 0.5 where the discriminator guesses, 1 where it errs in no pair.
    """
    real, fake = (gather_shares(part.float(), fabric).cpu() for part in (real, fake))
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
