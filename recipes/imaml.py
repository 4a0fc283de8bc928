"""Implicit MAML: the outer gradient from where the inner loop ends, not from its path (Rajeswaran et al. 2019).

    python -m recipes.imaml                                                   # sinusoids
    python -m recipes.imaml --cg_steps 0                                      # no solve: first order
    python -m recipes.imaml --preset omniglot-5way-1shot --data_root DIR

An inner loop lowers each task's support loss, with a pull towards the initial parameters; at its minimum the implicit
function theorem gives the gradient of the query loss by the initial parameters, which conjugate gradients solve for
(the paper's algorithms 1 and 2). Memory does not grow with the inner steps. Nothing is compiled.
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
from torch.optim import Adam, Optimizer

from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.conjugate_gradients import conjugate_gradients
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.few_shot import (
    Family,
    Learner,
    Predict,
    Sampler,
    Statistics,
    about_ten,
    accuracies,
    are_classes,
    as_leaves,
    at_once,
    draw_tasks,
    few_shot_network,
    held_out_scores,
    inner_product,
    last,
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
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.precision import Bare, bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import config_of_run
from lightning_custom.task_batching import TaskLoss, TaskModel, per_task
from lightning_custom.task_curvature import as_parts, as_vectors, gradient_vectors, hessian_product
from lightning_custom.task_norm import require_safe_norms
from lightning_custom.tasks import Sinusoids

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [K, ...], targets [K, ...]) -> mean`` over the samples of one task."""


