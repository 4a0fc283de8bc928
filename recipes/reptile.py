"""Reptile: initial parameters that move to where training on a task leads (Nichol et al. 2018, algorithms 1 and 2).

    python -m recipes.reptile                                                 # sinusoids
    python -m recipes.reptile --preset sinusoid-paper
    python -m recipes.reptile --preset omniglot-5way-1shot --data_root DIR

An inner loop trains on minibatches of each task's samples; the outer loop moves the initial parameters towards the
mean of where the tasks end. Nothing is differentiated through the inner loop. Nothing is compiled.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.evaluation import evaluating
from lightning_custom.few_shot import (
    Family,
    Learner,
    Predict,
    Sampler,
    Statistics,
    about_ten,
    as_leaves,
    at_once,
    draw_tasks,
    few_shot_network,
    held_out_scores,
    inner_product,
    load_tasks,
    mean_over_tasks,
    meta_batches,
    one_after_another,
    own_copies,
    print_test,
    query_outputs,
    require_a_task_each,
    require_share,
    score_lines,
    trainable,
    wave_picture,
    with_parameters,
)
from lightning_custom.inner_optimizers import InnerOptimizer, Memory, adam, sgd
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, hash_seed, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.precision import Bare, bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import config_of_run
from lightning_custom.schedules import Constant, Linear, set_learning_rate
from lightning_custom.task_batching import TaskLoss, TaskModel, per_task
from lightning_custom.task_norm import require_safe_norms
from lightning_custom.tasks import Sinusoids, minibatch_order

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [K, ...], targets [K, ...]) -> mean`` over the samples of one task."""

INNER_OPTIMIZERS: dict[str, InnerOptimizer] = {"sgd": sgd, "adam": partial(adam, betas=(0.0, 0.999))}


