"""Several losses on one trunk: weightings of the losses, or aggregators of the gradients, of 21 papers.

    python -m recipes.multitask                                          # two overlaid digits, under a minute
    python -m recipes.multitask --method equal                           # the baseline, hard to beat
    python -m recipes.multitask --method mgda --gradients features
    python -m recipes.multitask --only left                              # one task alone
    python -m recipes.multitask --preset multi-fashion --data_root DIR

The default is MultiMNIST's protocol (Sabour et al. 2017; Sener and Koltun 2018) with scikit-learn's digits: say which
digit lies top left and which bottom right. Nothing here compiles: an aggregator goes through the trunk's graph more
than once.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset
from torchmetrics import Metric, MetricCollection

from lightning_custom import schedules
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, read_config, refuse_unread, require_at_least, with_run_dir
from lightning_custom.data import Batches, require_map_style
from lightning_custom.datasets import Images, load_images, overlaid, split
from lightning_custom.distributed import mean_gradients_
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import computed, evaluating
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger, is_logged
from lightning_custom.multitask.aggregator import Aggregator, GramAggregator
from lightning_custom.multitask.batches import Sampling, TaskBatches
from lightning_custom.multitask.conflict import conflict
from lightning_custom.multitask.gram import gram_matrix, tasks_named
from lightning_custom.multitask.jacobian import (
    Cut,
    aggregate_present,
    feature_gram,
    last_layer_norms,
    mean_rows_,
    overflowed,
    remember_,
    set_gradient_,
    task_gradients,
    weighted_backward,
    weights_of_present,
)
from lightning_custom.multitask.methods import Method, make_method
from lightning_custom.multitask.task_data import batches_once, passes_of, require_tasks
from lightning_custom.multitask.task_losses import Loss, TaskScores, task_losses, update_metric
from lightning_custom.multitask.weighting import Weighting
from lightning_custom.networks import LeNetTrunk, mlp_head
from lightning_custom.pictures import cosine_picture
from lightning_custom.precision import bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import complete_already
from lightning_custom.state import Stateful


@dataclass(frozen=True, kw_only=True)
class MultitaskConfig(RunConfig):
    """Settings of the loop, and of the data and networks that the command line builds."""

    steps: int = 1500
    """Optimizer updates."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    validate_every: int = 150
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 150
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    best: str = "val/loss"
    """Score by which the best checkpoint is chosen."""
    best_mode: Literal["auto", "min", "max"] = "auto"
    """Whether the best score is the smallest or the largest; auto: by its name."""
    method: Method = "upgrad"
    """Weighting of the losses, or aggregator of the gradients."""
    method_options: dict[str, Any] | None = None
    """Settings of the method, such as {c: 0.5} for cagrad."""
    gradients: Literal["exact", "features"] = "exact"
    """What an aggregator sees: each task's gradient by the trunk's parameters, or by the shared features."""
    aggregate_every: int = 1
    """Steps that an aggregator's weights serve for."""
    batched_backward: bool | Literal["auto"] = "auto"
    """Go through the trunk's graph for all tasks at once (torch.vmap); auto: one after another, with less memory."""
    baselines: dict[str, float] | str | None = None
    """Accuracy (or error) of each task alone, or a YAML file of them: Delta-m at validation compares with these."""
    only: str | None = None
    """Train this task alone."""
    batch_size: int = 64
    """Samples of an update, over all processes; of each task where tasks have data sets of their own."""
    sampling: Sampling = "cycle"
    """Which tasks a step has where each has a data set of its own."""
    temperature: float = 1.0
    """Of sampling by temperature."""
    ratios: dict[str, float] | None = None
    """Of sampling by ratios, by task."""
    lr: float = 3e-3
    """Highest learning rate (AdamW)."""
    head_lr: dict[str, float] | None = None
    """Highest learning rates of the heads, by task; of one that is not named: lr."""
    weight_decay: float = 0.01
    """Weight decay of trunk and heads."""
    schedule: Literal["constant", "cosine", "one_cycle"] = "one_cycle"
    """Learning rates over the run."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for small networks."""
    num_workers: int = 0
    """Processes that load data, for data sets that are not in memory."""
    data: Literal["digits", "fashion-mnist", "mnist"] = "digits"
    """Images that are overlaid by pairs: digits comes with scikit-learn, the others are read from data_root."""
    data_root: str | None = None
    """Directory that holds FashionMNIST/raw or MNIST/raw."""
    width: int = 10
    """Channels of the trunk's first layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"batch_size": 1, "aggregate_every": 1, "lr": 0, "weight_decay": 0, "width": 1})
        if self.aggregate_every > 1 and self.sampling not in ("cycle", "shortest"):
            raise ConfigError(f"aggregate_every: {self.aggregate_every} needs all tasks in a step; use sampling cycle")
        sampled = f"sampling is {self.sampling}; use sampling"
        refuse_unread(
            self,
            {
                "temperature": self.sampling != "temperature" and f"{sampled} temperature",
                "ratios": self.sampling != "ratios" and f"{sampled} ratios",
                "batched_backward": self.gradients == "features" and "features need no such pass; use gradients exact",
            },
        )


PRESETS: dict[str, dict[str, Any]] = {
    # Validation accuracy of --only left and --only right, seed 0.
    "digits": {"baselines": {"left": 0.992, "right": 0.980}},
    "multi-fashion": {
        "data": "fashion-mnist", "batch_size": 256, "steps": 4220, "validate_every": 422, "checkpoint_every": 422,
        "log_every": 50, "threads": None,
    },
}  # fmt: skip


@dataclass
class MultitaskState:
    """What changes while training; a checkpoint is exactly these fields."""

    trunk: nn.Module
    heads: dict[str, nn.Module]
    method: Stateful | None
    """What the weighting or aggregator remembers; none where that is nothing."""
    weights: Tensor
    """``[T]``: the aggregator's last."""
    optimizer: Optimizer
    batches: Batches | TaskBatches
    scores: TaskScores
    metrics: MetricLogger
    step: int = 0
    """Optimizer updates done."""