@dataclass(frozen=True, kw_only=True)
class IMAMLConfig(RunConfig):
    """Settings of the loops, and of the tasks and network that the command line builds."""

    steps: int = 5000
    """Outer updates."""
    log_every: int = 100
    """Steps between two rows of metrics."""
    validate_every: int = 1000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    meta_batch_size: int = 25
    """Tasks of an outer update, over all processes."""
    lr: float = 1e-3
    """Learning rate of the outer loop (Adam)."""
    inner_lr: float = 0.005
    """Learning rate of the inner loop, gradient descent; halved for a task whose loss a step would raise."""
    inner_steps: int = 20
    """Inner updates while training; memory does not depend on them."""
    test_steps: int = 20
    """Inner updates when validating."""
    proximal: float = 0.5
    """The paper's lambda: half of it times the squared distance from the initial parameters is in the inner loss."""
    cg_steps: int = 5
    """Steps of conjugate gradients, each a product with the Hessian; 0: the gradient where the inner loop ends."""
    cg_damping: float = 20.0
    """Added to lambda in the solve: the larger, the safer and the nearer to first order."""
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
    shots: int = 10
    """Support samples of a task, for each class if there are classes."""
    query_shots: int = 10
    """Query samples, likewise."""
    width: int = 40
    """Units or channels of a hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"meta_batch_size": 1, "inner_steps": 1, "test_steps": 1, "lr": 0, "inner_lr": 0})
        require_at_least(self, {"cg_steps": 0, "cg_damping": 0})
        require_at_least(self, {"val_tasks": 2, "test_tasks": 2, "tasks_at_once": 0})
        require_at_least(self, {"ways": 2, "shots": 1, "query_shots": 1, "width": 1})
        if not self.proximal > 0:
            raise ConfigError(f"proximal: {self.proximal}; give a number above 0: without a pull there is no gradient")


# The authors' command, their damping by two numbers put into one, which the scale of Adam's gradient allows.
OMNIGLOT: dict[str, Any] = {
    "data": "omniglot", "width": 64, "threads": None, "steps": 20000, "log_every": 50, "validate_every": 500,
    "checkpoint_every": 500, "tasks_at_once": 8, "meta_batch_size": 32, "inner_lr": 0.1, "inner_steps": 16,
    "test_steps": 16, "proximal": 2.0, "cg_damping": 22.0,
}  # fmt: skip
TWENTY_WAY = OMNIGLOT | {"ways": 20, "meta_batch_size": 16, "inner_steps": 25, "test_steps": 25}
PRESETS: dict[str, dict[str, Any]] = {
    "sinusoid": {},
    "omniglot-5way-1shot": OMNIGLOT | {"shots": 1, "query_shots": 1},
    "omniglot-5way-5shot": OMNIGLOT | {"shots": 5, "query_shots": 5},
    "omniglot-20way-1shot": TWENTY_WAY | {"shots": 1, "query_shots": 1},
    "omniglot-20way-5shot": TWENTY_WAY | {"shots": 5, "query_shots": 5},
}


@dataclass
class IMAMLState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    optimizer: Optimizer
    batches: Batches | None
    metrics: MetricLogger
    step: int = 0
    """Outer updates done."""


def train(
    fabric: Fabric,
    config: IMAMLConfig,
    *,
    model: nn.Module,
    tasks: Any,
    val_tasks: Sampler | None = None,
    loss: Loss | None = None,
) -> IMAMLState:
    """Train the initial parameters of ``model(inputs [K, ...]) -> outputs [K, ...]`` on tasks.

    ``tasks`` is a sampler, or an iterable of meta-batches, of each process its own (``meta_batch_size`` over all).
    ``val_tasks`` samples held-out tasks; without it they come from ``tasks``, with numbers of their own.
    ``loss`` is cross-entropy where targets are integers and mean squared error elsewhere.
    """
    config, losses = with_run_dir(fabric, config), per_task(loss)
    require_a_task_each(fabric, config.meta_batch_size)
    require_safe_norms(model)
    require_trainable("model", model)
    model = fabric.setup_module(model)
    state = IMAMLState(
        model=model,
        optimizer=cast("Optimizer", fabric.setup_optimizers(Adam(model.parameters(), config.lr, fused=True))),
        batches=None,
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/loss"],
            layout={
                "held-out tasks": ["val/(loss|accuracy)$"],
                "after each inner step": ["val/loss_after/"],
                "training": ["loss/query"],
            },
        ),
    )
    if not callable(tasks):
        state.batches = meta_batches(fabric, tasks, meta_batch_size=config.meta_batch_size, seed=config.seed)
    initial, task_model = trainable(model), over_tasks(fabric, config, model)
    # mean_gradients_ divides the sum over processes by their number.
    weight = fabric.world_size / config.meta_batch_size

    with (
        Checkpointer(fabric, config, best="val/loss") as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # The tasks of this step are the same for any number of processes, each of which takes its share.
            share: Sequence[Tensor]
            if state.batches is None:
                share = [take_share(part, fabric) for part in draw_tasks(tasks, config.meta_batch_size, rng.shared)]
            else:
                share = require_share(fabric, next(state.batches), config.meta_batch_size)

            state.optimizer.zero_grad()
            found = []
            for part in one_after_another(share, all_at_once=task_model.together, largest=config.tasks_at_once):
                # Inner loop: to the minimum of the support loss and the pull. Outer gradient: by that minimum alone.
                adapted = inner_loop(task_model, config, losses, *part[:2], steps=config.inner_steps)
                gradient, values = implicit_gradient(task_model, config, losses, last(adapted), *part)
                fabric.backward(weight * inner_product(initial, gradient))
                found.append(values)
            mean_gradients_(fabric, model)
            state.optimizer.step()

            state.step += 1
            state.metrics.update(mean_over_tasks(found, len(share[0])), weight=len(share[0]))
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                progress.report(state.step, state.metrics.flush(state.step))
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


def inner_loop(
    model: TaskModel, config: IMAMLConfig, loss: TaskLoss, inputs: Tensor, targets: Tensor, *, steps: int
) -> Iterator[dict[str, Tensor]]:
    """Each task's parameters ``[T, ...]`` before the first gradient step on its support set, and after each.

    What is lowered is the loss of the support set ``[T, K, ...]`` and the pull, ``lambda / 2 |adapted - initial|^2``. A
    step that would raise it is not taken, and halves the task's rate: the minimum asked for has no learning rate in it.
    """
    initial = own_copies(trainable(model.module), len(inputs))

    def objective(adapted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = as_leaves(adapted)
        with torch.enable_grad():
            losses = loss(model(inputs, leaves), targets)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        moved = {name: part - initial[name] for name, part in adapted.items()}
        pull = config.proximal / 2 * as_vectors(list(moved.values())).square().sum(1)
        slopes = {name: slope + config.proximal * moved[name] for name, slope in zip(leaves, found, strict=True)}
        return losses.detach() + pull, slopes

    adapted, (lowest, slopes) = initial, objective(initial)
    # Near the minimum the loss changes by its rounding alone.
    rates, slack = torch.full_like(lowest, config.inner_lr), 1 + 8 * torch.finfo(lowest.dtype).eps
    yield adapted
    for _ in range(steps):
        tried = {name: part - beside(rates, part) * slopes[name] for name, part in adapted.items()}
        losses, found = objective(tried)
        lower = losses <= lowest * slack
        lowest, rates = torch.where(lower, losses, lowest), torch.where(lower, rates, rates / 2)
        adapted = {name: torch.where(beside(lower, part), tried[name], part) for name, part in adapted.items()}
        slopes = {name: torch.where(beside(lower, part), found[name], part) for name, part in slopes.items()}
        yield adapted


def beside(of_tasks: Tensor, part: Tensor) -> Tensor:
    """One number a task ``[T]``, shaped to go with ``part [T, ...]`` and in its dtype unless it is a mask."""
    shaped = of_tasks.view(-1, *[1] * (part.dim() - 1))
    return shaped if shaped.dtype is torch.bool else shaped.to(part.dtype)


def implicit_gradient(
    model: TaskModel, config: IMAMLConfig, loss: TaskLoss, adapted: dict[str, Tensor], *tasks: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the query loss by the initial parameters, summed over tasks; and by tag the sums for the log.

    With g the query loss's gradient at ``adapted`` and H the support loss's Hessian there, it solves
    ``(I + H / lambda) x = g`` (the paper's eq. 6), beginning from g, the first-order one.
    """
    support_inputs, support_targets, query_inputs, query_targets = tasks
    leaves = as_leaves(adapted)
    with torch.enable_grad():
        outputs = query_outputs(model, leaves, support_inputs, query_inputs, config.batch_statistics)
        losses = loss(outputs, query_targets)
        right = gradient_vectors(losses, leaves)
        slope, hessian = hessian_product(loss(model(support_inputs, leaves), support_targets), leaves)

    def system(vectors: Tensor) -> Tensor:
        return vectors + hessian(vectors) / (config.proximal + config.cg_damping)

    solved, left = conjugate_gradients(system, right, right, steps=config.cg_steps)
    moved = as_vectors([adapted[name] - start.detach() for name, start in trainable(model.module).items()])
    sums = {
        "loss/query": losses.detach().sum(),
        "cg/residual": (left / right.norm(dim=1)).nan_to_num().sum(),
        "inner/gradient_norm": (slope + config.proximal * moved).norm(dim=1).sum(),
    }
    if are_classes(outputs, query_targets):
        sums["accuracy/query"] = accuracies(outputs, query_targets).sum()
    total = as_parts(solved.sum(0, keepdim=True), [part[:1] for part in leaves.values()])
    return {name: part[0] for name, part in zip(leaves, total, strict=True)}, sums


