"""How good generated images are: FID, KID, coverage, and whether each is of the class that was asked for."""

import warnings
from collections.abc import Callable

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_custom.datasets import Images
from lightning_custom.distributed import gather_shares
from lightning_custom.extractor import FeatureExtractor

_MOST_SAMPLES = 10_000
_SPLITS = 5


class GenerationScores:
    """Scores of generated images against ``data``, in the features of ``extractor``.

    Features that are dead on real data are dropped, the others standardised on it. FID compares half of the real
    images with as many generated ones as the other half holds, so that it is as biased as ``fid_floor``, the FID of
    the two real halves; both are means over five fixed splits. Of a large data set the first 10,000 images serve.

    Attributes:
        labels: ``[N]`` the labels to generate for; N images are scored.
        floor: FID of one real half against the other.
    """

    def __init__(self, fabric: Fabric, data: Images, extractor: FeatureExtractor) -> None:
        self._fabric, self._extractor, self._num_classes = fabric, extractor, data.num_classes
        features, _ = extractor(data.images[:_MOST_SAMPLES].to(fabric.device))
        self._alive = features.std(0) > 1e-2
        self._mean, self._std = features[:, self._alive].mean(0), features[:, self._alive].std(0)
        self._real = self._standardise(features)
        size, generator = len(self._real), torch.Generator().manual_seed(0)
        self._splits = [torch.randperm(size, generator=generator).split(size // 2)[:2] for _ in range(_SPLITS)]
        self.labels = data.labels[:_MOST_SAMPLES][self._splits[0][1]]
        self.floor = self._mean_over_splits(lambda half: self._real[half])

    def _standardise(self, features: Tensor) -> Tensor:
        standardised: Tensor = (features[:, self._alive] - self._mean) / self._std
        return standardised.cpu()

    def _mean_over_splits(self, other: Callable[[Tensor], Tensor]) -> float:
        distances = [frechet_distance(self._real[one], other(two)) for one, two in self._splits]
        return sum(distances) / len(distances)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Score this process's share of the images generated for :attr:`labels`, together with the others' shares."""
        features, probabilities = (gather_shares(part, self._fabric) for part in self._extractor(images))
        fake, (confidence, predicted) = self._standardise(features), probabilities.cpu().max(1)
        sure = confidence > 0.9
        kid, _ = kernel_distance(self._real, fake)
        return {
            "val/fid": self._mean_over_splits(lambda half: fake),
            "val/fid_floor": self.floor,
            "val/kid": kid,
            "val/coverage": coverage(self._real, fake),
            "val/confident_as_asked": (sure & (predicted == self.labels)).float().mean().item(),
            "val/classes": float(len(predicted[sure].unique())),
        }


class _Features(nn.Module):
    """Stands where torchmetrics expects an image network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al. 2017, eq. 6) between features ``[N, F]`` and ``[M, F]``."""
    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]), sync_on_compute=False)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int = 20, most: int = 500) -> tuple[float, float]:
    """KID (Binkowski et al. 2018), mean and standard deviation over random subsets of at most ``most`` features.

    The subsets are drawn with a seed of their own.
    """
    size = min(most, len(real), len(fake))
    with warnings.catch_warnings():
        # It warns that it keeps all features, which are small here.
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
        metric = KernelInceptionDistance(
            feature=_Features(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def coverage(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """The share of real features with a generated one nearer than their k-th real neighbour (Naeem et al. 2020, eq. 9).

    ``real`` is ``[N, F]`` and ``fake`` ``[M, F]``, both on one device.
    """
    distances = torch.cdist(real, real).fill_diagonal_(float("inf"))
    radius = distances.kthvalue(k, dim=1).values
    nearest = torch.cdist(real, fake).min(1).values
    return (nearest <= radius).float().mean().item()
