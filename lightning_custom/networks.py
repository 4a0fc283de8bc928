"""Small networks whose output does not depend on the number of processes."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_custom.errors import ConfigError
from lightning_custom.task_norm import BatchStatisticsNorm


class MLPGenerator(nn.Module):
    """Fully connected: latent ``[B, Z]`` and optional label ``[B]`` to images ``[B, C, H, W]`` in [-1, 1]."""

    def __init__(self, latent_size: int, num_classes: int, shape: tuple[int, int, int], width: int = 256) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Linear(latent_size + num_classes, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, math.prod(shape)),
            nn.Tanh(),
            nn.Unflatten(1, shape),
        )

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Images for latents and labels."""
        return self.layers(with_label(latent, label, self.num_classes))  # type: ignore[no-any-return]


class MLPDiscriminator(nn.Module):
    """Fully connected: images ``[B, C, H, W]`` and optional label ``[B]`` to logits ``[B]``."""

    def __init__(self, num_classes: int, shape: tuple[int, int, int], width: int = 256) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Linear(math.prod(shape) + num_classes, width),
            nn.LeakyReLU(0.2),
            # No bias here and in the last layer: a relativistic loss gives one, where its unit keeps its sign over the
            # batch, a gradient of zero, whose rounding Adam amplifies.
            nn.Linear(width, width, bias=False),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1, bias=False),
        )

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits for images and labels."""
        return self.layers(with_label(image.flatten(1), label, self.num_classes)).squeeze(1)  # type: ignore[no-any-return]


class ConvGenerator(nn.Module):
    """Upsampling convolutions: latent ``[B, Z]`` and optional label ``[B]`` to images ``[B, C, S, S]`` in [-1, 1].

    S is a multiple of 4. No normalisation.
    """

    def __init__(self, latent_size: int, num_classes: int, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, size, _ = _square(shape)
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Linear(latent_size + num_classes, 2 * width * (size // 4) ** 2),
            nn.Unflatten(1, (2 * width, size // 4, size // 4)),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Images for latents and labels."""
        return self.layers(with_label(latent, label, self.num_classes))  # type: ignore[no-any-return]


class ConvDiscriminator(nn.Module):
    """Strided convolutions: images ``[B, C, S, S]`` and optional label ``[B]`` to logits ``[B]``.

    S is a multiple of 4. The label chooses the last layer's weights, beside an unconditional logit (projection,
    Miyato and Koyama 2018, eq. 5). No normalisation, no last bias.
    """

    def __init__(self, num_classes: int, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, size, _ = _square(shape)
        self.num_classes = num_classes
        features = 2 * width * (size // 4) ** 2
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.head = nn.Linear(features, 1 + num_classes, bias=False)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits for images and labels."""
        logits = self.head(self.trunk(image))
        if self.num_classes == 0 or label is None:
            return logits[:, 0]  # type: ignore[no-any-return]
        return logits[:, 0] + logits.gather(1, 1 + label.unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


def _square(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if shape[1] != shape[2] or shape[1] % 4:
        raise ConfigError(
            f"shape: {shape}; the convolutional networks need square images with sides a multiple of 4; set image_size "
            "to one, or choose another network"
        )
    return shape


def with_label(features: Tensor, label: Tensor | None, num_classes: int) -> Tensor:
    """``[B, F, ...]`` with the one-hot label behind it, everywhere in an image: ``[B, F + num_classes, ...]``."""
    if num_classes == 0:
        return features
    if label is None:
        raise ConfigError(f"label: none, but the network was made for {num_classes} classes; pass labels")
    # Not one_hot, which looks at the labels' values: it waits for the device, and cannot be recorded.
    code = torch.eye(num_classes, dtype=features.dtype, device=features.device)[label]
    if features.dim() > 2:
        code = code.view(*code.shape, *(1 for _ in features.shape[2:])).expand(-1, -1, *features.shape[2:])
    return torch.cat([features, code], dim=1)


class ConvClassifier(nn.Module):
    """Three blocks of convolution, group normalisation and pooling: images ``[B, C, S, S]`` to logits ``[B, K]``.

    S is at least 8. Group normalisation looks at one sample only, so that the number of processes changes nothing.
    """

    def __init__(self, channels: int, size: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(4 * width * (size // 8) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits for images."""
        return self.head(self.trunk(images))  # type: ignore[no-any-return]


def sinusoid_network(width: int = 40, layers: int = 2) -> nn.Sequential:
    """Numbers ``[..., 1]`` to ``[..., 1]`` by ``layers`` hidden layers with ReLU (Finn et al. 2017, section 5.1)."""
    widths = (1, *(width for _ in range(layers)))
    hidden = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 1))


class FewShotConvNet(nn.Module):
    """Four blocks of strided convolution, normalisation and ReLU: images ``[B, C, H, W]`` of one task to logits.

    The Omniglot network of Finn et al. 2017, section 5.2: 3x3 convolutions of stride 2 without pooling (28 pixels
    become 14, 7, 4, 2), the mean over space as in the authors' code, and a linear ``head`` on the ``trunk``'s ``width``
    features. Initial weights are torch's: from the authors' (Xavier, and a head of standard deviation 1) it learned
    more slowly.

    ``norm="batch"`` has the statistics of the batch that a call is given, which is one task's support or query;
    ``"group"`` and ``"none"`` look at one image only.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 1,
        width: int = 64,
        norm: Literal["batch", "group", "none"] = "batch",
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs in (channels, width, width, width):
            # A bias would be taken away again by batch statistics, and Adam would amplify its gradient's rounding.
            convolution = nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=norm != "batch")
            blocks += [convolution, *_normalisation(norm, width), nn.ReLU()]
        self.trunk = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` for images."""
        return self.head(self.trunk(images))  # type: ignore[no-any-return]


def _normalisation(norm: str, width: int) -> list[nn.Module]:
    if norm == "batch":
        return [BatchStatisticsNorm(width)]
    if norm == "group":
        return [nn.GroupNorm(8, width)]
    if norm == "none":
        return []
    raise ConfigError(f"norm: {norm}; choose batch, group or none")


class LeNetTrunk(nn.Module):
    """Two blocks of convolution, pooling and ReLU, and a linear layer: images ``[B, C, S, S]`` to features ``[B, F]``.

    The shared part of Sener and Koltun 2018 for 36x36 images of two digits: 10 and 20 channels by 5x5 kernels, 720
    numbers to 50 features. Small images need ``kernel=3, padding=1``.
    """

    def __init__(
        self, channels: int, size: int, *, width: int = 10, features: int = 50, kernel: int = 5, padding: int = 0
    ) -> None:
        super().__init__()
        side = size
        for _ in range(2):
            side = (side + 2 * padding - kernel + 1) // 2
        if side < 1:
            raise ConfigError(
                f"size: {size}; kernels of {kernel} pixels with padding {padding} leave nothing of it, set kernel=3, "
                "padding=1"
            )
        self.features = features
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, kernel, padding=padding),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel, padding=padding),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * side**2, features),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features for images."""
        return self.layers(images)  # type: ignore[no-any-return]


def mlp_head(features: int, outputs: int, *, width: int = 50) -> nn.Sequential:
    """Features ``[B, F]`` to ``[B, outputs]`` by one hidden layer: a task's own part in Sener and Koltun 2018.

    Without its dropout, whose masks would differ by process.
    """
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, outputs))
