"""A generator and a discriminator in alternation, conditional on the class, with the generator's average (EMA).

The default is R3GAN's objective (Huang et al. 2024, eq. 2 and 4): relativistic pairing with R1 and R2, which needs no
tricks to be stable. Goodfellow et al. 2014 for the rest.

    python -m recipes.gan                                             # digits, half a minute on one core
    python -m recipes.gan --preset fashion-mnist --data_root DIR
    python -m recipes.gan sample --run_dir RUN_DIR --out grid.png

To expect of the default: FID about that of one half of the real images against the other, all ten classes, over 95%
of the samples recognised as the class asked for. `--compile true` compiles the discriminator's gradient.
"""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from lightning_custom import schedules
from lightning_custom.adaptive_augmentation import AdaptiveProbability, adaptive_augment
from lightning_custom.adversarial import (
    LOSSES,
    AdversarialLoss,
    frozen,
    lazy_adam,
    spectrally_normalised,
)
from lightning_custom.augmentation import diff_augment
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, require_at_most, with_run_dir
from lightning_custom.data import Batches, sample_and_label
from lightning_custom.datasets import Images
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.ema import EMA
from lightning_custom.errors import ConfigError
from lightning_custom.generation import GenerationScores, score_lines
from lightning_custom.image_data import ImageData, image_classifier, image_shapes, load_image_data
from lightning_custom.image_networks import discriminator_network, generator_network
from lightning_custom.inception import inception_features
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.logits import show_logits
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.mode_collapse import mode_collapse
from lightning_custom.output_file import require_ending
from lightning_custom.parts import WHOLE, Part, mean_over_parts, parts, require_parts
from lightning_custom.penalties import Judge, Verdict, needs_input_gradient, penalties
from lightning_custom.pictures import image_grid
from lightning_custom.precision import Bare, bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import complete_already, config_of_run
from lightning_custom.sampling import FILES, SampleConfig, sampler, write_samples

Scores = Callable[[Callable[[Tensor, Tensor], Tensor]], dict[str, float]]
"""Scores ``generate(latents, labels) -> images``, on every process alike."""


