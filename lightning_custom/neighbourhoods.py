"""Fidelity and diversity apart: precision, recall, density and coverage, by nearest neighbours of features."""

import torch
from torch import Tensor

from lightning_custom.errors import ConfigError

_ROWS = 2000


class Neighbourhoods:
    """Points ``[N, F]`` and, around each, the ball that reaches its k-th neighbour among the others."""

    def __init__(self, points: Tensor, k: int = 3) -> None:
        if len(points) <= k:
            raise ConfigError(f"points: {len(points)}; a k-th neighbour with k = {k} needs more than {k}")
        self.points, self.k = points, k
        parts = zip(points.split(_ROWS), torch.arange(len(points)).split(_ROWS), strict=True)
        self.radii = torch.cat([_radii(part, points, own, k) for part, own in parts])
        """``[N]``."""


def _radii(part: Tensor, points: Tensor, own: Tensor, k: int) -> Tensor:
    distances = torch.cdist(part, points)
    distances[torch.arange(len(part)), own] = torch.inf
    return distances.topk(k, dim=1, largest=False).values[:, -1]


def neighbourhood_scores(real: Neighbourhoods, fake: Neighbourhoods) -> dict[str, float]:
    """Four shares of samples, for real features and generated ones with the same k, on one device.

    - ``precision``: generated points in the ball of some real point; ``recall``: real points in the ball of some
      generated one (Kynkaanniemi et al. 2019, eq. 1).
    - ``density``: real balls that a generated point lies in, over k, on average, which may exceed 1; ``coverage``:
      real points whose ball holds a generated one (Naeem et al. 2020, eq. 8 and 9).

    For real against other real points, N of each, coverage is on average :func:`expected_coverage` and density 1.
    """
    if real.k != fake.k:
        raise ConfigError(f"k: {real.k} for real and {fake.k} for generated points; take the same")
    precise = torch.zeros(len(fake.points), dtype=torch.bool, device=fake.points.device)
    held, recalled, covered = 0.0, 0.0, 0.0
    for part, radii in zip(real.points.split(_ROWS), real.radii.split(_ROWS), strict=True):
        distances = torch.cdist(part, fake.points)
        in_real = distances <= radii[:, None]
        precise |= in_real.any(0)
        held += float(in_real.sum())
        covered += float(in_real.any(1).sum())
        recalled += float((distances <= fake.radii).any(1).sum())
    return {
        "precision": precise.float().mean().item(),
        "recall": recalled / len(real.points),
        "density": held / (real.k * len(fake.points)),
        "coverage": covered / len(real.points),
    }


def expected_coverage(real: int, fake: int, k: int = 3) -> float:
    """Coverage of ``real`` points by as good as real ones, ``fake`` in number (Naeem et al. 2020, lemma 2)."""
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (real - i) / (real + fake - i)
    return 1 - missed
