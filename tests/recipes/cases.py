"""The recipes as the conformance tests run them: small networks, little data, every variant a config.

A recipe joins by a ``run`` function and a row in :data:`CASES`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy, multi_margin_loss
from torch.utils.data import TensorDataset

from lightning_custom.config import RunConfig
from lightning_custom.datasets import Images, digits
from lightning_custom.networks import ConvClassifier
from recipes import classification, gan


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


@dataclass(frozen=True, kw_only=True)
class ClassificationCase(classification.ClassificationConfig):
    """With what a user gives to ``train`` beside the config."""

    own: Literal["", "composite-loss", "loss-and-optimizer"] = ""


def two_losses(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"entropy": cross_entropy(logits, targets), "size": 1e-2 * logits.square().mean()}


def margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return multi_margin_loss(logits, targets)


class SignMomentum(torch.optim.Optimizer):
    """The sign of a running mean of gradients: an optimizer that torch has not."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.sub_(torch.tanh(1e3 * mean), alpha=group["lr"])


def run_classification(
    fabric: Fabric, config: classification.ClassificationConfig
) -> classification.ClassificationState:
    # A size that batches do not divide, and a validation whose last batch has another size than the first.
    images, labels, num_classes = digits()
    size = 11 * config.batch_size + 2
    train_data, val_data = TensorDataset(images[:size], labels[:size]), TensorDataset(images[-43:], labels[-43:])
    torch.manual_seed(config.seed)
    own = getattr(config, "own", "")
    return classification.train(
        fabric,
        config,
        model=ConvClassifier(1, 8, num_classes, config.width),
        train_data=train_data,
        val_data=val_data,
        num_classes=num_classes,
        loss={"composite-loss": two_losses, "loss-and-optimizer": margin}.get(own),
        optimizer=SignMomentum if own == "loss-and-optimizer" else None,
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
    Case(
        name="classification",
        module="recipes.classification",
        run=run_classification,
        config=ClassificationCase(
            steps=30, log_every=4, validate_every=10, checkpoint_every=8, batch_size=8, width=8, schedule="constant"
        ),
        variants={
            "sam": {"sam": 0.05},
            "sam-accumulated-and-clipped": {"sam": 0.05, "accumulate": 2, "clip_norm": 0.5},
            "mixup": {"mixup": 0.4, "flip": True},
            "ema": {"average": "ema", "average_decay": 0.9},
            "swa": {"average": "swa", "average_start": 9},
            "accumulate": {"accumulate": 2},
            "clip-norm": {"clip_norm": 0.5},
            "one-cycle": {"schedule": "one_cycle"},
            "cosine-with-warmup": {"schedule": "cosine", "warmup_steps": 5, "decay_steps": 20},
            "label-smoothing": {"label_smoothing": 0.1, "optimizer": "sgd"},
            "composite-loss": {"own": "composite-loss", "best": "val/loss/size", "best_mode": "min"},
            "own-loss-and-optimizer": {"own": "loss-and-optimizer"},
            "patience": {"patience": 2, "validate_every": 4, "best": "val/loss", "best_mode": "max"},
            "watched": {"watch_every": 5},
        },
        preset=classification.ClassificationConfig(**classification.PRESETS["digits"] | {"steps": 30}),
    ),
]
