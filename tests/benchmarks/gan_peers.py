"""recipes.gan against the loops that people write, and those of other packages, on the same DCGAN networks.

    python -m tests.benchmarks.gan_peers

The plain loop generates anew in each phase, lets the critic collect gradients that nobody uses, and keeps torch's
default memory layout. Lightning's Trainer does the same in ``training_step`` by manual optimization, without logging,
checkpoints or a progress bar. Of torchgan and mimicry the steps of their own losses and networks are called
(``train_ops``, ``train_step``), without the Trainers around them, which would add. Both are read from the search path
(``pip install --no-deps torchgan torch-mimicry``) and left out where they are not there; empty modules stand in for
torchvision and scikit-image, which they import for data sets and pictures alone. mimicry also wants TensorFlow.
"""

import dataclasses
import logging
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam

from lightning_custom.adversarial import squared_gradient_norms
from lightning_custom.launch import launch
from recipes.gan import GANConfig, networks
from tests.benchmarks.gan_alternation import noise_images, recipe_contender
from tests.benchmarks.interleave import Contender, Result, interleave, machine, table

ALTERNATION = GANConfig(
    steps=9, log_every=3, validate_every=0, checkpoint_every=0, loss="nonsaturating", r1=0.0, r2=0.0, num_classes=0,
    network="dcgan", width=32, latent_size=64, batch_size=64,
)  # fmt: skip
"""What every peer can do: the non-saturating loss, no penalty, no classes; 32x32 images."""
PENALISED = dataclasses.replace(ALTERNATION, loss="r3", r1=1.0, r2=1.0)
NARROW = dataclasses.replace(PENALISED, width=16, batch_size=32)
SMALL = GANConfig(num_classes=0)
"""The networks of the default preset."""
DATA = noise_images(32, count=1024)
ROUNDS = 7
Step = Callable[[Tensor], object]


def pair(config: GANConfig) -> tuple[nn.Module, nn.Module, Adam, Adam]:
    """Fresh networks and their optimizers."""
    generator, discriminator = networks(config, DATA)
    optimizers = [Adam(module.parameters(), config.g_lr, config.g_betas) for module in (generator, discriminator)]
    return generator, discriminator, *optimizers


def nonsaturating_losses(generator: nn.Module, discriminator: nn.Module, real: Tensor, size: int) -> Iterator[Tensor]:
    """The discriminator's loss, and after its update the generator's, as an example would compute them."""
    fake = generator(torch.randn(len(real), size)).detach()
    yield softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
    yield softplus(-discriminator(generator(torch.randn(len(real), size)))).mean()


def plain_step(config: GANConfig) -> Step:
    """An alternation in raw PyTorch."""
    generator, discriminator, g_optimizer, d_optimizer = pair(config)

    def step(real: Tensor) -> None:
        losses = nonsaturating_losses(generator, discriminator, real, config.latent_size)
        for optimizer, loss in zip((d_optimizer, g_optimizer), losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def two_pass(discriminator: nn.Module, samples: Tensor) -> Tensor:
    """Squared gradient norms of one kind of samples, by a forward pass and a gradient of its own."""
    samples = samples.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(samples).sum(), samples, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def plain_penalised_step(config: GANConfig) -> Step:
    """An alternation of R3GAN's objective in raw PyTorch, real and generated samples each by themselves."""
    generator, discriminator, g_optimizer, d_optimizer = pair(config)

    def step(real: Tensor) -> None:
        samples = [real.detach(), generator(torch.randn(len(real), config.latent_size)).detach()]
        for part in samples:
            part.requires_grad_()
        logits = [discriminator(part) for part in samples]
        loss = softplus(logits[1] - logits[0]).mean()
        for own, part, gamma in zip(logits, samples, (config.r1, config.r2), strict=True):
            (gradient,) = torch.autograd.grad(own.sum(), part, create_graph=True)
            loss = loss + gamma / 2 * gradient.square().sum((1, 2, 3)).mean()
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        fake = generator(torch.randn(len(real), config.latent_size))
        g_optimizer.zero_grad()
        softplus(discriminator(real.detach()) - discriminator(fake)).mean().backward()
        g_optimizer.step()

    return step


class ManualOptimization(lightning.LightningModule):
    """The plain alternation for Lightning's Trainer, timed from its fourth step to its last."""

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.marks = config, []
        self.generator, self.discriminator, self._g_optimizer, self._d_optimizer = pair(config)

    def configure_optimizers(self) -> list[Adam]:  # type: ignore[override]
        return [self._d_optimizer, self._g_optimizer]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        losses = nonsaturating_losses(self.generator, self.discriminator, batch[0], self.config.latent_size)
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.marks.append(time.perf_counter())


def trainer_contender(config: GANConfig) -> Contender:
    """A round of Lightning's Trainer."""

    def contender() -> float:
        model = ManualOptimization(config)
        batches = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(DATA.images), config.batch_size, shuffle=True, drop_last=True
        )
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                accelerator="cpu", devices=1, max_steps=2 * config.steps, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            ).fit(model, batches)  # fmt: skip
        return (model.marks[-1] - model.marks[config.log_every - 1]) / (config.steps - config.log_every)

    return contender