@dataclass(frozen=True, kw_only=True)
class ReptileConfig(RunConfig):
    """Settings of the loops, and of the tasks and network that the command line builds."""

    steps: int = 10000
    """Outer updates; the outer step size reads it."""
    log_every: int = 100
    """Steps between two rows of metrics."""
    validate_every: int = 1000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    meta_batch_size: int = 25
    """Tasks of an outer update, over all processes."""
    lr: float = 1.0
    """Outer step size: the share of the way to the mean of the tasks' parameters that is gone."""
    anneal: bool = True
    """Let the outer step size fall in a straight line to 0 over the run."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the inner loop; adam is without momentum, and begins anew with each task."""
    inner_lr: float = 0.02
    """Learning rate of the inner loop."""
    inner_steps: int = 5
    """Inner updates while training."""
    inner_batch_size: int = 10
    """Samples of an inner update while training."""
    test_steps: int = 10
    """Inner updates when validating."""
    test_batch_size: int = 10
    """Samples of an inner update when validating."""
    batch_statistics: Statistics = "query"
    """Samples whose statistics normalise the query set, in networks with batch normalisation."""
    task_batching: Literal["vmap", "loop"] = "vmap"
    """Tasks at once, or one after another."""
    tasks_at_once: int = 0
    """Most tasks that are computed at once, to save memory; 0: a process's share of a meta-batch."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for small networks."""
    val_tasks: int = 200
    """Held-out tasks of a validation."""
    test_tasks: int = 600
    """Held-out tasks of the test at the end."""
    data: Family = "sinusoid"
    """Family of tasks: sinusoids are made, omniglot is read from data_root."""
    data_root: str | None = None
    """Directory that holds omniglot-28x28.npz."""
    ways: int = 5
    """Classes of a classification task."""
    train_shots: int = 50
    """Samples of a task in training, for each class if there are classes."""
    shots: int = 10
    """Support samples of a held-out task, likewise."""
    query_shots: int = 10
    """Query samples of a held-out task, likewise."""
    width: int = 40
    """Units or channels of a hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"meta_batch_size": 1, "inner_steps": 1, "test_steps": 1, "lr": 0, "inner_lr": 0})
        require_at_least(self, {"inner_batch_size": 1, "test_batch_size": 1, "val_tasks": 2, "test_tasks": 2})
        require_at_least(
            self, {"tasks_at_once": 0, "ways": 2, "train_shots": 2, "shots": 1, "query_shots": 1, "width": 1}
        )


OMNIGLOT: dict[str, Any] = {
    "data": "omniglot", "width": 64, "threads": None, "meta_batch_size": 5, "inner_optimizer": "adam",
    "train_shots": 10, "query_shots": 1, "test_steps": 50, "batch_statistics": "both", "val_tasks": 100,
    "tasks_at_once": 100,
}  # fmt: skip
FIVE_WAY = OMNIGLOT | {
    "ways": 5, "steps": 100000, "inner_lr": 0.001, "inner_steps": 5, "inner_batch_size": 10, "test_batch_size": 5,
}  # fmt: skip
TWENTY_WAY = OMNIGLOT | {
    "ways": 20, "steps": 200000, "inner_lr": 0.0005, "inner_steps": 10, "inner_batch_size": 20, "test_batch_size": 10,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "sinusoid": {},
    "sinusoid-paper": {
        "steps": 30000, "meta_batch_size": 1, "lr": 0.1, "test_steps": 32, "width": 64, "validate_every": 5000,
        "tasks_at_once": 100,
    },
    "omniglot-5way-1shot": FIVE_WAY | {"shots": 1},
    "omniglot-5way-5shot": FIVE_WAY | {"shots": 5},
    "omniglot-20way-1shot": TWENTY_WAY | {"shots": 1},
    "omniglot-20way-5shot": TWENTY_WAY | {"shots": 5},
}  # fmt: skip


@dataclass
class ReptileState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    optimizer: Optimizer
    batches: Batches | None
    metrics: MetricLogger
    step: int = 0
    """Outer updates done."""


def train(
    fabric: Fabric,
    config: ReptileConfig,
    *,
    model: nn.Module,
    tasks: Any,
    val_tasks: Sampler | None = None,
    loss: Loss | None = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
) -> ReptileState:
    """Train the initial parameters of ``model(inputs [K, ...]) -> outputs [K, ...]`` on tasks.

    ``tasks`` is a sampler, or an iterable of meta-batches, of each process its own (``meta_batch_size`` over all); a
    task's support and query samples are trained on alike. ``val_tasks`` samples held-out tasks; without it they come
    from ``tasks``, with numbers of their own. ``loss`` is cross-entropy where targets are integers and mean squared
    error elsewhere. ``optimizer`` makes from parameters another outer one than SGD, run at the config's rate: it gets
    the way back from where the tasks end as if it were a gradient.
    """
    config, losses = with_run_dir(fabric, config), per_task(loss)
    require_a_task_each(fabric, config.meta_batch_size)
    require_safe_norms(model)
    schedule = Linear(config.lr, 0.0, config.steps) if config.anneal and config.steps else Constant(config.lr)
    require_trainable("model", model)
    model = fabric.setup_module(model)
    state = ReptileState(
        model=model,
        optimizer=cast("Optimizer", fabric.setup_optimizers((optimizer or SGD)(model.parameters()))),
        batches=None,
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/loss"],
            layout={
                "held-out tasks": ["val/(loss|accuracy)$"],
                "after each inner step": ["val/loss_after/"],
                "training": ["loss/(first|last)"],
            },
        ),
    )
    if not callable(tasks):
        state.batches = meta_batches(fabric, tasks, meta_batch_size=config.meta_batch_size, seed=config.seed)
    initial, task_model = trainable(model), over_tasks(fabric, config, model)
    # mean_gradients_ divides the sum over processes by their number.
    weight = fabric.world_size / config.meta_batch_size

    with (
        Checkpointer(fabric, config, best="val/loss", steps_fixed=config.anneal) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            set_learning_rate(state.optimizer, schedule, state.step)

            # The tasks of this step, and the order of their samples, are the same for any number of processes.
            share: Sequence[Tensor]
            if state.batches is None:
                share = [take_share(part, fabric) for part in draw_tasks(tasks, config.meta_batch_size, rng.shared)]
            else:
                share = require_share(fabric, next(state.batches), config.meta_batch_size)
            inputs, targets = torch.cat([share[0], share[2]], 1), torch.cat([share[1], share[3]], 1)
            order = take_share(train_order(config, inputs.shape[1], rng.shared), fabric)

            state.optimizer.zero_grad()
            found = []
            samples = (inputs, targets, order[: len(inputs)])
            for part in one_after_another(samples, all_at_once=task_model.together, largest=config.tasks_at_once):
                # Inner loop: some steps of an optimizer on minibatches. The way back from its end is the gradient.
                way_back, values = displacement(task_model, config, losses, *part)
                fabric.backward(weight * inner_product(initial, way_back))
                found.append(values)
            mean_gradients_(fabric, model)
            state.optimizer.step()

            state.step += 1
            state.metrics.update(mean_over_tasks(found, len(inputs)), weight=len(inputs))
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                progress.report(state.step, state.metrics.flush(state.step, {"lr": schedule(state.step - 1)}))
            validation = {}
            if due(state.step, config.validate_every, last=config.steps):
                held_out = val_tasks or (tasks if callable(tasks) else None)
                if held_out is not None:
                    validation = validate(fabric, config, state, losses, held_out)
                    progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def displacement(
    model: TaskModel, config: ReptileConfig, loss: TaskLoss, inputs: Tensor, targets: Tensor, order: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """From where the inner loop ends back to where it began, summed over tasks; and by tag the sums for the log."""
    losses = []
    for step in inner_loop(model, config, loss, inputs, targets, order):
        adapted, of_batch = step
        losses.append(of_batch.sum())
    way_back = {name: (part.detach() - adapted[name]).sum(0) for name, part in trainable(model.module).items()}
    return way_back, {"loss/first": losses[1], "loss/last": losses[-1]}


def inner_loop(
    model: TaskModel, config: ReptileConfig, loss: TaskLoss, inputs: Tensor, targets: Tensor, order: Tensor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Each task's parameters ``[T, ...]`` before the first update, and after each with the losses ``[T]`` behind it.

    ``inputs`` and ``targets`` are the tasks' samples ``[T, K, ...]``; ``order [T, steps, B]`` says which of them an
    update sees.
    """
    adapted, memory = own_copies(trainable(model.module), len(inputs)), Memory()
    optimizer = INNER_OPTIMIZERS[config.inner_optimizer]
    task = torch.arange(len(inputs), device=inputs.device).unsqueeze(1)
    yield adapted, inputs.new_zeros(len(inputs))
    for samples in order.unbind(1):
        leaves = as_leaves(adapted)
        with torch.enable_grad():
            losses = loss(model(inputs[task, samples], leaves), targets[task, samples])
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
        with torch.no_grad():
            adapted, memory = optimizer(adapted, gradients, config.inner_lr, memory)
        yield adapted, losses.detach()


