"""Small networks that need no batch statistics, so that the number of processes does not change their output."""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot


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
        raise ValueError(f"shape: {shape}; the convolutional networks need square images with sides a multiple of 4")
    return shape


def with_label(features: Tensor, label: Tensor | None, num_classes: int) -> Tensor:
    """``[B, F]`` with the one-hot label behind it: ``[B, F + num_classes]``."""
    if num_classes == 0:
        return features
    if label is None:
        raise ValueError(f"label: none, but the network was made for {num_classes} classes; pass labels")
    return torch.cat([features, one_hot(label, num_classes).to(features.dtype)], dim=1)


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