def step_contender(config: GANConfig, make_step: Callable[[GANConfig], Step]) -> Contender:
    """A round of a step function, its first steps not timed."""

    def contender() -> float:
        step, started = make_step(config), 0.0
        for number in range(config.steps):
            if number == config.log_every:
                started = time.perf_counter()
            step(DATA.images[torch.randint(len(DATA.images), (config.batch_size,))])
        return (time.perf_counter() - started) / (config.steps - config.log_every)

    return contender


def torchgan_step(config: GANConfig) -> Step:
    """torchgan's minimax losses."""
    from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss

    generator, discriminator, g_optimizer, d_optimizer = pair(config)
    generator.encoding_dims, generator.label_type, discriminator.label_type = config.latent_size, "none", "none"  # type: ignore[assignment]
    d_loss, g_loss = MinimaxDiscriminatorLoss(), MinimaxGeneratorLoss(nonsaturating=True)
    device = torch.device("cpu")

    def step(real: Tensor) -> None:
        d_loss.train_ops(generator, discriminator, d_optimizer, real, device)
        g_loss.train_ops(generator, discriminator, g_optimizer, device, len(real))

    return step


def mimicry_step(config: GANConfig) -> Step:
    """mimicry's DCGAN steps."""
    from torch_mimicry.nets.gan.gan import BaseDiscriminator, BaseGenerator
    from torch_mimicry.training.metric_log import MetricLog

    ours = pair(config)

    class Generator(BaseGenerator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(nz=config.latent_size, ngf=1, bottom_width=4, loss_type="ns")
            self.network = ours[0]

        def forward(self, latent: Tensor) -> Any:
            return self.network(latent)

    class Discriminator(BaseDiscriminator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(ndf=1, loss_type="ns")
            self.network = ours[1]

        def forward(self, images: Tensor) -> Any:
            return self.network(images)

    generator, discriminator, log = Generator(), Discriminator(), MetricLog()

    def step(real: Tensor) -> None:
        device = torch.device("cpu")
        discriminator.train_step((real, None), netG=generator, optD=ours[3], log_data=log, device=device)
        generator.train_step((real, None), netD=discriminator, optG=ours[2], log_data=log, device=device)

    return step


def without_pictures() -> None:
    """Let what others import for pictures be empty where it is not installed."""
    for name in ("torchvision", "skimage"):
        try:
            __import__(name)
        except ImportError:
            for full in (name, *(f"{name}.{part}" for part in ("utils", "transforms", "datasets", "io"))):
                module: Any = types.ModuleType(full)
                module.__spec__, module.__path__, module.ImageFolder = ModuleSpec(full, None), [], object
                sys.modules[full] = module
                if full != name:
                    setattr(sys.modules[name], full.rpartition(".")[2], module)


def peers(config: GANConfig) -> dict[str, Contender]:
    """The other packages' steps, as far as they are here and run."""
    without_pictures()
    found = {}
    for name, make_step in {"torchgan 0.1.0": torchgan_step, "mimicry 0.1.16": mimicry_step}.items():
        try:
            make_step(config)(DATA.images[: config.batch_size])
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}")
        else:
            found[name] = step_contender(config, make_step)
    return found


def alternations(rounds: int = ROUNDS) -> list[Result]:
    """The plain loop, the recipe in both memory layouts, and the peers."""
    config = dataclasses.replace(ALTERNATION, accelerator="cpu", devices=1)
    fabric = launch(config)
    contenders = {
        "plain PyTorch": step_contender(config, plain_step),
        "recipes.gan": recipe_contender(fabric, config, DATA),
        "recipes.gan, channels_last": recipe_contender(fabric, dataclasses.replace(config, channels_last=True), DATA),
        "Lightning Trainer, manual optimization": trainer_contender(config),
        **peers(config),
    }
    return interleave(contenders, rounds, targets={"recipes.gan": 1.0, "recipes.gan, channels_last": 1.0})


def penalised(rounds: int = ROUNDS) -> list[Result]:
    """R3GAN's objective: the plain loop and the recipe."""
    config = dataclasses.replace(PENALISED, accelerator="cpu", devices=1)
    fabric = launch(config)
    contenders = {
        "plain PyTorch": step_contender(config, plain_penalised_step),
        "recipes.gan": recipe_contender(fabric, config, DATA),
        "recipes.gan, channels_last": recipe_contender(fabric, dataclasses.replace(config, channels_last=True), DATA),
    }
    return interleave(contenders, rounds, targets={"recipes.gan": 1.0, "recipes.gan, channels_last": 1.0})


def penalty_forms(config: GANConfig, rounds: int = ROUNDS) -> list[Result]:
    """R1 and R2 with their backward pass: a forward pass and a gradient for each kind, and one for both."""
    data = noise_images(8 if config.network == "mlp" else 32, count=2 * config.batch_size)
    _, discriminator = networks(config, data)
    real, fake = data.images.chunk(2)
    repetitions = 200 if config.network == "mlp" else 2

    def each() -> None:
        (two_pass(discriminator, real).mean() + two_pass(discriminator, fake).mean()).backward()

    def both() -> None:
        samples = torch.cat([real, fake]).requires_grad_()
        r1, r2 = squared_gradient_norms(discriminator(samples), samples).chunk(2)
        (r1.mean() + r2.mean()).backward()

    return interleave(
        {
            "two passes": gradient_contender(discriminator, each, repetitions),
            "one pass": gradient_contender(discriminator, both, repetitions),
        },
        2 * rounds,
        targets={"one pass": 1 / 1.1},
    )


def r1_forms(config: GANConfig, rounds: int = ROUNDS) -> list[Result]:
    """The loss with R1 alone and their backward pass: R1 out of the pass over all samples, and of its own half."""
    data = noise_images(8 if config.network == "mlp" else 32, count=2 * config.batch_size)
    _, discriminator = networks(config, data)
    repetitions = 200 if config.network == "mlp" else 2

    def out_of_all() -> None:
        samples = data.images.clone().requires_grad_()
        logits = discriminator(samples)
        r1, _ = squared_gradient_norms(logits, samples).chunk(2)
        (softplus(logits).mean() + r1.mean()).backward()

    def of_its_own() -> None:
        loss = softplus(discriminator(data.images)).mean()
        (loss + two_pass(discriminator, data.images.chunk(2)[0]).mean()).backward()

    return interleave(
        {
            "R1 out of the pass over all": gradient_contender(discriminator, out_of_all, repetitions),
            "R1 by a pass of its own": gradient_contender(discriminator, of_its_own, repetitions),
        },
        2 * rounds,
        targets={"R1 by a pass of its own": 1.0},
    )


def gradient_contender(discriminator: nn.Module, work: Callable[[], None], repetitions: int) -> Contender:
    """Seconds of ``work``, which adds to the gradients of ``discriminator``."""

    def run() -> float:
        discriminator.zero_grad()
        started = time.perf_counter()
        for _ in range(repetitions):
            work()
        return (time.perf_counter() - started) / repetitions

    return run


def compiled(config: GANConfig, rounds: int) -> list[Result]:
    """The recipe's step, and with the discriminator's gradient compiled."""
    config = dataclasses.replace(config, validate_every=0, checkpoint_every=0, accelerator="cpu", devices=1)
    fabric, data = launch(config), noise_images(8 if config.network == "mlp" else 32, count=1024)
    return interleave(
        {
            "recipes.gan": recipe_contender(fabric, config, data),
            "recipes.gan --compile true": recipe_contender(fabric, dataclasses.replace(config, compile=True), data),
        },
        rounds,
    )


def report(rounds: int = ROUNDS) -> Iterator[str]:
    """All comparisons as tables, one after another."""
    yield table("DCGAN 32x32, width 32, batch 64, no penalty", alternations(rounds))
    yield table("the same with r3, R1 and R2", penalised(rounds))
    yield table("R1 and R2 alone, with their backward pass, DCGAN", penalty_forms(PENALISED, rounds))
    yield table("the same, fully connected, width 128, 8x8", penalty_forms(SMALL, rounds))
    yield table("R1 and R2 alone, DCGAN, width 16, batch 32", penalty_forms(NARROW, rounds))
    yield table("the loss and R1 alone, with their backward pass, DCGAN", r1_forms(PENALISED, rounds))
    yield table("the same, DCGAN, width 16, batch 32", r1_forms(NARROW, rounds))
    yield table("the same, fully connected, width 128, 8x8", r1_forms(SMALL, rounds))
    default = GANConfig(steps=300, log_every=100)
    yield table("the default preset, r3, R1 and R2, 8x8", compiled(default, rounds))
    yield table("the same, DCGAN, width 16, batch 32", compiled(NARROW, rounds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in report():
        print(part, flush=True)
    print(machine())
