"""Generators and discriminators of square images of any side from 8 to 128, without normalisation layers.

Images are ``[B, C, S, S]`` in [-1, 1], latents ``[B, Z]``, labels ``[B]``. The side is halved, rounding down, until it
is from 4 to 7, so that every S has its sides: 28, 14, 7 or 45, 22, 11, 5. Nothing depends on who else is in the batch.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from lightning_custom.errors import ConfigError
from lightning_custom.networks import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator, with_label

Conditioning = Literal["concatenation", "projection", "none"]
"""How a discriminator is told the class: as planes behind the image, by projection, or not at all."""

_SLOPE = 0.2
_HE_GAIN = math.sqrt(2 / (1 + _SLOPE**2))
_GROUP = 16
_MOST = 8


def sides(shape: tuple[int, int, int]) -> list[int]:
    """The sides from that of the image down to the smallest; :class:`ConfigError` for a shape without any.

    >>> sides((3, 32, 32)), sides((1, 45, 45))
    ([32, 16, 8, 4], [45, 22, 11, 5])
    """
    _, height, width = shape
    if height != width or not 8 <= height <= 128:
        raise ConfigError(f"network: images are {height}x{width}; these networks need a square of side 8 to 128")
    found = [height]
    while found[-1] >= 8:
        found.append(found[-1] // 2)
    return found


def _channels(width: int, levels: int) -> list[int]:
    """Channels at each side, doubling downwards to at most eight times those at the image."""
    return [width * min(2**level, _MOST) for level in range(levels)]


class ConditionalDiscriminator(nn.Module):
    """A trunk ``[B, C, ...] -> [B, F]`` with a linear head: samples and labels to logits ``[B]``.

    - ``concatenation``: the one-hot label stands behind the sample's channels (Mirza and Osindero 2014), so the trunk
      has ``num_classes`` inputs more;
    - ``projection``: each class adds its own linear function of the features (Miyato and Koyama 2018, eq. 5);
    - ``none``: the label is not used.

    With ``auxiliary`` the result is ``(logits [B], class logits [B, K])`` (AC-GAN, Odena et al. 2017). The head has no
    bias: a relativistic loss has no gradient for one.
    """

    def __init__(
        self, trunk: nn.Module, num_features: int, num_classes: int, conditioning: Conditioning, *, auxiliary: bool
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conditioning = conditioning if num_classes else "none"
        self.auxiliary = auxiliary
        self.trunk = trunk
        projections = num_classes if self.conditioning == "projection" else 0
        self.head = nn.Linear(num_features, 1 + projections + (num_classes if auxiliary else 0), bias=False)

    def forward(self, sample: Tensor, label: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits for samples and labels, and class logits where there are any."""
        if self.conditioning == "concatenation":
            sample = with_label(sample, label, self.num_classes)
        outputs = self.head(self.trunk(sample))
        logits: Tensor = outputs[:, 0]
        if self.conditioning == "projection":
            if label is None:
                raise ConfigError(f"label: none, but the network was made for {self.num_classes} classes; pass labels")
            logits = logits + outputs.gather(1, 1 + label.unsqueeze(1)).squeeze(1)
        return (logits, outputs[:, -self.num_classes :]) if self.auxiliary else logits


