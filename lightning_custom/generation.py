"""How good generated images are: distances to real ones, fidelity and diversity, and their classes."""

import warnings
from collections.abc import Callable, Mapping

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_custom.class_scores import class_scores
from lightning_custom.datasets import Images
from lightning_custom.distributed import gather_shares
from lightning_custom.neighbourhoods import Neighbourhoods, neighbourhood_scores

_MOST_SAMPLES = 10_000
_SPLITS = 5

Features = Callable[[Tensor], Tensor]
"""Images ``[B, C, H, W]`` in [-1, 1] to features ``[B, F]``."""

Classifier = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images to features ``[B, F]`` and class probabilities ``[B, K]``, as :class:`FeatureExtractor` gives them."""


class GenerationScores:
    """Scores of generated images against ``data``, in features of ``classifier`` or in any others.

    The classifier's features that are dead on real data are dropped, the others standardised on it; ``features`` of
    another module are taken as they are, as published scores have them. Half of the real images are compared with as
    many generated ones as the other half holds, so that scores are as biased as :attr:`floors`, those of the two real
    halves. FID and its floor are means over five fixed splits into halves. Of a large data set the first 10,000
    images serve, which should be of all classes. Data of one class has no scores of classes, and samples that are not
    ``conditional`` were asked for none.

    Attributes:
        labels: ``[N]`` the labels to generate for; N images are scored.
        floors: what one real half has against the other: ``fid``, ``kid``, ``precision``, ``recall``, ``density``,
            ``coverage`` and ``spread``.
    """

    def __init__(
        self,
        fabric: Fabric,
        data: Images,
        classifier: Classifier,
        *,
        features: Features | None = None,
        conditional: bool = True,
    ) -> None:
        self._fabric, self._classifier, self._features = fabric, classifier, features
        self._conditional = conditional
        self._shares = torch.bincount(data.labels, minlength=data.num_classes).double() / len(data.labels)
        found, _ = self._measure(data.images[:_MOST_SAMPLES].to(fabric.device))
        # Standardised, a feature that is dead on real data would drown all others.
        self._alive = found.std(0) > (1e-2 if features is None else -1)
        self._mean, self._std = found[:, self._alive].mean(0), found[:, self._alive].std(0)
        self._real = self._scaled(found)
        size, generator = len(self._real), torch.Generator().manual_seed(0)
        self._splits = [torch.randperm(size, generator=generator).split(size // 2)[:2] for _ in range(_SPLITS)]
        half, other = self._splits[0]
        self._half = Neighbourhoods(self._real[half])
        self.labels = data.labels[:_MOST_SAMPLES][other]
        self.floors = {"fid": self._mean_over_splits(lambda other: self._real[other])}
        self.floors |= self._distances(self._real[half], self._real[other])

    def _measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, probabilities = self._classifier(images)
        return features if self._features is None else self._features(images), probabilities

    def _scaled(self, features: Tensor) -> Tensor:
        if self._features is None:
            features = (features[:, self._alive] - self._mean) / self._std
        return features.cpu()

    def _mean_over_splits(self, other: Callable[[Tensor], Tensor]) -> float:
        distances = [frechet_distance(self._real[one], other(two)) for one, two in self._splits]
        return sum(distances) / len(distances)

    def _distances(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        kid, _ = kernel_distance(real, fake)
        spread = float(fake.var(0).sum() / self._half.points.var(0).sum())
        return {"kid": kid, **neighbourhood_scores(self._half, Neighbourhoods(fake)), "spread": spread}

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Score this process's share of the images generated for :attr:`labels`, together with the others' shares."""
        features, probabilities = (gather_shares(part, self._fabric) for part in self._measure(images))
        fake, (confidence, predicted) = self._scaled(features), probabilities.cpu().max(1)
        scores = {
            "fid": self._mean_over_splits(lambda half: fake),
            "fid_floor": self.floors["fid"],
            **self._distances(self._real, fake),
        }
        if len(self._shares) > 1:
            sure = confidence > 0.9
            if self._conditional:
                scores["confident_as_asked"] = (sure & (predicted == self.labels)).float().mean().item()
            scores |= {
                "classes": float(len(predicted[sure].unique())),
                **class_scores(predicted, self._shares),
            }
        return {f"val/{name}": value for name, value in scores.items()}


def score_lines(scores: Mapping[str, float], *, conditional: bool) -> list[str]:
    """What :class:`GenerationScores` found, as lines to print; of ``conditional`` samples also how many are right."""
    lines = [
        f"FID {scores['val/fid']:.3f} (one real half against the other: {scores['val/fid_floor']:.3f})",
        f"KID {scores['val/kid']:.4f}   precision {scores['val/precision']:.3f}   recall {scores['val/recall']:.3f}   "
        f"density {scores['val/density']:.3f}   coverage {scores['val/coverage']:.3f}",
    ]
    if "val/modes" in scores:
        asked = f"   recognised as asked {scores['val/confident_as_asked']:.1%}" if conditional else ""
        lines.append(f"classes {scores['val/modes']:.0f}   reverse KL {scores['val/reverse_kl']:.3f}{asked}")
    return lines


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID (Heusel et al. 2017, eq. 6) between features ``[N, F]`` and ``[M, F]``, computed in float64."""
    (mean, covariance), (other_mean, other_covariance) = (_moments(features.double()) for features in (real, fake))
    # With S = R R^T, the eigenvalues of S S' are those of R^T S' R, which is symmetric: real, and ten times as fast.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ other_covariance @ root).clamp_min(0).sqrt().sum()
    means = (mean - other_mean).square().sum()
    return float(means + covariance.trace() + other_covariance.trace() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), torch.atleast_2d(features.T.cov())


class _Features(nn.Module):
    """Stands where torchmetrics expects an image network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


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