def train_order(config: ReptileConfig, samples: int, generator: torch.Generator) -> Tensor:
    """Which samples each inner update of training sees, ``[T, steps, B]``."""
    sizes = {"steps": config.inner_steps, "batch_size": config.inner_batch_size}
    return minibatch_order(config.meta_batch_size, samples, **sizes, generator=generator)


def test_order(config: ReptileConfig, samples: int, steps: int) -> Tensor:
    """Which samples each inner update sees when validating, ``[1, steps, B]``: always the same, for every task."""
    generator = torch.Generator().manual_seed(hash_seed("held-out minibatches"))
    return minibatch_order(1, samples, steps=steps, batch_size=config.test_batch_size, generator=generator)


def over_tasks(fabric: Fabric, config: ReptileConfig, model: nn.Module) -> TaskModel:
    """The model for several tasks, at once or one after another."""
    return TaskModel(bare(fabric, model), together=config.task_batching == "vmap")


def learner(config: ReptileConfig, model: TaskModel, loss: TaskLoss) -> Learner:
    """What the model predicts along its inner loop."""

    def along(inputs: Tensor, targets: Tensor) -> Iterator[Predict]:
        order = test_order(config, inputs.shape[1], config.test_steps).to(inputs.device)
        for adapted, _ in inner_loop(model, config, loss, inputs, targets, order.expand(len(inputs), -1, -1)):
            yield partial(query_outputs, model, adapted, inputs, statistics=config.batch_statistics)

    return along


