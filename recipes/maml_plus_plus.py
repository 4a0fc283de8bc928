"""MAML++: MAML with learned inner rates, a loss at every inner step, and annealings (Antoniou et al. 2019, section 4).

    python -m recipes.maml_plus_plus                                          # sinusoids, a minute or two
    python -m recipes.maml_plus_plus --first_order_share 0.3 --multi_step_share 0
    python -m recipes.maml_plus_plus --preset omniglot-5way-1shot --data_root DIR --devices 2

As in MAML an inner loop adapts the parameters to each task on its support set, and the outer loop moves the initial
ones. Here every inner step has a learned rate for each tensor of parameters (LSLR) and batch normalisation of its own
(BNWB, BNRS), early on the query loss counts after each of them (MSL), the outer rate falls along a cosine (CA), and the
outer loop may begin at first order (DA, off as in the authors' configurations). With all of it off the outer gradient
is MAML's. After as many outer updates the default's loss is about half of MAML's.

The authors' published code collects running statistics but normalises by those of the batch, always: so does
`--statistics batch`, the default, and need not collect. `--statistics running` normalises held-out tasks by them.
`--compile true` compiles the whole outer gradient, once for each order of derivatives and number of query losses.
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

from lightning_custom import schedules
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, with_run_dir
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.few_shot import (
    Family,
    Learner,
    Predict,
    Sampler,
    accuracies,
    are_classes,
    at_once,
    draw_tasks,
    few_shot_network,
    held_out_scores,
    load_tasks,
    mean_over_tasks,
    meta_batches,
    one_after_another,
    print_test,
    require_a_task_each,
    require_share,
    score_lines,
    wave_picture,
    with_parameters,
)
from lightning_custom.inner_optimizers import LearnedRates, Parameters, clip_each_task
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.precision import Bare, bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import config_of_run
from lightning_custom.task_batching import TaskLoss, TaskModel, per_task
from lightning_custom.task_norm import (
    Statistics,
    per_step_norms,
    require_safe_norms,
    set_inner_step_,
    update_running_statistics_,
    with_per_step_norm,
)
from lightning_custom.tasks import Sinusoids

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [K, ...], targets [K, ...]) -> mean`` over the samples of one task."""


@dataclass(frozen=True, kw_only=True)
class MAMLPlusPlusConfig(RunConfig):
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
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the outer learning rate (CA)."""
    min_lr: float = 1e-5
    """Where lr ends along the cosine."""
    anneal_steps: int | None = None
    """Steps that the annealings are shares of; none: steps."""
    inner_lr: float = 0.01
    """Learning rate of the inner loop, or what the learned ones start from."""
    inner_clip_norm: float = 10.0
    """Largest norm of a task's inner gradient, so that learned rates cannot make it diverge; 0: no clipping."""
    inner_steps: int = 5
    """Inner updates while training."""
    test_steps: int = 5
    """Inner updates when validating; those past inner_steps have the last one's rates and normalisation."""
    per_step_rates: bool = True
    """Learn an inner rate for each tensor of parameters and each inner step (LSLR)."""
    multi_step_share: float = 0.1
    """Share of the run in which the query loss counts after every inner step, less and less (MSL); 0: never."""
    first_order_share: float = 0.0
    """Share of the run, its first part, that leaves out the derivative of the inner gradients (DA); 0: none of it."""
    per_step_norm: bool = True
    """Batch normalisation with a weight and a bias for each inner step, which the inner loop leaves alone (BNWB)."""
    statistics: Literal["batch", "running"] = "batch"
    """What per-step normalisation takes on held-out tasks: their own statistics, or running ones (BNRS)."""
    task_batching: Literal["vmap", "loop"] = "vmap"
    """Tasks at once, or one after another."""
    tasks_at_once: int = 0
    """Most tasks that are computed at once, to save memory; 0: a process's share of a meta-batch."""
    compile: bool = False
    """Compile the outer gradient."""
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
        require_at_least(self, {"meta_batch_size": 1, "inner_steps": 1, "test_steps": 1, "lr": 0, "min_lr": 0})
        require_at_least(self, {"ways": 2, "shots": 1, "query_shots": 1, "width": 1, "val_tasks": 2, "test_tasks": 2})
        require_at_least(self, {"anneal_steps": 1, "tasks_at_once": 0, "inner_lr": 0, "inner_clip_norm": 0})
        constant = self.schedule == "constant" and "the schedule is constant; use cosine"
        annealed = self.multi_step_share or self.first_order_share
        refuse_unread(self, {"min_lr": constant, "anneal_steps": not annealed and constant})
        if self.schedule == "cosine" and self.min_lr > self.lr:
            raise ConfigError(f"min_lr: {self.min_lr}, above lr {self.lr}, which falls to it; lower min_lr too")
        for share in ("multi_step_share", "first_order_share"):
            if not 0 <= getattr(self, share) <= 1:
                raise ConfigError(f"{share}: {getattr(self, share)}; give a share of the run, from 0 to 1")
        if self.statistics == "running" and (self.compile or not self.per_step_norm):
            raise ConfigError("statistics: running needs --per_step_norm true, and no --compile; use batch")