@dataclass(frozen=True, kw_only=True)
class GANConfig(RunConfig):
    """Settings of the loop, and of the data and networks that the command line builds."""

    steps: int = 5000
    """Steps, of ``d_steps`` discriminator and ``g_steps`` generator updates each; schedules without their own length
    read it."""
    log_every: int = 100
    """Steps between two rows of metrics."""
    validate_every: int = 1000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    loss: str = "r3"
    """Adversarial loss: r3, nonsaturating, hinge, saturating, lsgan, wasserstein or relativistic-average."""
    r1: float = 0.5
    """Weight gamma of R1, the penalty gamma/2 |grad D|^2 on real samples; 0: none."""
    r2: float = 0.5
    """Weight gamma of R2, the same on generated samples; 0: none."""
    gp: float = 0.0
    """Weight of WGAN-GP's penalty (|grad D| - 1)^2 between real and generated samples, 10 in the paper; 0: none."""
    dragan: float = 0.0
    """Weight of DRAGAN's penalty, the same on real samples with noise, 10 in the paper; 0: none."""
    dragan_std: float = 0.25
    """Standard deviation of DRAGAN's noise, in the units of the data."""
    bcr: float = 0.0
    """Weight of balanced consistency, (D(T(x)) - D(x))^2 for T a translation, 10 in the paper; 0: none."""
    penalty_every: int = 1
    """Discriminator updates to one update on the penalties alone; 1: they share every update of the loss."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Parts of DiffAugment, done to all that the discriminator sees; the paper has all three."""
    ada: tuple[Literal["blit", "geometry", "color"], ...] = ()
    """Categories of adaptive augmentation (ADA), done to all that the discriminator sees; the paper has all three."""
    ada_target: float = 0.6
    """Mean of sign(D(real)) that ADA steers its probability to."""
    ada_every: int = 4
    """Discriminator updates between two changes of ADA's probability."""
    ada_images: float = 500_000.0
    """Real samples in which ADA's probability can go from 0 to 1; 0: it stays at ada_start."""
    ada_start: float = 0.0
    """ADA's probability at first."""
    batch_size: int = 64
    """Real samples of a discriminator update, over all processes."""
    accumulate: int = 1
    """Parts of each batch, one after another on the device, whose gradients are added up."""
    latent_size: int = 32
    """Normal numbers that the generator gets for each sample."""
    num_classes: int = 10
    """Classes that the networks are conditioned on; 0: unconditional."""
    conditioning: Literal["auto", "concatenation", "projection", "none"] = "auto"
    """How the discriminator is told the class; auto: none with an auxiliary classifier, else concatenation for mlp and
    projection for the others."""
    auxiliary: float = 0.0
    """Weight of an auxiliary classifier's cross-entropy in both networks' losses (AC-GAN), 1 in the paper; 0: none."""
    d_steps: int = 1
    """Discriminator updates in each step."""
    g_steps: int = 1
    """Generator updates in each step, each after the first with new latents for the last real batch's labels."""
    g_lr: float = 1e-3
    """Learning rate of the generator (Adam)."""
    d_lr: float = 1e-3
    """Learning rate of the discriminator (Adam)."""
    g_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the generator's learning rate."""
    d_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the discriminator's learning rate."""
    decay_steps: int | None = None
    """Steps until linear and cosine schedules are at 0; none: ``steps``, which a resumed run may then not change."""
    warmup_steps: int = 0
    """First steps, over which both learning rates rise from 0."""
    g_betas: tuple[float, float] = (0.0, 0.99)
    """Adam's betas for the generator."""
    d_betas: tuple[float, float] = (0.0, 0.99)
    """Adam's betas for the discriminator."""
    ema_half_life: float = 20000.0
    """Half-life of the generator's average, in generated images."""
    ema_ramp: float = 0.1
    """Early on the half-life is at most this share of the images seen; 0: no ramp."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for the small networks of the default."""
    data: ImageData = "digits"
    """Data set: digits comes with scikit-learn, the others are read from data_root."""
    data_root: str | None = None
    """Directory in torchvision's layout (FashionMNIST/raw, ...); for folder, any that holds images."""
    image_size: int = 0
    """Side that images are padded or resized to; 0: as they come, a folder's to 32."""
    features: Literal["classifier", "inception"] = "classifier"
    """What FID and its like are measured in; inception needs the extra of that name and a download."""
    network: Literal["mlp", "conv", "dcgan", "residual"] = "mlp"
    """Networks without normalisation: fully connected; two convolutions; as in DCGAN; with R3GAN's residual blocks."""
    width: int = 128
    """Units of a hidden layer (mlp), or channels at the side of the image."""
    spectral_norm: bool = False
    """Divide the discriminator's weights by their largest singular value."""
    compile: bool = False
    """Compile the discriminator's gradient, penalty included: the smaller the network, the more it saves."""
    channels_last: bool = False
    """Lay out the convolutional networks' weights and features with channels innermost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(
            self, {"batch_size": 1, "latent_size": 1, "d_steps": 1, "g_steps": 1, "width": 2, "num_classes": 0}
        )
        require_at_least(self, {"r1": 0, "r2": 0, "g_lr": 0, "d_lr": 0, "ema_half_life": 0, "ema_ramp": 0})
        require_at_least(self, {"gp": 0, "dragan": 0, "dragan_std": 0, "bcr": 0, "penalty_every": 1})
        require_at_least(self, {"ada_target": -1, "ada_every": 1, "ada_images": 0, "ada_start": 0, "auxiliary": 0})
        require_at_least(self, {"accumulate": 1, "decay_steps": 1, "warmup_steps": 0})
        require_at_most(self, {"ada_start": 1})
        if self.loss not in LOSSES:
            raise ConfigError(f"loss: {self.loss!r}; choose one of {', '.join(LOSSES)}")
        self._check_combinations()
        if self.loss == "wasserstein" and not (self.gp or self.dragan or self.r1 or self.r2 or self.spectral_norm):
            raise ConfigError(
                "loss: wasserstein needs a discriminator of bounded slope; set gp to 10, or spectral_norm"
            )
        for name in ("g_betas", "d_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise ConfigError(f"{name}: {getattr(self, name)}; each must be at least 0 and below 1")

    def _check_combinations(self) -> None:
        """Refuse what says nothing together."""
        penalised = self.r1 or self.r2 or self.gp or self.dragan or self.bcr
        plain = not self.ada and "nothing is augmented; set ada"
        steady = plain or (not self.ada_images and "ada_images is 0, and the probability stays; set that above 0")
        constant = {self.g_schedule, self.d_schedule} == {"constant"}
        untold = self.num_classes == 0 and self.conditioning != "none"
        refuse_unread(
            self,
            {
                "penalty_every": not penalised and "no penalty has a weight; set r1, or leave it 1",
                "dragan_std": not self.dragan and "dragan has no weight; set dragan",
                "ada_start": plain and f"{plain}, or ada_start to 0",
                "ada_images": plain,
                "ada_target": steady,
                "ada_every": steady,
                "decay_steps": constant and "both schedules are constant; set g_schedule or d_schedule",
                "conditioning": untold and "num_classes is 0; set that, or leave it auto",
            },
        )
        if self.ada and self.ada_images and not LOSSES[self.loss].is_decided_at_zero:
            raise ConfigError(
                f"ada: the sign of a logit means nothing to {self.loss}; choose nonsaturating, saturating or hinge, or "
                "keep the probability at --ada_start with --ada_images 0"
            )
        if self.auxiliary and (self.conditioning == "concatenation" or self.num_classes == 0):
            told = "is told the class already" if self.num_classes else "has no classes to tell apart"
            raise ConfigError(f"auxiliary: {self.auxiliary}, but the discriminator {told}; set auxiliary to 0")
        if self.compile:
            drawn = ("augment", "ada", "gp", "dragan", "bcr", "spectral_norm")
            other = [name for name in drawn if getattr(self, name)]
            other += [name for name in ("accumulate", "penalty_every") if getattr(self, name) > 1]
            if other or self.loss == "relativistic-average":
                raise ConfigError(
                    "compile: the discriminator's gradient is recorded once, as a function of its samples alone; leave "
                    f"out {', '.join(other) or self.loss}, or --compile"
                )
        if self.accumulate > 1 and self.loss == "relativistic-average":
            raise ConfigError(
                f"accumulate: {self.accumulate}, but relativistic-average needs the mean logit of the whole batch; "
                "choose another loss, or set accumulate to 1"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {
        "data": "fashion-mnist", "network": "conv", "width": 32, "latent_size": 64, "steps": 5000,
        "validate_every": 1000, "checkpoint_every": 1000, "log_every": 50,
        "threads": None,
    },
    # On one core of a CPU in minutes; the page has what each loss reaches with it.
    "fashion-mnist-small": {
        "data": "fashion-mnist", "image_size": 32, "network": "dcgan", "width": 16, "batch_size": 32,
        "latent_size": 64, "steps": 3000, "r1": 0.1, "r2": 0.1, "g_lr": 2e-3, "d_lr": 2e-3, "ema_half_life": 5000.0,
    },
    # For a GPU: R3GAN's settings for CIFAR-10 (Huang et al. 2024), its schedules of gamma, beta and p left out.
    "cifar10": {
        "data": "cifar10", "network": "residual", "width": 96, "latent_size": 64, "batch_size": 512, "steps": 40_000,
        "r1": 0.05, "r2": 0.05, "g_lr": 2e-4, "d_lr": 2e-4, "g_schedule": "cosine", "d_schedule": "cosine",
        "ada": ("blit", "geometry", "color"), "ada_start": 0.3, "ada_images": 0.0, "ema_half_life": 5e6,
        "precision": "bf16-mixed", "channels_last": True, "threads": None, "checkpoint_every": 2000,
        "validate_every": 2000,
    },
}  # fmt: skip


@dataclass
class GANState:
    """What changes while training; a checkpoint is exactly these fields."""

    generator: nn.Module
    discriminator: nn.Module
    average: EMA
    g_optimizer: Optimizer
    d_optimizer: Optimizer
    ada: AdaptiveProbability
    batches: Batches
    metrics: MetricLogger
    step: int = 0
    """Steps done."""


def train(
    fabric: Fabric,
    config: GANConfig,
    *,
    generator: nn.Module,
    discriminator: nn.Module,
    dataset: Any,
    scores: Scores | None = None,
) -> GANState:
    """Train ``generator(latent, label) -> image`` against ``discriminator(image, label) -> logit``.

    ``dataset`` yields (image, label) pairs, map-style, or batches of them. With ``num_classes=0`` the networks get no
    label and the dataset yields images alone, or tuples that begin with one. With an auxiliary classifier the
    discriminator gives ``(logit, class logits)``.
    """
    config, loss, (g_rate, d_rate) = with_run_dir(fabric, config), LOSSES[config.loss], learning_rates(config)
    require_parts(fabric, config.batch_size, config.accumulate)
    require_trainable("generator", generator)
    require_trainable("discriminator", discriminator)
    g_optimizer = Adam(generator.parameters(), config.g_lr, config.g_betas, fused=True)
    d_lr, d_betas = lazy_adam(config.d_lr, config.d_betas, config.penalty_every)
    d_optimizer = Adam(discriminator.parameters(), d_lr, d_betas, fused=True)
    generator, g_optimizer = fabric.setup(generator, g_optimizer)
    discriminator, d_optimizer = fabric.setup(discriminator, d_optimizer)
    ada = AdaptiveProbability(
        fabric, start=config.ada_start, target=config.ada_target, every=config.ada_every,
        images=config.ada_images if config.ada else 0.0,
    )  # fmt: skip
    generate, judge = bare(fabric, generator), partial(judged, fabric, config, bare(fabric, discriminator), ada)
    compiled = compiled_discriminator(fabric, config, loss, discriminator, ada) if config.compile else None
    average = EMA(generator, half_life=config.ema_half_life, ramp=config.ema_ramp)
    batches = Batches(fabric, dataset, batch_size=config.batch_size, seed=config.seed)
    metrics = MetricLogger(
        fabric,
        config.run_dir,
        hyperparameters=config,
        headline=["val/fid"],
        layout={
            "samples against real images": ["val/fid"],
            "losses": ["loss/discriminator", "loss/generator", "loss/penalty"],
        },
    )
    state = GANState(generator, discriminator, average, g_optimizer, d_optimizer, ada, batches, metrics)

    with (
        Checkpointer(fabric, config, best="val/fid", steps_fixed=reads_steps(config)) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            losses: dict[str, Tensor] = {}
            schedules.set_learning_rate(g_optimizer, g_rate, state.step)
            schedules.set_learning_rate(d_optimizer, d_rate, state.step)

            for d_step in range(config.d_steps):
                # Discriminator: raise D(real), lower D(fake), keep its gradient at both small.
                batch = sample_and_label(fabric, next(batches), config.batch_size, config.num_classes)
                latents = draw_latents(fabric, config, rng.shared)
                seen: list[tuple[Tensor, list[Tensor], Tensor]] = []
                # The last fakes serve the generator too, unless they are drawn part by part to save memory.
                is_shared = config.accumulate == 1 and d_step == config.d_steps - 1
                d_optimizer.zero_grad()
                for part in parts(config.accumulate, rng.shared):
                    latent, real, *label = (part.of(tensor) for tensor in (latents, *batch))
                    with torch.set_grad_enabled(is_shared):
                        fake = generate(latent, *label)
                    samples = torch.cat([real, fake.detach()])
                    samples.requires_grad_(config.penalty_every == 1 and needs_input_gradient(config))
                    if compiled is None:
                        verdict = judge(samples, label, rng.shared, part)
                        logits, named = verdict.logits, discriminator_losses(config, loss, verdict, label)
                        if config.penalty_every == 1:
                            named["loss/penalty"] = penalties(
                                fabric, config, judge, samples, logits, label, rng.shared, part
                            )
                        fabric.backward(mean_over_parts(losses, named, part))
                    else:  # the lines above, compiled
                        total, losses = compiled(
                            dict(unwrap(discriminator).named_parameters()), samples.detach(), *label
                        )
                        logits = losses.pop("logits")
                        fabric.backward(total)
                    ada.observe(logits.chunk(2)[0])
                    seen.append((samples, label, logits.detach()))
                mean_gradients_(fabric, discriminator)
                d_optimizer.step()
                ada.adjust_()
                if config.penalty_every > 1 and due(state.step * config.d_steps + d_step + 1, config.penalty_every):
                    # Lazily: an update of its own, with the weight of all updates that went without.
                    d_optimizer.zero_grad()
                    for part, (samples, label, _) in zip(parts(config.accumulate, rng.shared), seen, strict=True):
                        seen_logits = judge(samples.requires_grad_(), label, rng.shared, part).logits
                        penalty = penalties(fabric, config, judge, samples, seen_logits, label, rng.shared, part)
                        fabric.backward(config.penalty_every * mean_over_parts(losses, {"loss/penalty": penalty}, part))
                    mean_gradients_(fabric, discriminator)
                    d_optimizer.step()

            for g_step in range(config.g_steps):
                # Generator: raise D(fake).
                if g_step > 0:
                    latents = draw_latents(fabric, config, rng.shared)
                g_optimizer.zero_grad()
                for part in parts(config.accumulate, rng.shared):
                    latent, real, *label = (part.of(tensor) for tensor in (latents, *batch))
                    if g_step > 0 or not is_shared:
                        fake = generate(latent, *label)
                    with frozen(discriminator):
                        named = generator_losses(config, loss, judge, real, fake, label, rng.shared, part)
                        fabric.backward(mean_over_parts(losses, named, part))
                mean_gradients_(fabric, generator)
                g_optimizer.step()

            state.step += 1
            generated = config.g_steps * config.batch_size
            average.update_(batch_size=generated, samples_seen=state.step * generated)
            metrics.update(losses | ({"ada/p": ada.p, "ada/r": ada.r} if config.ada else {}))
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                known = show_logits(fabric, metrics, state.step, [logits for *_, logits in seen])
                known |= {"lr/generator": g_rate(state.step - 1), "lr/discriminator": d_rate(state.step - 1)}
                progress.report(state.step, metrics.flush(state.step, known))
            validation = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = validate(fabric, config, state, scores)
                progress.report(state.step, metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def learning_rates(config: GANConfig) -> tuple[schedules.Schedule, schedules.Schedule]:
    """The learning rates of generator and discriminator, as functions of the step."""
    d_lr, _ = lazy_adam(config.d_lr, config.d_betas, config.penalty_every)
    steps, warmup = config.decay_steps or config.steps, config.warmup_steps
    g_rate = schedules.named(config.g_schedule, config.g_lr, steps, warmup_steps=warmup)
    return g_rate, schedules.named(config.d_schedule, d_lr, steps, warmup_steps=warmup)


def reads_steps(config: GANConfig) -> bool:
    """Whether a schedule depends on the run's length."""
    return config.decay_steps is None and {config.g_schedule, config.d_schedule} != {"constant"}


