"""The alternation of recipes.gan against a tight loop in raw PyTorch with the same networks and operations.

    python -m tests.benchmarks.gan_alternation

The recipe is ``recipes.gan.train`` itself, in a fresh run directory each round, validation and checkpoints off. Its
steps are timed from its first row of metrics to its last, on those rows' own clock, which leaves out construction,
the first steps and the checkpoint at the end. The raw loop leaves out as many first steps; it logs nothing.
``test_gan_alternation.py`` proves that both do the same work, to the bit.
"""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam

from lightning_custom.datasets import Images
from lightning_custom.launch import launch
from lightning_custom.metrics import STEPS_PER_SECOND, read_rows
from recipes.gan import GANConfig, networks, train
from tests.benchmarks.interleave import Contender, Result, interleave, machine, quiet, table

Draw = Callable[[int], tuple[Tensor, Tensor, Tensor]]
"""Images, labels and latents of step k."""

MICRO = GANConfig(steps=700, log_every=100, width=16, batch_size=8, validate_every=0, checkpoint_every=0)
"""Networks so small that only what surrounds them costs; 8x8 images."""
CONVOLUTIONAL = dataclasses.replace(
    MICRO, steps=18, log_every=6, network="conv", width=32, batch_size=64, latent_size=64
)
"""The networks of the Fashion-MNIST preset; 28x28 images."""
TARGET = 1.05
ROUNDS = 15


def noise_images(size: int, count: int = 4096) -> Images:
    """A data set of square pictures that no disk is read for."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, size, size, generator=generator) * 2 - 1
    return Images(images, torch.randint(10, (count,), generator=generator), 10)


def raw_loop(
    config: GANConfig,
    generator: nn.Module,
    discriminator: nn.Module,
    average: nn.Module,
    draw: Draw,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Train as :func:`recipes.gan.train` does with one discriminator step; seconds a step after ``log_every``."""
    g_optimizer = Adam(generator.parameters(), config.g_lr, config.g_betas, fused=True)
    d_optimizer = Adam(discriminator.parameters(), config.d_lr, config.d_betas, fused=True)
    d_parameters, values = list(discriminator.parameters()), list(generator.parameters())
    averages, size, started = list(average.parameters()), config.batch_size, clock()
    for step in range(config.steps):
        if step == config.log_every:
            started = clock()
        real, label, latent = draw(step)
        fake = generator(latent, label)
        samples = torch.cat([real, fake.detach()]).requires_grad_()
        logits = discriminator(samples, torch.cat([label, label]))
        real_logits, fake_logits = logits.chunk(2)
        d_loss = softplus(fake_logits - real_logits).mean()
        (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
        r1, r2 = gradient.square().flatten(1).sum(1).chunk(2)
        d_optimizer.zero_grad()
        (d_loss + (config.r1 / 2 * r1.mean() + config.r2 / 2 * r2.mean())).backward()
        d_optimizer.step()

        for parameter in d_parameters:
            parameter.requires_grad_(False)
        with torch.no_grad():
            real_logits = discriminator(real, label)
        g_loss = softplus(real_logits - discriminator(fake, label)).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        for parameter in d_parameters:
            parameter.requires_grad_(True)
        g_optimizer.step()
        half_life = min(config.ema_half_life, config.ema_ramp * (step + 1) * size)
        with torch.no_grad():
            torch._foreach_lerp_(averages, values, 1 - 0.5 ** (size / half_life))
    return (clock() - started) / (config.steps - config.log_every)


def tight_draw(config: GANConfig, data: Images) -> Draw:
    """Batches out of a permutation for each pass, and latents, by the shortest way."""
    size, order = config.batch_size, torch.randperm(len(data.images))
    batches = len(order) // size

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal order
        k = step % batches
        if k == 0:
            order = torch.randperm(len(order))
        index = order[k * size : (k + 1) * size]
        latent = torch.randn(size, config.latent_size)
        return data.images.index_select(0, index), data.labels.index_select(0, index), latent

    return draw


def raw_contender(config: GANConfig, data: Images) -> Contender:
    """A round of the raw loop, from fresh networks."""

    def contender() -> float:
        generator, discriminator = networks(config, data)
        return raw_loop(config, generator, discriminator, copy.deepcopy(generator), tight_draw(config, data))

    return contender


def recipe_contender(fabric: Fabric, config: GANConfig, data: Images) -> Contender:
    """A round of the recipe, from fresh networks, in a run directory of its own."""

    def contender() -> float:
        generator, discriminator = networks(config, data)
        with tempfile.TemporaryDirectory() as folder, quiet():
            own = dataclasses.replace(config, run_dir=folder)
            train(fabric, own, generator=generator, discriminator=discriminator, dataset=data.dataset())
            rows = [row for row in read_rows(folder) if STEPS_PER_SECOND in row]
        seconds = sum(config.log_every / row[STEPS_PER_SECOND] for row in rows[1:])
        return seconds / (config.steps - config.log_every)

    return contender


def compare(config: GANConfig, data: Images, rounds: int, target: float | None = None) -> list[Result]:
    """The raw loop and the recipe on ``config``."""
    fabric = launch(dataclasses.replace(config, accelerator="cpu", devices=1))
    contenders = {"raw PyTorch": raw_contender(config, data), "recipes.gan": recipe_contender(fabric, config, data)}
    return interleave(contenders, rounds, targets={} if target is None else {"recipes.gan": target})


def report(rounds: int = ROUNDS) -> str:
    """Both comparisons as a table."""
    micro = compare(MICRO, noise_images(8), rounds)
    convolutional = compare(CONVOLUTIONAL, noise_images(28), rounds, TARGET)
    return "\n".join(
        [
            table("GAN, MLP of width 16, batch 8, 8x8", micro),
            table("GAN, convolutional of width 32, batch 64, 28x28", convolutional),
        ]
    )


if __name__ == "__main__":
    print(report())
    print(machine())