OMNIGLOT: dict[str, Any] = {
    "data": "omniglot", "width": 64, "threads": None, "steps": 50000, "log_every": 50, "validate_every": 500,
    "checkpoint_every": 500, "val_tasks": 100, "meta_batch_size": 8, "inner_lr": 0.1, "inner_steps": 5, "test_steps": 5,
    "inner_clip_norm": 0.0, "shots": 1, "query_shots": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "sinusoid": {},
    # As the authors' omniglot_1_8_0.1_64_5 and _20: 100 epochs of 500 updates, multi-step loss in ten of them.
    "omniglot-5way-1shot": OMNIGLOT | {"ways": 5},
    "omniglot-20way-1shot": OMNIGLOT | {"ways": 20},
}


@dataclass
class MAMLPlusPlusState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    rates: nn.Module | None
    optimizer: Optimizer
    batches: Batches | None
    metrics: MetricLogger
    step: int = 0
    """Outer updates done."""


def train(
    fabric: Fabric,
    config: MAMLPlusPlusConfig,
    *,
    model: nn.Module,
    tasks: Any,
    val_tasks: Sampler | None = None,
    loss: Loss | None = None,
) -> MAMLPlusPlusState:
    """Train the initial parameters of ``model(inputs [K, ...]) -> outputs [K, ...]`` on tasks.

    ``tasks`` is a sampler, or an iterable of meta-batches, of each process its own (``meta_batch_size`` over all).
    ``val_tasks`` samples held-out tasks; without it they come from ``tasks``, with numbers of their own.
    ``loss`` is cross-entropy where targets are integers and mean squared error elsewhere. The batch normalisation of
    ``model`` is replaced in place.
    """
    config, losses = with_run_dir(fabric, config), per_task(loss)
    require_a_task_each(fabric, config.meta_batch_size)
    require_trainable("model", model)
    model = with_norms(config, model)
    rates = learned_rates(config, model)
    model, rates = fabric.setup_module(model), rates and fabric.setup_module(rates)
    initial, inner_rates = initial_of(model), by_name(rates)
    learned = [part for module in (model, rates) if module for part in module.parameters() if part.requires_grad]
    state = MAMLPlusPlusState(
        model=model,
        rates=rates,
        optimizer=cast("Optimizer", fabric.setup_optimizers(Adam(learned, config.lr, fused=True))),
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

    task_model, schedule = over_tasks(fabric, config, model), learning_rate(config)
    outer_losses: dict[bool, Any] = {
        order: partial(outer_loss, task_model, config, losses, second_order=order) for order in (False, True)
    }
    if config.compile:
        refuse_loss_scale(fabric, "which --compile leaves out of the gradient")
        outer_losses = {order: CompiledGradient(function) for order, function in outer_losses.items()}

    with (
        Checkpointer(fabric, config, best="val/loss", steps_fixed=config.anneal_steps is None) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            schedules.set_learning_rate(state.optimizer, schedule, state.step)
            weights = torch.tensor(loss_weights(config, state.step), dtype=learned[0].dtype, device=fabric.device)

            # The tasks of this step are the same for any number of processes, each of which takes its share.
            share: Sequence[Tensor]
            if state.batches is None:
                share = [take_share(part, fabric) for part in draw_tasks(tasks, config.meta_batch_size, rng.shared)]
            else:
                share = require_share(fabric, next(state.batches), config.meta_batch_size)

            state.optimizer.zero_grad()
            found = []
            for part in one_after_another(share, all_at_once=task_model.together, largest=config.tasks_at_once):
                # Inner loop on the support set. Outer loss: the query set's, after its last step or after each.
                total, values = outer_losses[is_second_order(config, state.step)](initial, inner_rates, weights, *part)
                # mean_gradients_ divides the sum over processes by their number.
                fabric.backward(total * (fabric.world_size / config.meta_batch_size))
                found.append(values)
            mean_gradients_(fabric, model, *([rates] if rates else []))
            state.optimizer.step()
            if config.statistics == "running":
                update_running_statistics_(fabric, unwrap(model))

            state.step += 1
            state.metrics.update(mean_over_tasks(found, len(share[0])), weight=len(share[0]))
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


def learning_rate(config: MAMLPlusPlusConfig) -> schedules.Schedule:
    """The outer learning rate by step."""
    if config.schedule == "constant":
        return schedules.Constant(config.lr)
    return schedules.Cosine(config.lr, max(config.anneal_steps or config.steps, 1), config.min_lr)


def progress_of(config: MAMLPlusPlusConfig, step: int) -> float:
    """The share of the annealing that is over before ``step``."""
    return step / max(config.anneal_steps or config.steps, 1)


def is_second_order(config: MAMLPlusPlusConfig, step: int) -> bool:
    """Whether the inner gradients are differentiated in ``step``."""
    return progress_of(config, step) >= config.first_order_share


def loss_weights(config: MAMLPlusPlusConfig, step: int) -> list[float]:
    """Weights of the query losses after the last inner steps: all N of them in the first part of the run, then one.

    At first 1/N each; all but the last fall to 0 in a straight line, but not below 0.03/N, and the last has the rest.
    """
    number, done = config.inner_steps, progress_of(config, step)
    if done >= config.multi_step_share:
        return [1.0]
    early = max(1 - done / config.multi_step_share, 0.03) / number
    return [early] * (number - 1) + [1 - (number - 1) * early]


def outer_loss(
    model: TaskModel,
    config: MAMLPlusPlusConfig,
    loss: TaskLoss,
    initial: Parameters,
    rates: Parameters,
    weights: Tensor,
    *tasks: Tensor,
    second_order: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The query losses after the last ``len(weights)`` inner steps, weighted, summed over tasks; sums for the log."""
    support_inputs, support_targets, query_inputs, query_targets = tasks
    statistics: Statistics = "collect" if config.statistics == "running" else "batch"
    along = inner_loop(
        model, config, loss, initial, rates, support_inputs, support_targets,
        steps=config.inner_steps, second_order=second_order, statistics=statistics,
    )  # fmt: skip
    query_losses = []
    for step, adapted in enumerate(along):
        if step > config.inner_steps - len(weights):
            outputs = query_outputs(model, adapted, query_inputs, step=step, statistics=statistics)
            query_losses.append(loss(outputs, query_targets).sum())
    total = (weights * torch.stack(query_losses)).sum()
    sums = {"loss/query": query_losses[-1].detach(), "loss/outer": total.detach()}
    if are_classes(outputs, query_targets):
        sums["accuracy/query"] = accuracies(outputs, query_targets).sum()
    return total, sums


def inner_loop(
    model: TaskModel,
    config: MAMLPlusPlusConfig,
    loss: TaskLoss,
    initial: Parameters,
    rates: Parameters,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    second_order: bool = False,
    statistics: Statistics = "batch",
) -> Iterator[Parameters]:
    """Each task's parameters before the first gradient step on its support set ``[T, K, ...]``, and after each.

    Those that are adapted have the task first, ``[T, ...]``, and a graph back to ``initial`` and ``rates``.
    """
    number = len(inputs)
    adapted = {name: initial[name].expand(number, *initial[name].shape) for name in adapted_by(model.module)}
    yield {**initial, **adapted}
    for step in range(steps):
        with torch.enable_grad():
            set_inner_step_(model.module, step, statistics)
            losses = loss(model(inputs, {**initial, **adapted}), targets)
            gradients = torch.autograd.grad(
                losses.sum(), list(adapted.values()),
                create_graph=second_order, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
        directions = dict(zip(adapted, gradients, strict=True))
        if config.inner_clip_norm:
            directions = clip_each_task(directions, config.inner_clip_norm)
        at = min(step, config.inner_steps - 1)
        adapted = {
            name: part - (rates[name][at] if rates else config.inner_lr) * directions[name]
            for name, part in adapted.items()
        }
        yield {**initial, **adapted}


def query_outputs(
    model: TaskModel, parameters: Parameters, inputs: Tensor, *, step: int, statistics: Statistics
) -> Tensor:
    """Outputs for the query set after ``step`` inner steps, normalised as their last one was."""
    set_inner_step_(model.module, max(step - 1, 0), statistics)
    return model(inputs, parameters)


def with_norms(config: MAMLPlusPlusConfig, model: nn.Module) -> nn.Module:
    """The model with the normalisation that the config names; what an inner loop cannot have is refused."""
    if config.per_step_norm:
        model = with_per_step_norm(model, config.inner_steps)
    require_safe_norms(model)
    return model


def learned_rates(config: MAMLPlusPlusConfig, module: nn.Module) -> nn.Module | None:
    """Inner rates ``[N]`` for each tensor that is adapted, where the config wants them learned."""
    if not config.per_step_rates:
        return None
    return LearnedRates({name: torch.empty(config.inner_steps) for name in adapted_by(module)}, config.inner_lr)


def initial_of(model: nn.Module) -> Parameters:
    """The initial parameters by name, live."""
    return dict(unwrap(model).named_parameters())


def by_name(rates: nn.Module | None) -> Parameters:
    """Learned inner rates by the name of their parameter; none where they are not learned."""
    return {} if rates is None else cast("LearnedRates", unwrap(rates)).by_name()


def adapted_by(module: nn.Module) -> list[str]:
    """The names of the parameters that the inner loop changes: all but those that have their own for each step."""
    kept = {id(parameter) for layer in per_step_norms(module).values() for parameter in layer.parameters()}
    return [name for name, part in module.named_parameters() if part.requires_grad and id(part) not in kept]


def over_tasks(fabric: Fabric, config: MAMLPlusPlusConfig, model: nn.Module) -> TaskModel:
    """The model for several tasks, at once or one after another."""
    return TaskModel(bare(fabric, model), together=config.task_batching == "vmap")


def learner(config: MAMLPlusPlusConfig, model: TaskModel, rates: Parameters, loss: TaskLoss) -> Learner:
    """What the model predicts along its inner loop."""

    def along(inputs: Tensor, targets: Tensor) -> Iterator[Predict]:
        updates = inner_loop(
            model, config, loss, initial_of(model.module), rates, inputs, targets,
            steps=config.test_steps, statistics=config.statistics,
        )  # fmt: skip
        for step, adapted in enumerate(updates):
            yield partial(query_outputs, model, adapted, step=step, statistics=config.statistics)

    return along


def evaluate(
    fabric: Fabric,
    config: MAMLPlusPlusConfig,
    state: MAMLPlusPlusState,
    loss: TaskLoss,
    tasks: Sampler,
    number: int,
    name: str,
) -> dict[str, float]:
    """Scores on ``number`` held-out tasks along ``test_steps`` updates of the inner loop."""
    model = over_tasks(fabric, config, state.model)
    largest = at_once(fabric, config.tasks_at_once, config.meta_batch_size)
    with evaluating(state.model), torch.enable_grad():
        return held_out_scores(
            fabric, learner(config, model, by_name(state.rates), loss), tasks, number, loss, name,
            all_at_once=model.together, largest=largest,
        )  # fmt: skip


def validate(
    fabric: Fabric, config: MAMLPlusPlusConfig, state: MAMLPlusPlusState, loss: TaskLoss, tasks: Sampler
) -> dict[str, float]:
    """Scores on held-out tasks, and for sinusoids a picture of what is learned of four."""
    if isinstance(tasks, Sinusoids):
        along = learner(config, over_tasks(fabric, config, state.model), by_name(state.rates), loss)
        with evaluating(state.model), torch.enable_grad():
            picture = wave_picture(fabric, {"MAML++": (along, (0, 1, config.test_steps))}, tasks)
        state.metrics.image(state.step, "adaptation", picture)
    return evaluate(fabric, config, state, loss, tasks, config.val_tasks, "val")


def adapt(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    *,
    config: MAMLPlusPlusConfig,
    rates: nn.Module | None = None,
    steps: int | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of ``model`` that has learned one task: inputs ``[K, ...]`` and targets ``[K, ...]`` of its support set.

    ``model`` may be the state's, and is left as it is. ``steps`` is the config's ``test_steps`` by default. With
    :func:`load`:

        model, settings = load("runs/maml_plus_plus/first")
        adapted = adapt(model, (inputs, targets), **settings)
    """
    model = unwrap(model)
    task_model, losses = TaskModel(Bare(model, Precision()), together=False), per_task(loss)
    inputs, targets = (part.unsqueeze(0) for part in support)
    number = config.test_steps if steps is None else steps
    with torch.enable_grad():
        *_, adapted = inner_loop(
            task_model, config, losses, initial_of(model), by_name(rates), inputs, targets,
            steps=number, statistics=config.statistics,
        )  # fmt: skip
    adapted_model = with_parameters(model, adapted)
    set_inner_step_(adapted_model, max(number - 1, 0), config.statistics)
    return adapted_model


def load(run_dir: str, *, which: Literal["best", "last"] = "best") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run of the command line, from its best or last checkpoint, and settings for :func:`adapt`."""
    config = config_of_run(MAMLPlusPlusConfig, run_dir)
    model = with_norms(config, network(config))
    model.load_state_dict(load_module(run_dir, "model", which=which))
    rates = learned_rates(config, model)
    if rates is not None:
        rates.load_state_dict(load_module(run_dir, "rates", which=which))
    return model, {"config": config, "rates": rates}


def network(config: MAMLPlusPlusConfig) -> nn.Module:
    """The network that the config names."""
    return few_shot_network(config.data, ways=config.ways, width=config.width, seed=config.seed)


def main(config: MAMLPlusPlusConfig) -> str:
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


def summary(
    fabric: Fabric, config: MAMLPlusPlusConfig, state: MAMLPlusPlusState, tasks: Sampler, seconds: float
) -> None:
    """Test the best checkpoint on held-out tasks and print the result, where the run is, and how to look at it."""
    unwrap(state.model).load_state_dict(load_module(str(config.run_dir), "model"))
    if state.rates is not None:
        unwrap(state.rates).load_state_dict(load_module(str(config.run_dir), "rates"))
    lines = score_lines("MAML++", evaluate(fabric, config, state, per_task(None), tasks, config.test_tasks, "test"))
    print_test(fabric, config, lines, seconds)


if __name__ == "__main__":
    sys.exit(command_line(MAMLPlusPlusConfig, main, presets=PRESETS, description=__doc__))
