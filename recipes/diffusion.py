"""Denoising diffusion, conditional on the class, with self-conditioning and the denoiser's average (EMA).

A network learns to undo noise of every strength (Ho et al. 2020), given its own first estimate half of the time (Chen
et al. 2022); samples are noise that it undoes in a few steps (Song et al. 2021).

    python -m recipes.diffusion                                       # digits, about a minute on one CPU core
    python -m recipes.diffusion --preset fashion-mnist --data_root DIR
    python -m recipes.diffusion sample --run_dir RUN_DIR --out grid.png

To expect of the default: FID about that of one half of the real images against the other, all ten classes, over 98%
of the samples recognised as the class asked for. `--compile true` compiles the denoiser's forward and backward pass.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import TensorDataset

from lightning_custom import schedules
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, require_at_most, with_run_dir
from lightning_custom.data import Batches, sample_and_label, value_range
from lightning_custom.datasets import Images
from lightning_custom.denoisers import MLPDenoiser, UNetDenoiser
from lightning_custom.diffusion import Diffusion, Prediction, Schedule, even_times, guided, in_parts, one_of_each_pair
from lightning_custom.distributed import averages_by_itself, gather_shares, mean_gradients_, take_share
from lightning_custom.ema import EMA
from lightning_custom.errors import ConfigError
from lightning_custom.generation import GenerationScores, score_lines
from lightning_custom.image_data import ImageData, image_classifier, image_shapes, load_image_data
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.output_file import require_ending
from lightning_custom.pictures import image_grid
from lightning_custom.precision import Bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import complete_already, config_of_run
from lightning_custom.sampling import FILES, DrawConfig, write_samples

Generate = Callable[[Tensor, Tensor], Tensor]
"""``(noise [N, ...], labels [N]) -> samples``: this process's share of them, of noise and labels for all processes."""

