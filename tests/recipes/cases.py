"""The recipes as the conformance tests run them: small networks, little data, every variant a config.

A recipe joins by a ``run`` function and a row in :data:`CASES`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric

from lightning_custom.config import RunConfig
from lightning_custom.datasets import Images, digits
from recipes import gan


@dataclass(frozen=True)
class Case:
    name: str
    module: str
    """Where the recipe's ``train`` and its imports live."""
    run: Callable[[Fabric, Any], Any]
    """``run(fabric, config) -> state``; at the top of a module, so that other processes can import it."""
    config: RunConfig
    """The default variant: small, 30 steps, rows every 4, checkpoints every 8."""
    variants: dict[str, dict[str, Any]]
    """By name, the fields in which a variant differs from the default."""
    preset: RunConfig
    """The default preset in full size, 30 steps."""

    def configs(self) -> dict[str, Any]:
        """The config of each variant by name, the default first."""
        changed = {name: dataclasses.replace(self.config, **fields) for name, fields in self.variants.items()}
        return {"default": self.config, **changed}


def run_gan(fabric: Fabric, config: gan.GANConfig) -> gan.GANState:
    # A size that batches do not divide: passes end inside batches.
    images, labels, num_classes = digits()
    size = 11 * config.batch_size + 2
    data = Images(images[:size], labels[:size], num_classes)
    generator, discriminator = gan.networks(config, data)

    def scores(sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
        latents = torch.randn(20, config.latent_size, generator=torch.Generator().manual_seed(1))
        distance = sample(latents, data.labels[:20]).mean() - data.images.mean()
        return {"val/fid": float(distance.abs())}

    return gan.train(
        fabric, config, generator=generator, discriminator=discriminator, dataset=data.dataset(), scores=scores
    )


CASES = [
    Case(
        name="gan",
        module="recipes.gan",
        run=run_gan,
        config=gan.GANConfig(
            steps=30, log_every=4, validate_every=10, checkpoint_every=8, batch_size=8, latent_size=4, width=8
        ),
        variants={
            "nonsaturating": {"loss": "nonsaturating"},
            "hinge": {"loss": "hinge"},
            "two-d-steps": {"d_steps": 2},
            "unconditional": {"num_classes": 0},
            "no-penalty": {"r1": 0.0, "r2": 0.0},
            "conv": {"network": "conv", "width": 4},
        },
        preset=gan.GANConfig(**gan.PRESETS["digits"] | {"steps": 30}),
    ),
]
