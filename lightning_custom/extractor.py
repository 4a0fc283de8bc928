"""A small classifier of a data set's own classes, whose features measure generated images without any download."""

import hashlib
import math
import os
import warnings
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_custom import storage
from lightning_custom.datasets import Images
from lightning_custom.distributed import first_process
from lightning_custom.errors import CheckpointError

_VERSION = "2"
_SEED = 7


class FeatureExtractor(nn.Module):
    """Images ``[B, C, H, W]`` to features ``[B, 64]``, and from those to class logits ``[B, K]``."""

    num_features = 64

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        stride = 1 if size < 16 else 2
        side = math.ceil(math.ceil(size / stride) / 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride=stride, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side * side, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class probabilities, in evaluation: no gradient, parts of 1,000 images."""
        with torch.no_grad():
            features = torch.cat([self.features(part) for part in images.float().split(1000)])
            return features, self.head(features).softmax(1)


def fit_extractor(fabric: Fabric, data: Images) -> FeatureExtractor:
    """The extractor of ``data``, fitted once on process 0 with a seed of its own, broadcast, and cached on disk.

    The cache is ``$LIGHTNING_CUSTOM_CACHE`` or ``~/.cache/lightning_custom``, by a hash of the data and of torch's
    version; without a place to write, it is fitted anew each time.
    """
    channels, size = data.images.shape[1], data.images.shape[2]
    path = _cache_path(data)
    weights = first_process(fabric, lambda: _cached(path) or _fit(data, path))
    with torch.device("meta"):  # no random weights, which would draw from the default generator
        extractor = FeatureExtractor(channels, size, data.num_classes)
    extractor.load_state_dict(weights, assign=True)
    return extractor.eval().requires_grad_(False).to(fabric.device)


def _cache_path(data: Images) -> Path:
    root = Path(os.environ.get("LIGHTNING_CUSTOM_CACHE", Path.home() / ".cache" / "lightning_custom"))
    digest = hashlib.sha256(f"{_VERSION} {torch.__version__} {tuple(data.images.shape)}".encode())
    digest.update(data.images.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    return root / f"extractor-{digest.hexdigest()[:16]}.pt"


def _cached(path: Path) -> dict[str, Tensor] | None:
    try:
        return storage.read_tensors(path) if path.exists() else None
    except CheckpointError as error:
        warnings.warn(f"{error}; fitting the feature extractor anew", stacklevel=2)
        return None


def _fit(data: Images, path: Path) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        extractor = FeatureExtractor(data.images.shape[1], data.images.shape[2], data.num_classes)
        passes = max(2, round(15 * 1797 / len(data.images)))
        updates = passes * math.ceil(len(data.images) / 64)
        optimizer = torch.optim.Adam(extractor.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=updates)
        for _ in range(passes):
            for index in torch.randperm(len(data.images)).split(64):
                # Noise keeps the classifier from being sure of what is no digit.
                images = data.images[index] + 0.1 * torch.randn_like(data.images[index])
                optimizer.zero_grad()
                cross_entropy(extractor.head(extractor.features(images)), data.labels[index]).backward()
                optimizer.step()
                schedule.step()
    weights = {name: tensor.detach().clone() for name, tensor in extractor.state_dict().items()}
    _store(weights, path)
    return weights


def _store(weights: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_tensors(temporary, weights)
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"the feature extractor is not cached: {error}", stacklevel=2)