Scores = Callable[[Generate], dict[str, float]]
"""Scores a way to generate, on every process alike."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(RunConfig):
    """Settings of the loop, and of the data and network that the command line builds."""

    steps: int = 6000
    """Updates of the denoiser; a schedule of the learning rate without its own length reads it."""
    log_every: int = 100
    """Steps between two rows of metrics."""
    validate_every: int = 1000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    prediction: Prediction = "sample"
    """What the denoiser says of a noisy sample: v, its noise (epsilon), or the clean sample."""
    noise_schedule: Schedule = "cosine"
    """Course of the noise over time."""
    min_snr: float = 5.0
    """Gamma of min-SNR weights of the loss; 0: errors of the prediction weigh alike at all times."""
    self_conditioning: bool = True
    """Give the denoiser its own estimate of the clean sample: of half of the samples in training, always after the
    first step of sampling."""
    bound: float = 1.0
    """Largest absolute value of an estimate of a sample, for data within it; 0: any, which epsilon does not bear."""
    batch_size: int = 64
    """Samples of an update, over all processes."""
    num_classes: int = 10
    """Classes that the denoiser is conditioned on; 0: unconditional."""
    label_dropout: float = 0.1
    """Chance that a sample comes without its label, which guidance needs."""
    lr: float = 1e-3
    """Highest learning rate (Adam)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 100
    """First steps, over which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Steps until a cosine is at 0; none: ``steps``, which a resumed run may then not change."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_half_life: float = 20000.0
    """Half-life of the denoiser's average, in samples."""
    ema_ramp: float = 0.1
    """Early on the half-life is at most this share of the samples seen; 0: no ramp."""
    sample_steps: int = 10
    """Steps from noise to a sample, in validation."""
    eta: float = 0.0
    """Share of fresh noise in each of them: 0 is DDIM, 1 ancestral sampling."""
    guidance: float = 0.25
    """Weight of classifier-free guidance in validation; 0: none."""
    val_images: int = 10_000
    """Real images to compare with, half of them at a time, and twice as many as are generated; at most 10,000."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for the small network of the default."""
    compile: bool = False
    """Compile the denoiser."""
    data: ImageData = "digits"
    """Data set: digits comes with scikit-learn, the others are read from data_root."""
    data_root: str | None = None
    """Directory in torchvision's layout (FashionMNIST/raw, ...); for folder, any that holds images."""
    image_size: int = 0
    """Side that images are padded or resized to; 0: as they come, a folder's to 32."""
    network: Literal["mlp", "unet"] = "mlp"
    """Denoiser: fully connected with residual blocks, or convolutions at two sizes with attention."""
    width: int = 128
    """Units of a block (mlp), or channels at the larger size (unet), a multiple of 8."""
    depth: int = 3
    """Blocks of the mlp."""
    patch: int = 1
    """Side of the patches that the unet takes for pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"batch_size": 1, "num_classes": 0, "decay_steps": 1, "warmup_steps": 0, "lr": 0})
        require_at_least(self, {"min_snr": 0, "bound": 0, "clip_norm": 0, "ema_half_life": 0, "ema_ramp": 0})
        require_at_least(self, {"sample_steps": 1, "eta": 0, "guidance": 0, "label_dropout": 0, "val_images": 8})
        require_at_least(self, {"width": 8, "depth": 1, "patch": 1})
        require_at_most(self, {"eta": 1, "label_dropout": 1})
        unlabelled = not self.num_classes and "num_classes is 0, so that nothing is labelled; set it, or this to 0"
        refuse_unread(
            self,
            {
                "label_dropout": unlabelled,
                "guidance": unlabelled,
                "decay_steps": self.schedule == "constant" and "the schedule is constant; use cosine",
            },
        )
        if self.network == "unet" and self.width % 8:
            raise ConfigError(f"width: {self.width}; the unet normalises groups of channels, give a multiple of 8")
        if self.prediction == "epsilon" and self.noise_schedule == "cosine" and not self.bound:
            raise ConfigError(
                "bound: 0.0, but an estimate by epsilon is divided by the signal, of which cosine leaves nothing at "
                "time 1; give the data's largest absolute value, or --prediction v"
            )
        if self.guidance and self.num_classes and not self.label_dropout:
            raise ConfigError(
                f"guidance: {self.guidance}, but the denoiser never works without a label; raise label_dropout, or set "
                "guidance to 0"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {
        "data": "fashion-mnist", "network": "unet", "width": 32, "patch": 2, "steps": 4000, "validate_every": 1000,
        "checkpoint_every": 500, "log_every": 50, "val_images": 2000, "threads": None,
    },
}  # fmt: skip


@dataclass
class DiffusionState:
    """What changes while training; a checkpoint is exactly these fields."""

    denoiser: nn.Module
    average: EMA
    optimizer: Optimizer
    batches: Batches
    metrics: MetricLogger
    step: int = 0
    """Updates done."""


def train(
    fabric: Fabric, config: DiffusionConfig, *, denoiser: nn.Module, dataset: Any, scores: Scores | None = None
) -> DiffusionState:
    """Train ``denoiser(noisy, times, labels, estimates) -> prediction`` of the shape of ``noisy``.

    ``noisy [B, ...]`` has the data's shape, ``times [B]`` are in [0, 1]. ``labels [B]`` go up to ``num_classes``, which
    stands for no label, and are None with ``num_classes=0``; ``estimates [B, ...]`` of the clean samples are zeros
    where there is none yet, and None without self-conditioning. ``dataset`` yields (sample, label) pairs, map-style,
    or batches of them; with ``num_classes=0`` samples alone, or tuples that begin with one. Samples lie within
    ``bound``.
    """
    config, rate = with_run_dir(fabric, config), learning_rate(config)
    require_within(config.bound, dataset)
    require_labels(config.num_classes, dataset)
    process = Diffusion(config.noise_schedule, config.prediction, config.bound)
    if config.compile:
        denoiser.compile()
    if isinstance(fabric.strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise ConfigError("strategy: fsdp leaves no process with the weights to average; use ddp, or auto")
    require_trainable("denoiser", denoiser)
    denoiser, optimizer = fabric.setup(denoiser, Adam(denoiser.parameters(), config.lr, fused=can_fuse(fabric)))
    own = Bare(unwrap(denoiser), fabric.strategy.precision)
    predict = denoiser if averages_by_itself(fabric) else own
    average = EMA(denoiser, half_life=config.ema_half_life, ramp=config.ema_ramp)
    batches = Batches(fabric, dataset, batch_size=config.batch_size, seed=config.seed)
    layout = {"samples against real images": ["val/fid"], "loss": ["loss/denoising"]}
    metrics = MetricLogger(fabric, config.run_dir, hyperparameters=config, headline=["val/fid"], layout=layout)
    state = DiffusionState(denoiser, average, optimizer, batches, metrics)

    with (
        Checkpointer(fabric, config, best="val/fid", steps_fixed=reads_steps(config)) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            schedules.set_learning_rate(optimizer, rate, state.step)

            # Noise of a strength of its own for each sample; some come without their label.
            samples, *known = sample_and_label(fabric, next(batches), config.batch_size, config.num_classes)
            if state.step == 0:  # what can be looked at of an iterable
                require_within(config.bound, TensorDataset(samples))
                require_labels(config.num_classes, TensorDataset(samples, *known))
            drawn = draw_noise(fabric, config, samples, rng.shared)
            noisy = process.noisy(samples, drawn.noise, drawn.times)
            labels = known[0].masked_fill(drawn.unlabelled, config.num_classes) if known else None

            # The denoiser's own estimates for half of them, through which no gradient flows.
            estimates = first_estimates(process, own, noisy, labels, drawn) if config.self_conditioning else None

            # Denoiser: lower the error of what it says of the noisy samples.
            target = process.target(samples, drawn.noise, drawn.times)
            errors = predict(noisy, drawn.times.to(noisy), labels, estimates).sub(target).square().flatten(1).mean(1)
            loss = (process.weights(drawn.times, config.min_snr).to(errors) * errors).mean()
            optimizer.zero_grad()
            fabric.backward(loss)
            mean_gradients_(fabric, denoiser)
            if config.clip_norm:
                fabric.clip_gradients(denoiser, optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
            optimizer.step()

            state.step += 1
            average.update_(batch_size=config.batch_size, samples_seen=state.step * config.batch_size)
            metrics.update({"loss/denoising": loss})
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                progress.report(state.step, metrics.flush(state.step, {"lr": rate(state.step - 1)}))
            validation: dict[str, float] = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = validate(fabric, config, state, scores, samples.shape[1:])
                progress.report(state.step, metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def require_within(bound: float, dataset: Any) -> None:
    """:class:`ConfigError` where a map-style data set has samples beyond ``bound``, at which estimates are cut."""
    least, most = value_range(dataset) or (0, 0)
    if bound and max(-least, most) > bound * (1 + 1e-5):  # scaled data may be a rounding beyond
        raise ConfigError(
            f"bound: {bound}, but samples go from {least:.3g} to {most:.3g}; scale them, or set bound to their largest "
            "absolute value"
        )


def require_labels(num_classes: int, dataset: Any) -> None:
    """:class:`ConfigError` for labels of no class; one of ``num_classes`` would be taken for no label, in silence."""
    least, most = (value_range(dataset, part=1) if num_classes else None) or (0, 0)
    if num_classes and not 0 <= least <= most < num_classes:
        raise ConfigError(f"num_classes: {num_classes}, but labels go from {least:g} to {most:g}; count them from 0")


class Drawn(NamedTuple):
    """What is random in a step."""

    times: Tensor
    """``[B]`` on the CPU, where coefficients are computed from them."""
    noise: Tensor
    unlabelled: Tensor
    """Truth values ``[B]``: which samples come without their label."""
    half: Tensor
    """Places of the samples that get an estimate, on the CPU, so that their number is known there."""


def draw_noise(fabric: Fabric, config: DiffusionConfig, samples: Tensor, draw: torch.Generator) -> Drawn:
    """This process's part of what is drawn for the whole batch."""
    count = config.batch_size
    times, noise = even_times(count, draw), torch.randn(count, *samples.shape[1:], generator=draw)
    unlabelled, half = torch.rand(count, generator=draw) < config.label_dropout, one_of_each_pair(count, draw)
    times, noise, unlabelled, half = (
        part.tensor_split(fabric.world_size)[fabric.global_rank] for part in (times, noise, unlabelled, half)
    )
    return Drawn(times, noise.to(samples), unlabelled.to(samples.device), half.nonzero().squeeze(1))