class DCGANGenerator(nn.Module):
    """Transposed convolutions that double the side (Radford et al. 2016): latents and labels to images.

    As published but for normalisation, for which He initialisation stands in, and for leaky ReLUs.
    """

    def __init__(self, latent_size: int, num_classes: int, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        found = sides(shape)[::-1]
        channels = [*_channels(width, len(found) - 1)[::-1], shape[0]]
        layers: list[nn.Module] = [
            nn.Linear(latent_size + num_classes, channels[0] * found[0] ** 2),
            nn.Unflatten(1, (channels[0], found[0], found[0])),
        ]
        for (small, large), (inputs, outputs) in zip(pairwise(found), pairwise(channels), strict=True):
            odd = large - 2 * small
            layers += [nn.LeakyReLU(_SLOPE), nn.ConvTranspose2d(inputs, outputs, 4, 2, padding=1, output_padding=odd)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        _initialise_(self, last=layers[-1])

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Images for latents and labels."""
        return self.layers(with_label(latent, label, self.num_classes))  # type: ignore[no-any-return]


def dcgan_trunk(inputs: int, size: int, width: int = 64) -> tuple[nn.Module, int]:
    """Strided convolutions that halve the side (Radford et al. 2016), and the number of features that come out."""
    found = sides((inputs, size, size))
    channels = [inputs, *_channels(width, len(found) - 1)]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
    trunk = nn.Sequential(*layers, nn.Flatten())
    _initialise_(trunk)
    return trunk, channels[-1] * found[-1] ** 2


class ResidualBlock(nn.Module):
    """``x + f(x)`` with f an inverted bottleneck: 1x1, grouped 3x3, 1x1 (R3GAN, Huang et al. 2024, section 4).

    Twice as many channels inside, in groups of 16. The last convolution begins at zero and the others are scaled by
    ``blocks ** -1/4`` (Fixup, Zhang et al. 2019), so that a deep network begins as a shallow one without normalisation.
    """

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        inside = 2 * channels
        groups = inside // _GROUP if inside % _GROUP == 0 else 1
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inside, 1),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(inside, inside, 3, padding=1, groups=groups),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(inside, channels, 1, bias=False),
        )
        gain = _HE_GAIN * blocks**-0.25
        for index, own in {0: gain, 2: gain, 4: 0.0}.items():
            _normal_(self.layers[index], own)

    def forward(self, features: Tensor) -> Tensor:
        """Features of the same shape."""
        return features + self.layers(features)  # type: ignore[no-any-return]


class ResidualGenerator(nn.Module):
    """R3GAN's generator: a learned image of the smallest side, scaled by the latent, then blocks and upsampling.

    Two blocks a side. Bilinear upsampling; a last tanh, which the paper has not, keeps images in [-1, 1].
    """

    def __init__(self, latent_size: int, num_classes: int, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        found = sides(shape)[::-1]
        channels = _channels(width, len(found))[::-1]
        self.basis = nn.Parameter(torch.randn(channels[0], found[0], found[0]))
        self.scale = nn.Linear(latent_size + num_classes, channels[0])
        _normal_(self.scale, 1.0)
        layers: list[nn.Module] = [*_blocks(channels[0], len(found))]
        for side, (before, after) in zip(found[1:], pairwise(channels), strict=True):
            layers += [nn.Upsample(size=side, mode="bilinear"), *_transition(before, after)]
            layers += _blocks(after, len(found))
        self.layers = nn.Sequential(*layers, _one_by_one(channels[-1], shape[0]), nn.Tanh())

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Images for latents and labels."""
        scale = self.scale(with_label(latent, label, self.num_classes))
        return self.layers(self.basis * scale[:, :, None, None])  # type: ignore[no-any-return]


def residual_trunk(inputs: int, size: int, width: int = 32) -> tuple[nn.Module, int]:
    """R3GAN's discriminator up to its head, the mirror of :class:`ResidualGenerator`, and its number of features."""
    found = sides((inputs, size, size))
    channels = _channels(width, len(found))
    layers: list[nn.Module] = [_one_by_one(inputs, channels[0]), *_blocks(channels[0], len(found))]
    for before, after in pairwise(channels):
        layers += [HalvedSide(), *_transition(before, after), *_blocks(after, len(found))]
    last = nn.Conv2d(channels[-1], channels[-1], found[-1], groups=channels[-1], bias=False)
    _normal_(last, 1.0)
    return nn.Sequential(*layers, last, nn.Flatten()), channels[-1]


class HalvedSide(nn.Module):
    """Means over squares of two pixels; where the side is odd over rectangles that overlap, so that no pixel is lost.

    >>> HalvedSide()(torch.tensor([[[[0.0, 2.0, 4.0]] * 3]])).tolist()
    [[[[2.0]]]]
    """

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, S, S]`` to ``[B, C, S // 2, S // 2]``."""
        side = features.shape[-1]
        return adaptive_avg_pool2d(features, side // 2) if side % 2 else avg_pool2d(features, 2)


def _blocks(channels: int, levels: int) -> Iterator[nn.Module]:
    yield from (ResidualBlock(channels, 2 * levels) for _ in range(2))


def _transition(before: int, after: int) -> Iterator[nn.Module]:
    if before != after:
        yield _one_by_one(before, after)


def _one_by_one(before: int, after: int) -> nn.Module:
    layer = nn.Conv2d(before, after, 1, bias=False)
    _normal_(layer, 1.0)
    return layer


def _initialise_(network: nn.Module, last: nn.Module | None = None) -> None:
    """He initialisation (He et al. 2015) of every layer but the last, which has no ReLU behind it."""
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            _normal_(layer, 1.0 if layer is last else _HE_GAIN)


def _normal_(layer: nn.Module, gain: float) -> None:
    """Normal weights of deviation ``gain / sqrt(inputs of a unit)`` and a bias of zero."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    inputs = layer.weight[0].numel()
    if isinstance(layer, nn.ConvTranspose2d):
        # Of a kernel's places, one in each stride squared meets a given pixel.
        inputs = layer.in_channels * math.prod(layer.kernel_size) // math.prod(layer.stride)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


Kind = Literal["mlp", "conv", "dcgan", "residual"]
"""The pairs by the names that a config uses."""

_GENERATORS = {"mlp": MLPGenerator, "conv": ConvGenerator, "dcgan": DCGANGenerator, "residual": ResidualGenerator}


def generator_network(
    kind: Kind, latent_size: int, num_classes: int, shape: tuple[int, int, int], width: int
) -> nn.Module:
    """The generator of a pair; ``shape`` is (C, H, W)."""
    return _GENERATORS[kind](latent_size, num_classes, shape, width)


def discriminator_network(
    kind: Kind,
    num_classes: int,
    shape: tuple[int, int, int],
    width: int,
    conditioning: Conditioning | Literal["auto"] = "auto",
    *,
    auxiliary: bool = False,
) -> nn.Module:
    """The discriminator of a pair.

    ``auto`` is none beside an auxiliary classifier, concatenation for mlp and projection for the others.
    """
    if conditioning == "auto":
        conditioning = "none" if auxiliary else "concatenation" if kind == "mlp" else "projection"
    if kind == "mlp" and conditioning == "concatenation":
        return MLPDiscriminator(num_classes, shape, width)
    if kind == "conv" and conditioning == "projection" and not auxiliary:
        return ConvDiscriminator(num_classes, shape, width)
    inputs = shape[0] + (num_classes if conditioning == "concatenation" else 0)
    trunk, features = _trunk(kind, inputs, shape, width)
    return ConditionalDiscriminator(trunk, features, num_classes, conditioning, auxiliary=auxiliary)


def _trunk(kind: Kind, inputs: int, shape: tuple[int, int, int], width: int) -> tuple[nn.Module, int]:
    if kind == "dcgan":
        sides(shape)
        return dcgan_trunk(inputs, shape[1], width)
    if kind == "residual":
        sides(shape)
        return residual_trunk(inputs, shape[1], width)
    if kind == "conv":
        return ConvDiscriminator(0, (inputs, *shape[1:]), width).trunk, 2 * width * (shape[1] // 4) ** 2
    # The layers of MLPDiscriminator but its last.
    return nn.Sequential(nn.Flatten(), *list(MLPDiscriminator(0, shape, width).layers)[:-1]), width
