"""Which classes generated images are of: how many, how evenly, and how far from the data's own shares."""

import math

import torch
from torch import Tensor


def class_scores(predicted: Tensor, shares: Tensor) -> dict[str, float]:
    """Scores of the classes ``predicted [N]`` for samples, where the data has classes in ``shares [K]``, of sum 1.

    - ``modes``: classes that some sample is of.
    - ``class_entropy``: entropy of the samples' classes, in nats; at most ``log K``.
    - ``reverse_kl``: Kullback-Leibler divergence from the samples' classes to the data's, in nats (Metz et al. 2017,
      section 3.3.1). N perfect samples of K classes have about ``(K - 1) / (2 N)``.
    """
    counts = torch.bincount(predicted.cpu(), minlength=len(shares)).double()
    found = counts > 0
    own, data = counts[found] / counts.sum(), shares.double().cpu()[found]
    return {
        "modes": float(found.sum()),
        "class_entropy": max(0.0, float(-(own * own.log()).sum())),
        "reverse_kl": float((own * (own / data).log()).sum()),
    }


def perfect_reverse_kl(samples: int, classes: int) -> float:
    """About what ``samples`` perfect ones have, for their number alone: ``(K - 1) / (2 N)`` nats (Miller 1955)."""
    return (classes - 1) / (2 * samples)


def expected_modes(samples: int, classes: int) -> float:
    """How many of evenly drawn ``classes`` appear among ``samples``, on average."""
    return -classes * math.expm1(samples * math.log1p(-1 / classes)) if classes > 1 else 1.0