def first_estimates(process: Diffusion, own: Bare, noisy: Tensor, labels: Tensor | None, drawn: Drawn) -> Tensor:
    """The denoiser's estimates ``[B, ...]`` of half of the clean samples, given zeros for estimates; zeros else."""
    half, times, blank = drawn.half.to(noisy.device), drawn.times[drawn.half], torch.zeros_like(noisy)
    with torch.no_grad():
        found = own(noisy[half], times.to(noisy), None if labels is None else labels[half], blank[half])
        found = process.estimate(found, noisy[half], times)
    return blank.to(found.dtype).index_copy(0, half, found)


def can_fuse(fabric: Fabric) -> bool:
    """Whether one kernel may do the optimizer's step; scaled gradients are unscaled there, too late to be clipped."""
    return getattr(fabric.strategy.precision, "scaler", None) is None


def learning_rate(config: DiffusionConfig) -> schedules.Schedule:
    """The learning rate that the config names, as a function of the step."""
    steps = config.decay_steps or config.steps
    return schedules.named(config.schedule, config.lr, steps, warmup_steps=config.warmup_steps)


def reads_steps(config: DiffusionConfig) -> bool:
    """Whether a schedule depends on the run's length."""
    return config.decay_steps is None and config.schedule != "constant"


@torch.no_grad()
def denoising(
    config: DiffusionConfig, denoiser: nn.Module, noise: Tensor, labels: Tensor, draw: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """From ``noise [N, ...]`` for ``labels [N]``: noisy samples and estimates of the clean ones after each step."""
    process = Diffusion(config.noise_schedule, config.prediction, config.bound)
    known = labels if config.num_classes else None
    predict = guided(in_parts(denoiser, 500), known, config.num_classes, config.guidance)
    yield from process.denoise(
        predict,
        noise.to(next(denoiser.parameters()).dtype),
        steps=config.sample_steps,
        eta=config.eta,
        draw=draw,
        self_conditioning=config.self_conditioning,
    )


def sampler(fabric: Fabric, config: DiffusionConfig, denoiser: nn.Module) -> Generate:
    """What turns noise into samples by ``denoiser``, in its own precision, and gives them in float32."""

    def generate(noise: Tensor, labels: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(config.seed)

        def fresh() -> Tensor:
            return take_share(torch.randn(noise.shape, generator=draw), fabric)

        own_noise, own_labels = take_share(noise, fabric), take_share(labels, fabric)
        *_, (samples, _) = denoising(config, denoiser, own_noise, own_labels, fresh)
        return samples.float()

    return generate


def validate(
    fabric: Fabric, config: DiffusionConfig, state: DiffusionState, scores: Scores | None, shape: torch.Size
) -> dict[str, float]:
    """Show what fixed noise becomes, a column a class, where samples are pictures, and score the average's samples."""
    generate, columns = sampler(fabric, config, state.average.module), config.num_classes or 10
    if len(shape) == 3 and shape[0] in (1, 3):
        noise = torch.randn(8 * columns, *shape, generator=torch.Generator().manual_seed(config.seed))
        images = gather_shares(generate(noise, torch.arange(len(noise)) % columns), fabric)
        grid = image_grid((images + 1) / 2, columns, scale=max(1, 32 // shape[-1]))
        state.metrics.image(state.step, "samples", grid)
    return {} if scores is None else scores(generate)


def main(config: DiffusionConfig) -> str:
    """Train on a real data set and print what came out; returns the run's directory."""
    started = time.perf_counter()
    fabric = launch(config)
    data = load_data(config)
    if config.num_classes not in (0, data.num_classes):
        raise ConfigError(f"num_classes: {config.num_classes}; {config.data} has {data.num_classes}, or use 0 for none")
    config = with_run_dir(fabric, config)
    denoiser = network(config, data.images.shape[1:])
    shown = data._replace(images=data.images[: config.val_images], labels=data.labels[: config.val_images])
    scorer = GenerationScores(
        fabric, shown, image_classifier(fabric, config.data, data), conditional=config.num_classes > 0
    )

    def scores(generate: Generate) -> dict[str, float]:
        draw = torch.Generator().manual_seed(config.seed + 1)
        return scorer(generate(torch.randn(len(scorer.labels), *data.images.shape[1:], generator=draw), scorer.labels))

    prepared = time.perf_counter()
    state = train(fabric, config, denoiser=denoiser, dataset=data.dataset(), scores=scores)
    if fabric.global_rank == 0 and state.step == config.steps:
        training = time.perf_counter() - prepared
        summary(config, state, (state.step - state.metrics.resumed_from) / training, prepared - started, training)
    return str(config.run_dir)


def load_data(config: DiffusionConfig) -> Images:
    """The data set that the config names; its training part where it has parts."""
    return load_image_data(config.data, config.data_root, config.image_size)


def network(config: DiffusionConfig, shape: tuple[int, ...]) -> nn.Module:
    """The denoiser that the config names, of images of ``shape`` (C, H, W), with weights from its seed."""
    torch.manual_seed(config.seed)
    own = config.self_conditioning
    if config.network == "mlp":
        return MLPDenoiser(config.num_classes, shape, config.width, config.depth, self_conditioning=own)
    channels, height, width = shape
    return UNetDenoiser(
        config.num_classes, (channels, height, width), config.width, config.patch, self_conditioning=own
    )


def summary(config: DiffusionConfig, state: DiffusionState, rate: float, preparing: float, training: float) -> None:
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
        f"draw: python -m recipes.diffusion sample --run_dir {config.run_dir} --out grid.png",
        flush=True,
    )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawConfig):
    """Draw samples from a run's best or last checkpoint."""

    count: int = 60
    """Number of samples."""
    weights: Literal["average", "denoiser"] = "average"
    """The denoiser's average, or its last weights."""
    show: Literal["samples", "noisy", "estimates"] = "samples"
    """The samples, or a row for each with what it was after every step: noisy, or as estimated."""
    sample_steps: int | None = None
    """Steps from noise to a sample; none: as in the run's validation, like the next two."""
    eta: float | None = None
    """Share of fresh noise in each of them: 0 is DDIM, 1 ancestral sampling."""
    guidance: float | None = None
    """Weight of classifier-free guidance."""


def sample(request: SampleConfig) -> None:
    """Write the file that ``request`` asks for."""
    require_ending(Path(request.out), FILES)
    asked = {name: getattr(request, name) for name in ("sample_steps", "eta", "guidance")}
    changes = {name: value for name, value in asked.items() if value is not None}
    config = config_of_run(DiffusionConfig, request.run_dir, **changes)
    labels, columns = request.labels(config.num_classes)
    denoiser, shape = trained(config, load_module(request.run_dir, request.weights, which=request.which))
    draw, every = torch.Generator().manual_seed(request.seed), (request.count, *shape)
    noise = torch.randn(every, generator=draw)
    found = denoising(config, denoiser.eval(), noise, labels, lambda: torch.randn(every, generator=draw))
    steps = list(found) if request.show != "samples" else [*deque(found, maxlen=1)]
    images = steps[-1][0]
    if request.show != "samples":
        which, columns = int(request.show == "estimates"), len(steps)
        images = torch.stack([step[which] for step in steps], dim=1).flatten(0, 1)
        labels = labels.repeat_interleave(columns)
    write_samples(Path(request.out), images.float(), labels, columns)
    print(f"{request.count} samples: {request.out}")


def trained(config: DiffusionConfig, weights: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...]]:
    """The denoiser with the ``weights`` of a run, and the shape of its samples; the data itself is not needed."""
    shapes = {name: part.shape for name, part in weights.items()}
    for shape in image_shapes(config.data, config.image_size):
        denoiser = network(config, shape)
        if {name: part.shape for name, part in denoiser.state_dict().items()} == shapes:
            denoiser.load_state_dict(weights)
            return denoiser, shape
    raise ConfigError(f"run_dir: its weights are of no denoiser for images of {config.data}; check the path")


if __name__ == "__main__":
    sys.exit(
        command_line(
            DiffusionConfig, main, presets=PRESETS, verbs={"sample": (SampleConfig, sample)}, description=__doc__
        )
    )