def draw_latents(fabric: Fabric, config: GANConfig, draw: torch.Generator) -> Tensor:
    """This process's latents ``[B, Z]``, drawn for the whole batch."""
    return take_share(torch.randn(config.batch_size, config.latent_size, generator=draw), fabric)


def judged(
    fabric: Fabric,
    config: GANConfig,
    discriminate: Bare,
    ada: AdaptiveProbability,
    samples: Tensor,
    label: list[Tensor],
    draw: torch.Generator,
    part: Part,
) -> Verdict:
    """The discriminator's word on augmented samples, of which there may be several batches with the same label."""
    batches = len(samples) * part.count * fabric.world_size // config.batch_size
    seen = diff_augment(fabric, samples, config.augment, draw, batches=batches, part=part)
    seen = adaptive_augment(fabric, seen, config.ada, ada.p, draw, batches=batches, part=part)
    word = discriminate(seen, *(torch.cat([own] * batches) for own in label))
    return Verdict(*word) if config.auxiliary else Verdict(word, None)


def compiled_discriminator(
    fabric: Fabric, config: GANConfig, loss: AdversarialLoss, discriminator: nn.Module, ada: AdaptiveProbability
) -> CompiledGradient:
    """``(parameters, samples, *label) -> (total, losses and logits by name)``, whose gradient is known at once."""
    refuse_loss_scale(fabric, "which --compile leaves out of the gradient")
    discriminate, no_draw = bare(fabric, discriminator), torch.Generator()

    def losses_of(parameters: dict[str, Tensor], samples: Tensor, *label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with_parameters: Any = partial(discriminate, parameters=parameters)
        judge, samples = partial(judged, fabric, config, with_parameters, ada), samples.detach().requires_grad_()
        verdict = judge(samples, [*label], no_draw, WHOLE)
        named = discriminator_losses(config, loss, verdict, [*label])
        named["loss/penalty"] = penalties(fabric, config, judge, samples, verdict.logits, [*label], no_draw)
        return reduce(torch.add, named.values()), named | {"logits": verdict.logits}

    return CompiledGradient(losses_of)


def discriminator_losses(
    config: GANConfig, loss: AdversarialLoss, verdict: Verdict, label: list[Tensor]
) -> dict[str, Tensor]:
    """What the discriminator minimises beside penalties, given its word on real samples and as many fake ones."""
    named = {"loss/discriminator": loss.discriminator(*verdict.logits.chunk(2))}
    if verdict.classes is not None:
        # Twice the mean over both kinds is the sum of the means over each.
        named["loss/discriminator_class"] = 2 * config.auxiliary * cross_entropy(verdict.classes, label[0].repeat(2))
    return named


def generator_losses(
    config: GANConfig,
    loss: AdversarialLoss,
    judge: Judge,
    real: Tensor,
    fake: Tensor,
    label: list[Tensor],
    draw: torch.Generator,
    part: Part,
) -> dict[str, Tensor]:
    """What the generator minimises."""
    with torch.no_grad():
        real_logits = judge(real, label, draw, part).logits if loss.generator_sees_real else None
    verdict = judge(fake, label, draw, part)
    named = {"loss/generator": loss.generator(real_logits, verdict.logits)}
    if verdict.classes is not None:
        named["loss/generator_class"] = config.auxiliary * cross_entropy(verdict.classes, label[0])
    return named


def validate(fabric: Fabric, config: GANConfig, state: GANState, scores: Scores | None) -> dict[str, float]:
    """Show fixed latents, a column a class, where samples are pictures, and score the average's samples."""
    sample = sampler(state.average.module, conditional=config.num_classes > 0, device=fabric.device)
    columns = config.num_classes or 10
    latents = torch.randn(8 * columns, config.latent_size, generator=torch.Generator().manual_seed(config.seed))
    images = sample(latents, torch.arange(len(latents)) % columns)
    if images.dim() == 4 and images.shape[1] in (1, 3):
        grid = image_grid((images + 1) / 2, columns, scale=max(1, 32 // images.shape[-1]))
        state.metrics.image(state.step, "samples", grid)
    found = {} if scores is None else scores(sample)
    # Before the data has been seen once, samples that are all alike are the beginning.
    if fabric.global_rank == 0 and state.batches.passes >= 1 and (warning := mode_collapse(found)):
        warnings.warn(f"step {state.step}: {warning}", stacklevel=2)
    return found


def main(config: GANConfig) -> str:
    """Train on a real data set and print what came out; returns the run's directory."""
    started = time.perf_counter()
    fabric = launch(config)
    data = load_data(config)
    if config.num_classes not in (0, data.num_classes):
        raise ConfigError(f"num_classes: {config.num_classes}; {config.data} has {data.num_classes}, or use 0 for none")
    generator, discriminator = networks(config, data)
    config = with_run_dir(fabric, config)
    features = inception_features(fabric) if config.features == "inception" else None
    scorer = GenerationScores(
        fabric, data, image_classifier(fabric, config.data, data), features=features, conditional=config.num_classes > 0
    )

    def scores(sample: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed + 1)
        latents = torch.randn(len(scorer.labels), config.latent_size, generator=generator)
        rank, processes = fabric.global_rank, fabric.world_size
        return scorer(sample(latents.tensor_split(processes)[rank], scorer.labels.tensor_split(processes)[rank]))

    prepared = time.perf_counter()
    state = train(
        fabric,
        config,
        generator=generator,
        discriminator=discriminator,
        dataset=data.dataset(),
        scores=scores,
    )
    if fabric.global_rank == 0 and state.step == config.steps:
        training = time.perf_counter() - prepared
        summary(config, state, (state.step - state.metrics.resumed_from) / training, prepared - started, training)
    return str(config.run_dir)


def load_data(config: GANConfig) -> Images:
    """The data set that the config names; its training part where it has parts."""
    return load_image_data(config.data, config.data_root, config.image_size)


def networks(config: GANConfig, data: Images) -> tuple[nn.Module, nn.Module]:
    """The generator and discriminator that the config names, with weights from its seed."""
    channels, height, width = data.images.shape[1:]
    shape = (channels, height, width)
    torch.manual_seed(config.seed)
    generator = generator_network(config.network, config.latent_size, config.num_classes, shape, config.width)
    discriminator = discriminator_network(
        config.network, config.num_classes, shape, config.width, config.conditioning, auxiliary=config.auxiliary > 0
    )
    if config.spectral_norm:
        discriminator = spectrally_normalised(discriminator)
    if config.channels_last:
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return generator, discriminator


def summary(config: GANConfig, state: GANState, rate: float, preparing: float, training: float) -> None:
    """Print what a finished run reached, where it is, and how to look at it."""
    if rate == 0:
        print(complete_already(config, state.step, steps_fixed=reads_steps(config)))
        return
    print("", *score_lines(state.metrics.latest, conditional=config.num_classes > 0), sep="\n")
    print(
        f"{rate * config.batch_size:,.0f} images/s   {training:.1f} s training, "
        f"{preparing:.1f} s for data and feature extractor\n"
        f"run: {config.run_dir}\n"
        f"look: tensorboard --logdir {config.run_dir}\n"
        f"draw: python -m recipes.gan sample --run_dir {config.run_dir} --out grid.png",
        flush=True,
    )


def sample(request: SampleConfig) -> None:
    """Write the file that ``request`` asks for."""
    require_ending(Path(request.out), FILES)
    config = config_of_run(GANConfig, request.run_dir)
    generator = trained_generator(config, load_module(request.run_dir, request.weights, which=request.which))
    latents, labels, columns = request.inputs(config.latent_size, config.num_classes)
    generate = sampler(generator.eval(), conditional=config.num_classes > 0, device=torch.device("cpu"))
    write_samples(Path(request.out), generate(latents, labels), labels, columns)
    print(f"{len(latents)} samples: {request.out}")


def trained_generator(config: GANConfig, weights: dict[str, Any]) -> nn.Module:
    """The generator with the ``weights`` of a run; the data itself is not needed."""
    shapes = {name: part.shape for name, part in weights.items()}
    for shape in image_shapes(config.data, config.image_size):
        generator = generator_network(config.network, config.latent_size, config.num_classes, shape, config.width)
        if {name: part.shape for name, part in generator.state_dict().items()} == shapes:
            generator.load_state_dict(weights)
            return generator
    raise ConfigError(f"run_dir: its weights are of no generator for images of {config.data}; check the path")


if __name__ == "__main__":
    sys.exit(
        command_line(GANConfig, main, presets=PRESETS, verbs={"sample": (SampleConfig, sample)}, description=__doc__)
    )