def evaluate(
    fabric: Fabric, config: ReptileConfig, model: nn.Module, loss: TaskLoss, tasks: Sampler, number: int, name: str
) -> dict[str, float]:
    """Scores on ``number`` held-out tasks along ``test_steps`` updates of the inner loop."""
    task_model = over_tasks(fabric, config, model)
    largest = at_once(fabric, config.tasks_at_once, config.meta_batch_size)
    with evaluating(model):
        return held_out_scores(
            fabric, learner(config, task_model, loss), tasks, number, loss, name,
            all_at_once=task_model.together, largest=largest, after=about_ten(config.test_steps),
        )  # fmt: skip


def validate(
    fabric: Fabric, config: ReptileConfig, state: ReptileState, loss: TaskLoss, tasks: Sampler
) -> dict[str, float]:
    """Scores on held-out tasks, and for sinusoids a picture of what is learned of four."""
    if isinstance(tasks, Sinusoids):
        along = learner(config, over_tasks(fabric, config, state.model), loss)
        with evaluating(state.model):
            picture = wave_picture(fabric, {"Reptile": (along, (0, 1, config.test_steps))}, tasks)
        state.metrics.image(state.step, "adaptation", picture)
    return evaluate(fabric, config, state.model, loss, tasks, config.val_tasks, "val")


def adapt(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    *,
    config: ReptileConfig,
    steps: int | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of ``model`` that has learned one task: inputs ``[K, ...]`` and targets ``[K, ...]`` of its support set.

    ``model`` may be the state's, and is left as it is. ``steps`` is the config's ``test_steps`` by default. With
    :func:`load`:

        model, settings = load("runs/reptile/first")
        adapted = adapt(model, (inputs, targets), **settings)
    """
    model = unwrap(model)
    task_model = TaskModel(Bare(model, Precision()), together=False)
    inputs, targets = (part.unsqueeze(0) for part in support)
    order = test_order(config, inputs.shape[1], config.test_steps if steps is None else steps).to(inputs.device)
    *_, (adapted, _) = inner_loop(task_model, config, per_task(loss), inputs, targets, order)
    return with_parameters(model, adapted)


def load(run_dir: str, *, which: Literal["best", "last"] = "best") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run of the command line, from its best or last checkpoint, and settings for :func:`adapt`."""
    config = config_of_run(ReptileConfig, run_dir)
    model = network(config)
    model.load_state_dict(load_module(run_dir, "model", which=which))
    return model, {"config": config}


def network(config: ReptileConfig) -> nn.Module:
    """The network that the config names."""
    return few_shot_network(config.data, ways=config.ways, width=config.width, seed=config.seed)


def main(config: ReptileConfig) -> str:
    """Train, test the best checkpoint on held-out tasks, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    load_parts = partial(load_tasks, config.data, config.data_root, ways=config.ways)
    tasks = load_parts(shots=1, query_shots=config.train_shots - 1).train
    held_out = load_parts(shots=config.shots, query_shots=config.query_shots)
    started = time.perf_counter()
    state = train(fabric, config, model=network(config), tasks=tasks, val_tasks=held_out.val)
    if state.step == config.steps:
        summary(fabric, config, state, held_out.test, time.perf_counter() - started)
    return str(config.run_dir)


def summary(fabric: Fabric, config: ReptileConfig, state: ReptileState, tasks: Sampler, seconds: float) -> None:
    """Test the best checkpoint on held-out tasks and print the result, where the run is, and how to look at it."""
    unwrap(state.model).load_state_dict(load_module(str(config.run_dir), "model"))
    scores = evaluate(fabric, config, state.model, per_task(None), tasks, config.test_tasks, "test")
    print_test(fabric, config, score_lines("Reptile", scores), seconds)


if __name__ == "__main__":
    sys.exit(command_line(ReptileConfig, main, presets=PRESETS, description=__doc__))