class Passes(NamedTuple):
    """What a step's forward passes leave, by task."""

    outputs: dict[str, Any]
    targets: dict[str, Any]
    cuts: dict[str, Cut]
    """Between trunk and head; none where the graph is whole."""


def train(
    fabric: Fabric,
    config: MultitaskConfig,
    *,
    trunk: nn.Module,
    heads: Mapping[str, nn.Module],
    data: Any,
    losses: Mapping[str, Loss],
    metrics: Mapping[str, Metric | MetricCollection] | None = None,
    val_data: Any = None,
    method: Weighting | Aggregator | None = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
    rates: Mapping[int | str, schedules.Schedule] | None = None,
) -> MultitaskState:
    """Train ``trunk(inputs) -> features`` and one of ``heads(features) -> outputs`` a task.

    ``data`` and ``val_data`` are one data set of (inputs, targets), whose targets are a mapping by task or ``[T]`` in
    the order of ``heads``; or by task a data set of (inputs, target) each. ``losses``, and how labels are missing, are
    described in :mod:`lightning_custom.multitask.task_losses`; ``metrics`` get outputs and targets at validation.
    ``method`` is one of your own in place of the config's, ``optimizer`` makes one from parameter groups named trunk,
    by the tasks, and weighting; ``rates`` are learning rates by these names in place of the config's.
    """
    config, tasks = with_run_dir(fabric, config), tuple(heads)
    require_tasks(tasks, losses=losses, metrics=metrics, data=data, val_data=val_data)
    if val_data is not None:
        for part in val_data.values() if isinstance(val_data, Mapping) else [val_data]:
            require_map_style("val_data", part)
    losses = {task: losses[task] for task in tasks}
    refuse_unread(config, {"method_options": method is not None and "the method is your own; set them there"})
    refuse_unread(config, {"weight_decay": optimizer is not None and "the optimizer is your own; set it there"})
    method = method or make_method(config.method, tasks, config.method_options)
    if isinstance(method, Weighting):
        if method.tasks != tasks:
            others = ", ".join(method.tasks)
            raise ConfigError(f"method: of tasks {others}; give those of the heads in their order: {', '.join(tasks)}")
        method.to(fabric.device, torch.float32 if fabric.device.type == "mps" else None)
    require_trainable("trunk and heads", trunk, *heads.values())
    trunk = fabric.setup_module(trunk)
    modules: dict[str, nn.Module] = {task: fabric.setup_module(head) for task, head in heads.items()}
    shared = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    require_possible(config, method, shared)
    groups = parameter_groups(config, trunk, modules, method)
    make_optimizer = optimizer or (lambda groups: AdamW(groups, weight_decay=config.weight_decay, fused=True))
    state = MultitaskState(
        trunk=trunk,
        heads=modules,
        method=method if isinstance(method, Stateful) else None,
        weights=torch.ones(len(tasks), dtype=torch.float64),
        optimizer=cast("Optimizer", fabric.setup_optimizers(make_optimizer(groups))),
        batches=make_batches(fabric, config, data),
        scores=TaskScores(fabric, tasks),
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=[config.best],
            layout={
                "scores": ["val/accuracy/", "val/error/", "val/delta_m"],
                "losses": ["train/loss/", "val/loss/"],
                "weights": ["weight/"],
                "conflict": ["conflict/cosine_"],
            },
        ),
    )
    rates = learning_rates(config, state.optimizer) | dict(rates or {})
    baselines = read_baselines(config)

    with (
        Checkpointer(
            fabric, config, best=config.best, mode=config.best_mode, steps_fixed=reads_steps(config)
        ) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            schedules.set_learning_rate(state.optimizer, rates, state.step)
            state.optimizer.zero_grad()

            # The loss of each task: the sum over its labels on all processes, divided by their number.
            batch = next(state.batches)
            passes = forward(fabric, state, batch, cut=not isinstance(method, Weighting))
            found = task_losses(fabric, losses, passes.outputs, passes.targets)

            gram = None
            if isinstance(method, Weighting):
                # Losses: one backward pass of their weighted sum.
                total = method(found.local, found.means, rng.shared, found.present)
                norms = last_layer_norms(fabric, found.local, trunk) if method.needs_norms else None
                fabric.backward(total)
                mean_gradients_(fabric, trunk, *modules.values())
                if norms is not None:
                    method.after_backward(norms)
            else:
                # Gradients: each head's own, and each task's at the features; from there on they are made one.
                fabric.backward(found.local.sum())
                mean_gradients_(fabric, *modules.values())
                with tasks_named(tasks):
                    gram = backward_through_trunk(
                        fabric, config, state, method, passes, found.present, shared, rng.shared
                    )
            state.optimizer.step()
            if isinstance(method, Weighting) and method.needs_losses_after:
                with torch.no_grad():
                    after = forward(fabric, state, batch, cut=False)
                    method.after_update(task_losses(fabric, losses, after.outputs, after.targets).means)

            state.step += 1
            state.scores.update(found, passes.outputs, passes.targets)
            weights = method.weights if isinstance(method, Weighting) else state.weights
            state.metrics.update(
                {"loss": found.means.sum()} | {f"weight/{t}": w for t, w in zip(tasks, weights, strict=True)}
            )
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                if isinstance(method, Weighting):
                    method.check()
                known = state.scores.flush().tags("train/") | show_conflict(state, gram, found.present)
                progress.report(state.step, state.metrics.flush(state.step, known))
            validation: dict[str, float] = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = evaluate(fabric, state, val_data, losses, "val/", metrics, baselines)
                if validation and config.best not in validation:
                    raise ConfigError(f"best: {config.best!r} is not a score; there are {', '.join(validation)}")
                progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def forward(fabric: Fabric, state: MultitaskState, batch: Any, *, cut: bool) -> Passes:
    """The outputs of every task in ``batch``, with the graph whole or cut at the features."""
    trunk, passes = bare(fabric, state.trunk), Passes({}, {}, {})
    for inputs, targets in passes_of(batch, tuple(state.heads)):
        features = trunk(inputs)
        for task, target in targets.items():
            if cut:
                passes.cuts[task] = Cut(features)
            passes.targets[task] = target
            passes.outputs[task] = bare(fabric, state.heads[task])(passes.cuts[task].seen if cut else features)
    return passes


def backward_through_trunk(
    fabric: Fabric,
    config: MultitaskConfig,
    state: MultitaskState,
    aggregator: Aggregator,
    passes: Passes,
    present: Tensor,
    shared: Sequence[nn.Parameter],
    generator: torch.Generator,
) -> Tensor | None:
    """Leave one direction in the trunk; the Gram matrix of the gradients that it was made of, if it was made anew."""
    there, anew = present.tolist(), due(state.step, config.aggregate_every)
    cuts = [passes.cuts[task] for task, is_there in zip(state.heads, there, strict=True) if is_there]
    if not cuts:
        return None
    if anew and config.gradients == "exact":
        # The mean over processes comes before the aggregator: the mean of what each makes of its own is another method.
        rows = task_gradients(fabric, cuts, shared, batched=config.batched_backward is True)
        mean_rows_(fabric, rows)
        if overflowed(fabric, rows):
            set_gradient_(fabric, shared, rows.sum(0))  # not finite: the loss scaler leaves this step out
            return None
        direction, weights = aggregate_present(aggregator, rows, there, generator)
        set_gradient_(fabric, shared, direction)
        remember_(state.weights, weights, there)
        return gram_matrix(rows) if due(state.step + 1, config.log_every, last=config.steps) else None
    gram = feature_gram(fabric, cuts) if anew else None
    if gram is not None and not overflowed(fabric, gram):
        remember_(state.weights, weights_of_present(cast("GramAggregator", aggregator), gram, there, generator), there)
    weighted_backward(cuts, state.weights[there])
    mean_gradients_(fabric, state.trunk)
    return gram


def evaluate(
    fabric: Fabric,
    state: MultitaskState,
    data: Any,
    losses: Mapping[str, Loss],
    prefix: str,
    metrics: Mapping[str, Metric | MetricCollection] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Scores of every task over every sample of ``data`` once, means over tasks, and Delta-m; none without data."""
    if data is None:
        return {}
    scores, losses = TaskScores(fabric, tuple(state.heads)), {task: losses[task] for task in state.heads}
    own = {task: metric.to(fabric.device) for task, metric in (metrics or {}).items()}
    with evaluating(state.trunk, *state.heads.values()):
        for batch in batches_once(fabric, data, batch_size=500 * fabric.world_size):
            passes = forward(fabric, state, batch, cut=False)
            scores.update(task_losses(fabric, losses, *passes[:2]), *passes[:2])
            for task in own.keys() & passes.outputs.keys():
                update_metric(own[task], passes.outputs[task], passes.targets[task])
    found = scores.flush()
    values = found.tags(prefix)
    if baselines is not None:
        values[f"{prefix}delta_m"] = found.delta_m(baselines)
    for task, metric in own.items():
        values |= {f"{prefix}{name}/{task}": value for name, value in computed(metric).items()}
    return values


def show_conflict(state: MultitaskState, gram: Tensor | None, present: Tensor) -> dict[str, float]:
    """How far the gradients of the present tasks pull apart, their cosines as a picture; nothing without them."""
    if gram is None:
        return {}
    tasks = [task for task, there in zip(state.heads, present.tolist(), strict=True) if there]
    found = conflict(gram)
    state.metrics.image(state.step, "conflict/cosines", cosine_picture(found.cosines))
    return found.scores(tasks)


def make_batches(fabric: Fabric, config: MultitaskConfig, data: Any) -> Batches | TaskBatches:
    """Endless batches of one data set, or of one a task."""
    options: dict[str, Any] = {
        "batch_size": config.batch_size, "seed": config.seed, "num_workers": config.num_workers,
    }  # fmt: skip
    if not isinstance(data, Mapping):
        if config.sampling != "cycle":
            raise ConfigError(f"sampling: {config.sampling}, but all tasks share one data set; give one a task")
        return Batches(fabric, data, **options)
    return TaskBatches(
        fabric, data, sampling=config.sampling, temperature=config.temperature, ratios=config.ratios, **options
    )


def parameter_groups(
    config: MultitaskConfig, trunk: nn.Module, heads: Mapping[str, nn.Module], method: Any
) -> list[dict[str, Any]]:
    """Groups named trunk, by the tasks, and weighting, each with its learning rate."""
    head_lr = config.head_lr or {}
    require_tasks(tuple(heads), head_lr={**dict.fromkeys(heads), **head_lr})
    groups: list[dict[str, Any]] = [{"name": "trunk", "params": list(trunk.parameters()), "lr": config.lr}]
    groups += [
        {"name": task, "params": list(head.parameters()), "lr": head_lr.get(task, config.lr)}
        for task, head in heads.items()
    ]
    if isinstance(method, Weighting) and list(method.parameters()):
        groups.append({"name": "weighting", "params": list(method.parameters()), "lr": config.lr, "weight_decay": 0.0})
    owners: dict[int, str] = {}
    for group in groups:
        for parameter in group["params"]:
            if (owner := owners.setdefault(id(parameter), group["name"])) != group["name"]:
                raise ConfigError(
                    f"heads: {group['name']} has a parameter of {owner}; what is shared belongs into the trunk alone"
                )
    return groups


def learning_rates(config: MultitaskConfig, optimizer: Optimizer) -> dict[int | str, schedules.Schedule]:
    """The learning rate of each parameter group by its name (number without one), as a function of the step."""
    shape, groups = schedules.named(config.schedule, 1.0, config.steps), enumerate(optimizer.param_groups)
    return {group.get("name", i): schedules.Scaled(shape, group["lr"]) for i, group in groups}


def reads_steps(config: MultitaskConfig) -> bool:
    """Whether a schedule depends on the run's length."""
    return config.schedule != "constant"


def require_possible(config: MultitaskConfig, method: Any, shared: Sequence[nn.Parameter]) -> None:
    """:class:`ConfigError` for a method that cannot work in this way."""
    if isinstance(method, Weighting):
        for field, plain in (("gradients", "exact"), ("aggregate_every", 1), ("batched_backward", "auto")):
            value = getattr(config, field)
            if value not in (plain, False):
                name = type(method).__name__
                raise ConfigError(f"{field}: {value}, but {name} sees losses and no gradients; leave it out")
        return
    if not shared:
        raise ConfigError("trunk: no parameter to train; without one there is nothing to aggregate, use method equal")
    if not isinstance(method, GramAggregator):
        for field, value, plain in (
            ("gradients", config.gradients, "exact"), ("aggregate_every", config.aggregate_every, 1),
        ):  # fmt: skip
            if value != plain:
                name = type(method).__name__
                raise ConfigError(f"{field}: {value}, but {name} has no weights, only a direction; use {plain}")


def read_baselines(config: MultitaskConfig) -> Mapping[str, float] | None:
    """The score of each task alone, from the config or the file that it names."""
    if not isinstance(config.baselines, str):
        return config.baselines
    return read_config(Path(config.baselines))


def main(config: MultitaskConfig) -> str:
    """Train on overlaid images, test the best checkpoint once, and print what came out."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    train_data, val_data, test_data = load_data(config)
    trunk, heads = networks(config, train_data)
    started = time.perf_counter()
    state = train(
        fabric,
        config,
        trunk=trunk,
        heads=heads,
        data=dataset(config, train_data),
        losses=dict.fromkeys(heads, sample_entropies),
        val_data=dataset(config, val_data),
    )
    if state.step == config.steps:
        summary(fabric, config, state, test_data, time.perf_counter() - started)
    return str(config.run_dir)


TASKS = ("left", "right")


def load_data(config: MultitaskConfig) -> tuple[Images, Images, Images]:
    """Pairs of images to train on, to validate on, and to test on, which share no image."""
    data = load_images(config.data, config.data_root)
    if config.data == "digits":
        # 1,797 images are few: each is in ten pairs, on either side.
        data, test = split(data, 0.2)
        size, often = 12, 10
    else:
        test = load_images(config.data, config.data_root, train=False)
        size, often = 36, 1
    parts = (*split(data, 0.1, seed=1), test)
    train_data, val, test = (overlaid(part, size, count=often * len(part.labels), seed=7) for part in parts)
    return train_data, val, test


def dataset(config: MultitaskConfig, data: Images) -> TensorDataset:
    """(image, labels ``[T]``) of the tasks that the config has."""
    columns = [i for i, task in enumerate(TASKS) if config.only in (None, task)]
    return TensorDataset(data.images, data.labels[:, columns])


def networks(config: MultitaskConfig, data: Images) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The LeNet of Sener and Koltun 2018, cut before the hidden layer of each head, with weights from the seed."""
    if config.only not in (None, *TASKS):
        raise ConfigError(f"only: {config.only!r} is no task; there are {', '.join(TASKS)}")
    torch.manual_seed(config.seed)
    channels, size = data.images.shape[1:3]
    kernel: dict[str, int] = {"kernel": 3, "padding": 1} if size < 28 else {}
    trunk = LeNetTrunk(channels, size, width=config.width, **kernel)
    heads = {task: mlp_head(trunk.features, data.num_classes) for task in TASKS}
    return trunk, {task: head for task, head in heads.items() if config.only in (None, task)}


def sample_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample ``[B]``."""
    return cross_entropy(logits, labels, reduction="none")


def load_best_(config: MultitaskConfig, state: MultitaskState) -> None:
    """Put the best checkpoint's trunk and heads into ``state``."""
    for name, module in (("trunk", state.trunk), *((f"heads.{task}", head) for task, head in state.heads.items())):
        unwrap(module).load_state_dict(load_module(str(config.run_dir), name))


def summary(fabric: Fabric, config: MultitaskConfig, state: MultitaskState, test_data: Images, seconds: float) -> None:
    """Test the best checkpoint and print the result, where the run is, and how to look at it."""
    steps = state.step - state.metrics.resumed_from
    # A run that was stopped in its test has its steps, and not yet its scores.
    if steps == 0 and (state.step == 0 or is_logged(str(config.run_dir), state.step, "test/accuracy")):
        if fabric.global_rank == 0:
            print(complete_already(config, state.step, steps_fixed=reads_steps(config)))
        return
    load_best_(config, state)
    losses = dict.fromkeys(state.heads, sample_entropies)
    scores = evaluate(fabric, state, dataset(config, test_data), losses, "test/")
    state.metrics.record(state.step, scores)
    if fabric.global_rank == 0:
        found = "   ".join(f"{task} {scores[f'test/accuracy/{task}']:.2%}" for task in state.heads)
        print(
            f"\ntest accuracy: {found}   mean {scores['test/accuracy']:.2%}   (best checkpoint by {config.best})\n"
            f"{config.method}   {seconds:.1f} s\n"
            f"run: {config.run_dir}\n"
            f"look: tensorboard --logdir {config.run_dir}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(command_line(MultitaskConfig, main, presets=PRESETS, description=__doc__))
