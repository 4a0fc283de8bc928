"""Features of Inception-v3, in which published FIDs are measured; needs the extra ``inception`` and its weights."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import first_process
from lightning_custom.errors import ConfigError

_PARTS = 100


def inception_features(fabric: Fabric) -> Callable[[Tensor], Tensor]:
    """``images [B, 1 or 3, H, W]`` in [-1, 1] to the 2,048 features that FID was defined with (Heusel et al. 2017).

    They are torch-fidelity's port of the original network, which resizes images to 299x299 as that did. Its weights
    are downloaded once, by process 0 first; :class:`ConfigError` where it is not installed or cannot fetch them.
    """
    first_process(fabric, lambda: _network() and None)
    network = _network().to(fabric.device)

    def features(images: Tensor) -> Tensor:
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        with torch.no_grad():
            return torch.cat([network(part)[0] for part in pixels.split(_PARTS)])

    return features


def _network() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ConfigError(
            f"features: inception needs torch-fidelity ({error}); pip install torch-fidelity, or leave it classifier"
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):  # it draws weights before it reads them
            return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise ConfigError(
            f"features: the weights of inception could not be fetched ({error}); use a machine with a network once, "
            "or leave it classifier"
        ) from error
