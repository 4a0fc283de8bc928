"""How far tasks pull apart, read from the Gram matrix of their gradients, and what that costs them in the end."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_custom.errors import ConfigError


class Conflict(NamedTuple):
    """Angles and sizes of T task gradients, in float64 on the CPU."""

    norms: Tensor
    """``[T]``"""
    cosines: Tensor
    """``[T, T]``; 0 beside a gradient that is zero."""
    magnitude_similarity: Tensor
    """``[T, T]``: ``2ab / (a^2 + b^2)`` of two norms (Yu et al. 2020, definition 2); 0 beside a zero gradient."""
    condition_number: float
    """Largest over smallest singular value of the gradients as a matrix (Senushkin et al. 2023); inf where they
    are dependent as far as float64 can tell."""

    def scores(self, tasks: Sequence[str], prefix: str = "conflict/") -> dict[str, float]:
        """As metrics with tags: the smallest and the mean cosine and similarity of two tasks, the rest as it is."""
        pairs = torch.ones_like(self.cosines, dtype=torch.bool).triu(1)
        scores = {f"norm/{task}": norm for task, norm in zip(tasks, self.norms.tolist(), strict=True)}
        for name, matrix in (("cosine", self.cosines), ("magnitude_similarity", self.magnitude_similarity)):
            if len(tasks) > 1:
                scores |= {f"{name}_min": float(matrix[pairs].min()), f"{name}_mean": float(matrix[pairs].mean())}
        return {f"{prefix}{name}": value for name, value in scores.items()} | {
            f"{prefix}condition_number": self.condition_number
        }


def conflict(gram: Tensor) -> Conflict:
    """Read a Gram matrix ``[T, T]`` of task gradients, in float64; waits for the device once."""
    gram = gram.detach().cpu().double()
    norms = gram.diagonal().clamp_min(0).sqrt()
    there = (norms[:, None] > 0) & (norms > 0)
    # By one norm after the other, since their product may be below the smallest number.
    cosines = (gram / norms / norms[:, None]).clamp(-1, 1)
    ratios = norms[:, None] / norms
    similarity = 2 / (ratios + 1 / ratios)
    return Conflict(
        norms=norms,
        cosines=torch.where(there, cosines, 0.0),
        magnitude_similarity=torch.where(there, similarity, 0.0),
        condition_number=_condition_number(gram),
    )


def _condition_number(gram: Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(gram)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # An eigenvalue of a singular matrix comes out as rounding, of either sign.
    if smallest <= len(gram) * torch.finfo(torch.float64).eps * largest:
        return math.inf
    return math.sqrt(largest / smallest)


def delta_m(
    scores: Mapping[str, float], baselines: Mapping[str, float], higher_is_better: bool | Mapping[str, bool]
) -> float:
    """Mean relative gain over the single-task ``baselines``, in percent, a loss below 0 (Maninis et al. 2019, eq. 1).

    All by the same names; ``higher_is_better`` of each, or of all. Papers that report it the other way round, as a
    loss, have the opposite sign. :class:`ConfigError` where names differ or a baseline is 0.

    >>> delta_m({"left": 3.0, "right": 0.5}, {"left": 2.0, "right": 0.5}, higher_is_better=True)
    25.0
    """
    direction = higher_is_better if isinstance(higher_is_better, Mapping) else dict.fromkeys(scores, higher_is_better)
    if not scores or not scores.keys() == baselines.keys() == direction.keys():
        raise ConfigError(
            f"baselines: of {', '.join(baselines) or 'none'}, scores of {', '.join(scores) or 'none'}; give one of "
            "each, and whether it should rise, by the same names"
        )
    zero = [name for name, baseline in baselines.items() if baseline == 0]
    if zero:
        raise ConfigError(f"baselines: {zero[0]} is 0, to which nothing is relative; leave it out")
    gains = [
        (scores[name] - baselines[name]) / abs(baselines[name]) * (1 if direction[name] else -1) for name in scores
    ]
    return 100 * sum(gains) / len(gains)