def over_tasks(fabric: Fabric, config: IMAMLConfig, model: nn.Module) -> TaskModel:
    """The model for several tasks, at once or one after another."""
    return TaskModel(bare(fabric, model), together=config.task_batching == "vmap")


def learner(config: IMAMLConfig, model: TaskModel, loss: TaskLoss) -> Learner:
    """What the model predicts along its inner loop."""

    def along(inputs: Tensor, targets: Tensor) -> Iterator[Predict]:
        for adapted in inner_loop(model, config, loss, inputs, targets, steps=config.test_steps):
            yield partial(query_outputs, model, adapted, inputs, statistics=config.batch_statistics)

    return along


def evaluate(
    fabric: Fabric, config: IMAMLConfig, model: nn.Module, loss: TaskLoss, tasks: Sampler, number: int, name: str
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
    fabric: Fabric, config: IMAMLConfig, state: IMAMLState, loss: TaskLoss, tasks: Sampler
) -> dict[str, float]:
    """Scores on held-out tasks, and for sinusoids a picture of what is learned of four."""
    if isinstance(tasks, Sinusoids):
        along = learner(config, over_tasks(fabric, config, state.model), loss)
        with evaluating(state.model):
            picture = wave_picture(fabric, {"iMAML": (along, (0, 1, config.test_steps))}, tasks)
        state.metrics.image(state.step, "adaptation", picture)
    return evaluate(fabric, config, state.model, loss, tasks, config.val_tasks, "val")


def adapt(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    *,
    config: IMAMLConfig,
    steps: int | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of ``model`` that has learned one task: inputs ``[K, ...]`` and targets ``[K, ...]`` of its support set.

    ``model`` may be the state's, and is left as it is. ``steps`` is the config's ``test_steps`` by default. With
    :func:`load`:

        model, settings = load("runs/imaml/first")
        adapted = adapt(model, (inputs, targets), **settings)
    """
    model = unwrap(model)
    task_model = TaskModel(Bare(model, Precision()), together=False)
    inputs, targets = (part.unsqueeze(0) for part in support)
    number = config.test_steps if steps is None else steps
    return with_parameters(model, last(inner_loop(task_model, config, per_task(loss), inputs, targets, steps=number)))


def load(run_dir: str, *, which: Literal["best", "last"] = "best") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run of the command line, from its best or last checkpoint, and settings for :func:`adapt`."""
    config = config_of_run(IMAMLConfig, run_dir)
    model = network(config)
    model.load_state_dict(load_module(run_dir, "model", which=which))
    return model, {"config": config}


def network(config: IMAMLConfig) -> nn.Module:
    """The network that the config names."""
    return few_shot_network(config.data, ways=config.ways, width=config.width, seed=config.seed)


def main(config: IMAMLConfig) -> str:
    """Train, test the best checkpoint on held-out tasks, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    tasks = load_tasks(
        config.data, config.data_root, ways=config.ways, shots=config.shots, query_shots=config.query_shots
    )
    started = time.perf_counter()
    state = train(fabric, config, model=network(config), tasks=tasks.train, val_tasks=tasks.val)
    if state.step == config.steps:
        summary(fabric, config, state, tasks.test, time.perf_counter() - started)
    return str(config.run_dir)


def summary(fabric: Fabric, config: IMAMLConfig, state: IMAMLState, tasks: Sampler, seconds: float) -> None:
    """Test the best checkpoint on held-out tasks and print the result, where the run is, and how to look at it."""
    unwrap(state.model).load_state_dict(load_module(str(config.run_dir), "model"))
    scores = evaluate(fabric, config, state.model, per_task(None), tasks, config.test_tasks, "test")
    print_test(fabric, config, score_lines("iMAML", scores), seconds)


if __name__ == "__main__":
    sys.exit(command_line(IMAMLConfig, main, presets=PRESETS, description=__doc__))
