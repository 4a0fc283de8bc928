"""The plain loop: batches, forward, loss, backward, step, metrics, validation, best checkpoint, schedule.

Read this one first; the other recipes have the same shell around another order of operations.

    python -m recipes.classification                                  # digits, seconds
    python -m recipes.classification --preset fashion-mnist --data_root DIR
    python -m recipes.classification --devices 2 --strategy ddp       # or auto, fsdp, torchrun, fabric run

`--compile true` compiles the model's forward and backward pass.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torchmetrics import MetricCollection

from lightning_custom import schedules
from lightning_custom.augmentation import shift_and_flip
from lightning_custom.checkpoint import Checkpointer, load_module, read_best
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, require_at_most, with_run_dir
from lightning_custom.confusion import ConfusionMatrix
from lightning_custom.data import Batches, evaluation_batches, require_map_style
from lightning_custom.datasets import Images, load_images, split
from lightning_custom.distributed import mean_gradients_
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import computed, evaluating
from lightning_custom.functional import mixup
from lightning_custom.gradients import sam_ascent
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger, is_logged
from lightning_custom.networks import ConvClassifier
from lightning_custom.pictures import matrix_picture
from lightning_custom.precision import Bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import complete_already
from lightning_custom.sharded import is_sharded, load_weights_
from lightning_custom.watch import Watch

Loss = Callable[[Tensor, Tensor], Tensor | Mapping[str, Tensor]]
"""``(logits [B, K], targets [B] or [B, K]) -> mean over the batch``, or several by name, whose sum is minimised."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(RunConfig):
    """Settings of the loop, and of the data and network that the command line builds."""

    steps: int = 800
    """Optimizer updates."""
    validate_every: int = 100
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    best: str = "val/loss"
    """Score by which the best checkpoint is chosen."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether the best score is the smallest or the largest; auto: by its name."""
    patience: int = 0
    """Validations without a new best score after which the run is complete; 0: never."""
    batch_size: int = 64
    """Samples of an update, over all processes."""
    accumulate: int = 1
    """Parts that a process cuts its batch into, one backward pass each, to save memory."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer; sgd has momentum 0.9."""
    lr: float = 3e-3
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Weight decay of the optimizer."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    """Learning rate over the run."""
    warmup_steps: int = 0
    """Steps of linear warm-up before it."""
    decay_steps: int | None = None
    """Length of both together; none: steps, which a resumed run can then not change."""
    label_smoothing: float = 0.0
    """Probability mass spread over all classes in the training loss."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    sam: float = 0.0
    """Radius rho of sharpness-aware minimisation (two passes a step); 0: none."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    average: Literal["none", "ema", "swa"] = "none"
    """Average of the weights that is validated instead of them: exponential, or of equal parts."""
    average_decay: float = 0.99
    """What an exponential average keeps of itself at each update."""
    average_start: int = 0
    """Step from which on weights are averaged; before it the average is the model itself."""
    shift: int = 1
    """Training images [B, C, H, W] in [-1, 1] are shifted by up to this many pixels; 0: not."""
    flip: bool = False
    """Mirror half of the training images."""
    threads: int | None = 1
    """CPU threads of each process: one is enough for the small images of the default, and never waits for another."""
    width: int = 32
    """Channels of the network's first layer."""
    watch_every: int = 0
    """Steps between two looks inside the network; 0: never."""
    num_workers: int = 0
    """Processes that load data, for data sets that are not in memory."""
    compile: bool = False
    """Compile the model."""
    data: Literal["digits", "fashion-mnist", "mnist", "cifar10"] = "digits"
    """Data set: digits comes with scikit-learn, the others are read from data_root."""
    data_root: str | None = None
    """Directory in torchvision's layout (FashionMNIST/raw, MNIST/raw, cifar-10-batches-py)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"batch_size": 1, "accumulate": 1, "decay_steps": 1, "patience": 0, "warmup_steps": 0})
        require_at_least(self, {"mixup": 0, "sam": 0, "clip_norm": 0, "watch_every": 0, "num_workers": 0, "shift": 0})
        require_at_least(self, {"lr": 0, "weight_decay": 0, "label_smoothing": 0, "average_decay": 0, "width": 8})
        require_at_most(self, {"label_smoothing": 1, "average_decay": 1})
        refuse_unread(
            self,
            {
                "average_decay": self.average != "ema" and f"average is {self.average}; use average ema",
                "average_start": self.average == "none" and "nothing is averaged; set average",
                "decay_steps": self.schedule == "constant" and "the schedule is constant; use cosine or one_cycle",
                "patience": not self.validate_every and "the only validation is the last; set validate_every",
            },
        )
        if self.width % 8:
            raise ConfigError(f"width: {self.width}; the network normalises groups of channels, give a multiple of 8")


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {
        "data": "fashion-mnist", "steps": 4700, "batch_size": 128, "validate_every": 470, "checkpoint_every": 470,
        "log_every": 47, "flip": True, "threads": None,
    },
}  # fmt: skip


@dataclass
class ClassificationState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    optimizer: Optimizer
    average: AveragedModel | None
    batches: Batches
    confusion: ConfusionMatrix
    metrics: MetricLogger
    stale: int = 0
    """Validations since the best."""
    step: int = 0
    """Optimizer updates done."""


def train(
    fabric: Fabric,
    config: ClassificationConfig,
    *,
    model: nn.Module,
    train_data: Any,
    val_data: Any,
    num_classes: int,
    loss: Loss | None = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
    val_metrics: MetricCollection | None = None,
) -> ClassificationState:
    """Train ``model(inputs) -> logits [B, K]`` on (input, label) pairs, or on an iterable of batches of them.

    ``loss`` is cross-entropy by default; ``optimizer`` makes an optimizer from parameters, and is for example a class.
    ``val_data`` is map-style; ``val_metrics`` get its logits and labels, beside the scores that are always there.
    """
    config, schedule = with_run_dir(fabric, config), learning_rate(config)
    require_map_style("val_data", val_data)
    own = optimizer is not None and "the optimizer is your own; set it there"
    refuse_unread(config, {"label_smoothing": loss is not None and "the loss is your own; smooth its targets there"})
    refuse_unread(config, {"optimizer": own, "weight_decay": own})
    loss = loss or partial(cross_entropy, label_smoothing=config.label_smoothing)
    if config.compile:
        model.compile()
    require_trainable("model", model)
    model = fabric.setup_module(model)
    make_optimizer = optimizer or default_optimizer(config)
    state = ClassificationState(
        model=model,
        optimizer=cast("Optimizer", fabric.setup_optimizers(make_optimizer(model.parameters()))),
        average=weight_average(config, model),
        batches=Batches(
            fabric, train_data, batch_size=config.batch_size, seed=config.seed, num_workers=config.num_workers
        ),
        confusion=ConfusionMatrix(num_classes, fabric),
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/accuracy", "val/loss"],
            layout={"accuracy": ["train/accuracy", "val/accuracy"], "loss": ["train/loss$", "val/loss$"]},
        ),
    )
    watch = Watch(model, every=config.watch_every)

    with (
        Checkpointer(
            fabric, config, best=config.best, mode=config.best_mode, steps_fixed=reads_steps(config)
        ) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps and not out_of_patience(config, state):
            rng = seed_step(config.seed, state.step, fabric)
            schedules.set_learning_rate(state.optimizer, schedule, state.step)
            watch.begin(state.step + 1)

            # Gradient of the loss, averaged over the parts of the batch and over processes.
            inputs, labels = next(state.batches)
            inputs, targets = augment(fabric, config, inputs, labels, num_classes, rng.shared)
            losses, logits = backward(fabric, state, loss, inputs, targets, config.accumulate)
            if config.sam:
                # The gradient that counts is that of the worst weights nearby (Foret et al. 2021, eq. 2 and 3).
                with sam_ascent(model.parameters(), config.sam):
                    backward(fabric, state, loss, inputs, targets, config.accumulate)
            if config.clip_norm:
                fabric.clip_gradients(model, state.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
            state.optimizer.step()
            if state.average is not None:
                if state.step <= config.average_start:
                    state.average.n_averaged.zero_()  # until then the average is the model itself
                state.average.update_parameters(unwrap(model))

            state.step += 1
            watch.end(state.metrics)
            state.confusion.update(logits, labels)
            state.metrics.update(losses)
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                known = {"lr": schedule(state.step - 1), **state.confusion.flush("train/")}
                progress.report(state.step, state.metrics.flush(state.step, known))
            validation: dict[str, float] = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation, counts = evaluate(fabric, state, val_data, loss, "val/", val_metrics)
                if config.best not in validation:
                    raise ConfigError(f"best: {config.best!r} is not a score; there are {', '.join(validation)}")
                state.stale = 0 if checkpointer.is_best(validation) else state.stale + 1
                for tag, matrix in (("train/confusion", state.confusion.latest), ("val/confusion", counts)):
                    state.metrics.image(state.step, tag, matrix_picture(matrix))
                progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation) or out_of_patience(config, state):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def backward(
    fabric: Fabric, state: ClassificationState, loss: Loss, inputs: Tensor, targets: Tensor, parts: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Leave the batch's mean gradient in the model; return the mean losses by tag and the logits ``[B, K]``."""
    state.optimizer.zero_grad()
    if parts == 1:
        logits = state.model(inputs)
        losses = loss_by_tag(loss(logits, targets), "train/")
        fabric.backward(losses["train/loss"])
    else:
        losses, logits = accumulate(fabric, state, loss, inputs, targets, parts)
    mean_gradients_(fabric, state.model)
    return losses, logits.detach()


def accumulate(
    fabric: Fabric, state: ClassificationState, loss: Loss, inputs: Tensor, targets: Tensor, parts: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The same for a batch cut into parts, with a backward pass for each."""
    losses: dict[str, Tensor] = {}
    logits = []
    for part, part_targets in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        logits.append(state.model(part))
        weight = len(part) / len(inputs)  # the last part may be smaller
        named = loss_by_tag(loss(logits[-1], part_targets), "train/")
        fabric.backward(named["train/loss"] * weight)
        losses = {tag: losses.get(tag, 0) + value.detach() * weight for tag, value in named.items()}
    return losses, torch.cat(logits)


def loss_by_tag(value: Tensor | Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The loss under its tag, and beside a sum of several losses each of them."""
    if isinstance(value, Tensor):
        return {f"{prefix}loss": value}
    total = torch.stack(list(value.values())).sum()
    return {f"{prefix}loss": total, **{f"{prefix}loss/{name}": part for name, part in value.items()}}


def augment(
    fabric: Fabric, config: ClassificationConfig, inputs: Tensor, labels: Tensor, num_classes: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs shifted, mirrored and mixed, with their targets."""
    if inputs.dim() == 4 and (config.shift or config.flip):
        inputs = shift_and_flip(fabric, inputs, shift=config.shift, flip=config.flip, background=-1.0, generator=rng)
    if config.mixup:
        return mixup(inputs, labels, num_classes, alpha=config.mixup, generator=rng)
    return inputs, labels


def default_optimizer(config: ClassificationConfig) -> Callable[[Any], Optimizer]:
    """The optimizer that the config names."""
    if config.optimizer == "sgd":
        return lambda parameters: SGD(parameters, config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return lambda parameters: AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def learning_rate(config: ClassificationConfig) -> schedules.Schedule:
    """The learning rate that the config names, as a function of the step."""
    steps = config.decay_steps or config.steps
    return schedules.named(config.schedule, config.lr, steps, warmup_steps=config.warmup_steps)


def reads_steps(config: ClassificationConfig) -> bool:
    """Whether a schedule depends on the run's length."""
    return config.decay_steps is None and config.schedule != "constant"


def weight_average(config: ClassificationConfig, model: nn.Module) -> AveragedModel | None:
    """The average of the weights that the config names; buffers are the model's own."""
    if config.average == "none":
        return None
    if next(model.parameters()).dtype is torch.bfloat16:
        raise ConfigError("average: bf16-true rounds its small updates away; use --precision bf16-mixed, or none")
    if is_sharded(unwrap(model)):
        raise ConfigError("average: fsdp leaves no process with the weights to average; use --strategy ddp, or none")
    function = get_swa_multi_avg_fn() if config.average == "swa" else get_ema_multi_avg_fn(config.average_decay)
    return AveragedModel(unwrap(model), multi_avg_fn=function)


def evaluate(
    fabric: Fabric,
    state: ClassificationState,
    data: Any,
    loss: Loss,
    prefix: str,
    metrics: MetricCollection | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Scores of the model, or its average, over every sample of ``data`` once, and the confusion counts ``[K, K]``."""
    model: Any = state.model
    if state.average is not None:
        model = Bare(state.average.module, fabric.strategy.precision)
    confusion, sums = ConfusionMatrix(state.confusion.num_classes, fabric), MetricLogger(fabric, None)
    metrics = MetricCollection({}) if metrics is None else metrics.to(fabric.device)
    with evaluating(state.model if state.average is None else state.average):
        for inputs, labels in evaluation_batches(fabric, data, batch_size=500 * fabric.world_size):
            logits = model(inputs)
            confusion.update(logits, labels)
            sums.update(loss_by_tag(loss(logits, labels), prefix), weight=len(labels))
            metrics.update(logits, labels)
    result = confusion.compute()
    scores = {**sums.means(), **result.scores(prefix)}
    scores |= {f"{prefix}{name}": value for name, value in computed(metrics).items()}
    return scores, result.counts


def out_of_patience(config: ClassificationConfig, state: ClassificationState) -> bool:
    """Whether too many validations have brought nothing better."""
    return 0 < config.patience <= state.stale


def main(config: ClassificationConfig) -> str:
    """Train on a real data set, test the best checkpoint once, and print what came out."""
    fabric = launch(config)
    train_data, val_data, test_data = load_data(config)
    config = with_run_dir(fabric, config)
    torch.manual_seed(config.seed)
    channels, size = train_data.images.shape[1], train_data.images.shape[2]
    model = ConvClassifier(channels, size, train_data.num_classes, config.width)
    started = time.perf_counter()
    state = train(
        fabric,
        config,
        model=model,
        train_data=train_data.dataset(),
        val_data=val_data.dataset(),
        num_classes=train_data.num_classes,
    )
    if state.step == config.steps or out_of_patience(config, state):
        summary(fabric, config, state, test_data, time.perf_counter() - started)
    return str(config.run_dir)


def load_data(config: ClassificationConfig) -> tuple[Images, Images, Images]:
    """Parts to train on, to validate on, and to test on; of digits a fixed fifth is the test."""
    data = load_images(config.data, config.data_root)
    if config.data == "digits":
        data, test = split(data, 0.2)
    else:
        test = load_images(config.data, config.data_root, train=False)
    train_part, val = split(data, 0.1, seed=1)
    return train_part, val, test


def summary(
    fabric: Fabric,
    config: ClassificationConfig,
    state: ClassificationState,
    test_data: Images,
    seconds: float,
) -> None:
    """Test the best checkpoint and print the result, where the run is, and how to look at it."""
    run_dir = Path(str(config.run_dir))
    steps = state.step - state.metrics.resumed_from
    # A run that was stopped in its test has its steps, and not yet its scores.
    if steps == 0 and (state.step == 0 or is_logged(run_dir, state.step, "test/accuracy")):
        if fabric.global_rank == 0:
            print(complete_already(config, state.step, steps_fixed=reads_steps(config)))
        return
    load_weights_(unwrap(state.average or state.model), load_module(run_dir, "average" if state.average else "model"))
    scores, _ = evaluate(fabric, state, test_data.dataset(), cross_entropy, "test/")
    state.metrics.record(state.step, scores)
    if fabric.global_rank == 0:
        best = read_best(run_dir) or {config.best: float("nan")}
        print(
            f"\ntest accuracy {scores['test/accuracy']:.2%}   F1 {scores['test/f1']:.4f}   "
            f"loss {scores['test/loss']:.4f}   (best checkpoint by {config.best}: {best[config.best]:.4f})\n"
            f"{steps * config.batch_size / seconds:,.0f} images/s   {seconds:.1f} s\n"
            f"run: {run_dir}\n"
            f"look: tensorboard --logdir {run_dir}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(command_line(ClassificationConfig, main, presets=PRESETS, description=__doc__))
