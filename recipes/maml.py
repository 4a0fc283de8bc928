"""MAML: initial parameters from which a few gradient steps learn a new task (Finn et al. 2017, algorithms 1 and 2).

    python -m recipes.maml                                                    # sinusoids, about a minute
    python -m recipes.maml --preset sinusoid-paper --compile true
    python -m recipes.maml --preset omniglot-5way-1shot --data_root DIR --devices 2

An inner loop adapts the parameters to each task on its support set; the outer loop moves the initial parameters
against the gradient of the query loss, differentiated through the inner loop. `--compile true` compiles the whole
outer gradient, that inner loop included.
"""

import copy
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
from torch.nn.functional import one_hot
from torch.optim import Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.exact_reduction import sum_in_fixed_order_, take_gradient_
from lightning_custom.few_shot import (
    Family,
    Learner,
    Predict,
    Sampler,
    Statistics,
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
    query_outputs,
    require_a_task_each,
    require_share,
    score_lines,
    wave_picture,
    with_parameters,
)
from lightning_custom.inner_optimizers import INNER_OPTIMIZERS, LearnedRates, Memory, Parameters, clip_each_task
from lightning_custom.launch import launch
from lightning_custom.layers import freeze_, head_of, require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.precision import Bare, bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import config_of_run
from lightning_custom.task_batching import TaskLoss, TaskModel, per_task
from lightning_custom.task_norm import require_safe_norms
from lightning_custom.tasks import Sinusoids

Loss = Callable[[Tensor, Tensor], Tensor]
"""``(outputs [K, ...], targets [K, ...]) -> mean`` over the samples of one task."""


@dataclass(frozen=True, kw_only=True)
class MAMLConfig(RunConfig):
    """Settings of the loops, and of the tasks and network that the command line builds."""

    steps: int = 10000
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
    inner_lr: float = 0.01
    """Learning rate of the inner loop, or what a learned one starts from."""
    inner_steps: int = 1
    """Inner updates while training; 0 trains one network for all tasks."""
    test_steps: int = 10
    """Inner updates when validating."""
    first_order: bool = False
    """Leave out the derivative of the inner gradients."""
    inner_optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """Optimizer of the inner loop, differentiated through."""
    inner_clip_norm: float = 0.0
    """Largest norm of a task's inner gradient; 0: no clipping."""
    learn_inner_lr: bool = False
    """Learn an inner rate for every number of every parameter (Meta-SGD)."""
    adapt: Literal["all", "head", "body"] = "all"
    """What the inner loop changes: everything, the last layer (ANIL), or all but the last layer (BOIL)."""
    proto_head: bool = False
    """Start each task's last layer from the class means of its support features (ProtoMAML)."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that neither loop changes."""
    batch_statistics: Statistics = "query"
    """Samples whose statistics normalise the query set, in networks with batch normalisation."""
    task_batching: Literal["auto", "vmap", "loop"] = "auto"
    """Tasks at once, or one after another; auto: the latter for exact_reduction, and 16 images of omniglot on a CPU."""
    tasks_at_once: int = 0
    """Most tasks that are computed at once, to save memory; 0: a process's share of a meta-batch."""
    checkpoint_inner: bool = False
    """Compute inner steps again in the backward pass, to save memory where there are many."""
    exact_reduction: bool = False
    """Add the tasks' gradients in an order that does not depend on the number of processes: equal to the bit."""
    compile: bool = False
    """Compile the outer gradient."""
    joint: bool = True
    """Train beside it the baseline that does not learn to adapt: one network for the samples of all tasks."""
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
        require_at_least(self, {"meta_batch_size": 1, "inner_steps": 0, "test_steps": 1, "lr": 0, "inner_lr": 0})
        require_at_least(self, {"inner_clip_norm": 0, "tasks_at_once": 0, "val_tasks": 2, "test_tasks": 2})
        require_at_least(self, {"ways": 2, "shots": 1, "query_shots": 1, "width": 1})
        if self.proto_head and self.adapt == "body":
            raise ConfigError("proto_head: the inner loop goes on from that head, but adapt is body; use all or head")
        if self.checkpoint_inner and self.compile:
            raise ConfigError("checkpoint_inner: a compiled gradient is recorded as a whole; leave --compile out")
        if self.exact_reduction and (self.task_batching == "vmap" or self.compile):
            raise ConfigError("exact_reduction: needs each task's own gradient; use --task_batching loop, no --compile")


OMNIGLOT: dict[str, Any] = {
    "data": "omniglot", "width": 64, "joint": False, "threads": None, "steps": 60000, "log_every": 50,
    "validate_every": 500, "checkpoint_every": 500, "val_tasks": 200, "tasks_at_once": 8,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "sinusoid": {},
    "sinusoid-paper": {"steps": 70000, "validate_every": 5000, "checkpoint_every": 5000, "log_every": 500},
    "omniglot-cpu": OMNIGLOT | {
        "ways": 5, "shots": 1, "query_shots": 1, "meta_batch_size": 8, "inner_lr": 0.4, "test_steps": 3,
        "steps": 10000, "threads": 1,
    },
    "omniglot-5way-1shot": OMNIGLOT | {
        "ways": 5, "shots": 1, "query_shots": 1, "meta_batch_size": 32, "inner_lr": 0.4, "test_steps": 3,
    },
    "omniglot-5way-5shot": OMNIGLOT | {
        "ways": 5, "shots": 5, "query_shots": 5, "meta_batch_size": 32, "inner_lr": 0.4, "test_steps": 3,
    },
    "omniglot-20way-1shot": OMNIGLOT | {
        "ways": 20, "shots": 1, "query_shots": 1, "meta_batch_size": 16, "inner_lr": 0.1, "inner_steps": 5,
        "test_steps": 5,
    },
    "omniglot-20way-5shot": OMNIGLOT | {
        "ways": 20, "shots": 5, "query_shots": 5, "meta_batch_size": 16, "inner_lr": 0.1, "inner_steps": 5,
        "test_steps": 5,
    },
}  # fmt: skip


@dataclass
class MAMLState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    rates: nn.Module | None
    optimizer: Optimizer
    joint: nn.Module | None
    joint_optimizer: Optimizer | None
    batches: Batches | None
    metrics: MetricLogger
    step: int = 0
    """Outer updates done."""


def train(
    fabric: Fabric,
    config: MAMLConfig,
    *,
    model: nn.Module,
    tasks: Any,
    val_tasks: Sampler | None = None,
    loss: Loss | None = None,
) -> MAMLState:
    """Train the initial parameters of ``model(inputs [K, ...]) -> outputs [K, ...]`` on tasks.

    ``tasks`` is a sampler, or an iterable of meta-batches, of each process its own (``meta_batch_size`` over all).
    ``val_tasks`` samples held-out tasks; without it they come from ``tasks``, with numbers of their own.
    ``loss`` is cross-entropy where targets are integers and mean squared error elsewhere.
    """
    config, losses = with_run_dir(fabric, config), per_task(loss)
    require_a_task_each(fabric, config.meta_batch_size)
    require_safe_norms(model)
    freeze_(model, config.frozen)
    require_trainable("model", model)
    joint = copy.deepcopy(model)
    rates = learned_rates(config, model)
    model, rates = fabric.setup_module(model), rates and fabric.setup_module(rates)
    initial, inner_rates = initial_of(model), by_name(rates)
    learned = [part for module in (model, rates) if module for part in module.parameters() if part.requires_grad]
    state = MAMLState(
        model=model,
        rates=rates,
        optimizer=cast("Optimizer", fabric.setup_optimizers(Adam(learned, config.lr, fused=True))),
        joint=None,
        joint_optimizer=None,
        batches=None,
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/loss"],
            layout={
                "held-out tasks": ["(val|joint)/(loss|accuracy)$"],
                "after each inner step": ["val/loss_after/"],
                "training": ["loss/query"],
            },
        ),
    )
    if config.joint:
        joint_optimizer = Adam(joint.parameters(), config.lr, fused=True)
        state.joint, state.joint_optimizer = cast("Any", fabric.setup(joint, joint_optimizer))
    if not callable(tasks):
        state.batches = meta_batches(fabric, tasks, meta_batch_size=config.meta_batch_size, seed=config.seed)

    task_model = over_tasks(fabric, config, model)
    outer_loss: Any = partial(query_loss, task_model, config, losses)
    if config.compile:
        refuse_loss_scale(fabric, "which --compile leaves out of the gradient")
        outer_loss = CompiledGradient(outer_loss)
    # mean_gradients_ divides the sum over processes by their number.
    weight = (1 if config.exact_reduction else fabric.world_size) / config.meta_batch_size

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
            found, of_each_task = [], []
            for part in one_after_another(share, all_at_once=task_model.together, largest=config.tasks_at_once):
                # Inner loop: some gradient steps on the support set. Outer loss: the query set's, after them.
                total, values = outer_loss(initial, inner_rates, *part)
                fabric.backward(total * weight)
                found.append(values)
                if config.exact_reduction:
                    of_each_task.append(take_gradient_(learned))
            if config.exact_reduction:
                sum_in_fixed_order_(fabric, learned, of_each_task)
            else:
                mean_gradients_(fabric, model, *([rates] if rates else []))
            state.optimizer.step()
            if state.joint is not None:
                joint_step(fabric, config, state, losses, share)

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


def query_loss(
    model: TaskModel, config: MAMLConfig, loss: TaskLoss, initial: Parameters, rates: Parameters, *tasks: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The query loss after the inner loop, summed over tasks; and by tag the sums for the log."""
    support_inputs, support_targets, query_inputs, query_targets = tasks
    *_, adapted = inner_loop(
        model, config, loss, initial, rates, support_inputs, support_targets,
        steps=config.inner_steps, second_order=not config.first_order,
    )  # fmt: skip
    outputs = query_outputs(model, adapted, support_inputs, query_inputs, config.batch_statistics)
    total = loss(outputs, query_targets).sum()
    sums = {"loss/query": total.detach()}
    if are_classes(outputs, query_targets):
        sums["accuracy/query"] = accuracies(outputs, query_targets).sum()
    return total, sums


def inner_loop(
    model: TaskModel,
    config: MAMLConfig,
    loss: TaskLoss,
    initial: Parameters,
    rates: Parameters,
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    second_order: bool = False,
) -> Iterator[Parameters]:
    """Each task's parameters before the first gradient step on its support set ``[T, K, ...]``, and after each.

    Those that are adapted have the task first, ``[T, ...]``, and a graph back to ``initial`` and ``rates``.
    """
    adapted, memory = starting_point(model, config, initial, inputs, targets), Memory()
    optimizer = INNER_OPTIMIZERS[config.inner_optimizer]

    def step(adapted: Parameters, memory: Memory) -> tuple[Parameters, Memory]:
        with torch.enable_grad():
            losses = loss(model(inputs, {**initial, **adapted}), targets)
            found = torch.autograd.grad(
                losses.sum(),
                list(adapted.values()),
                create_graph=second_order,
                allow_unused=True,
                materialize_grads=True,
            )
        gradients = dict(zip(adapted, found, strict=True))
        if config.inner_clip_norm:
            gradients = clip_each_task(gradients, config.inner_clip_norm)
        return optimizer(adapted, gradients, rates or config.inner_lr, memory)

    yield {**initial, **adapted}
    for _ in range(steps):
        if config.checkpoint_inner:
            adapted, memory = checkpoint(step, adapted, memory, use_reentrant=False)
        else:
            adapted, memory = step(adapted, memory)
        yield {**initial, **adapted}


def starting_point(
    model: TaskModel, config: MAMLConfig, initial: Parameters, inputs: Tensor, targets: Tensor
) -> Parameters:
    """The parameters that the inner loop changes, ``[T, ...]``: the initial ones, once for each task."""
    number = len(inputs)
    adapted = {name: initial[name].expand(number, *initial[name].shape) for name in adapted_by(config, model.module)}
    if config.proto_head:
        adapted |= prototype_head(model, initial, inputs, targets)
    return adapted


def prototype_head(model: TaskModel, initial: Parameters, inputs: Tensor, targets: Tensor) -> Parameters:
    """A last layer for each task, from class means c: weights 2c, bias -|c|^2 (Triantafillou et al. 2020).

    A class of which the support set has no sample begins at zero.
    """
    if targets.is_floating_point():
        raise ConfigError("proto_head: targets are numbers; it needs classes, leave it out for regression")
    prefix = head_of(model.module)
    head = model.module.get_submodule(prefix.removesuffix("."))
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ConfigError(f"proto_head: the last layer is a {type(head).__name__}; make it an nn.Linear with a bias")
    weight = initial[f"{prefix}weight"]
    # With the identity as its last layer, the network's outputs are its features.
    identity = {f"{prefix}weight": torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)}
    identity[f"{prefix}bias"] = torch.zeros_like(identity[f"{prefix}weight"][0])
    features = model(inputs, {**initial, **identity})
    members = one_hot(targets.long(), len(weight)).to(features.dtype)  # [T, K, W]
    means = members.mT @ features / members.sum(1).clamp(min=1).unsqueeze(-1)
    means = means.to(weight.dtype)
    return {f"{prefix}weight": 2 * means, f"{prefix}bias": -means.square().sum(-1)}


def learned_rates(config: MAMLConfig, module: nn.Module) -> nn.Module | None:
    """Inner rates for what is adapted, where the config wants them learned."""
    if not config.learn_inner_lr:
        return None
    named = dict(module.named_parameters())
    return LearnedRates({name: named[name] for name in adapted_by(config, module)}, config.inner_lr)


def initial_of(model: nn.Module) -> Parameters:
    """The initial parameters by name, live."""
    return dict(unwrap(model).named_parameters())


def by_name(rates: nn.Module | None) -> Parameters:
    """Learned inner rates by the name of their parameter; none where they are not learned."""
    return {} if rates is None else cast("LearnedRates", unwrap(rates)).by_name()


def adapted_by(config: MAMLConfig, module: nn.Module) -> list[str]:
    """The names of the parameters that the inner loop changes."""
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if config.adapt == "all":
        return names
    head = head_of(module)
    chosen = [name for name in names if name.startswith(head) == (config.adapt == "head")]
    if not chosen:
        raise ConfigError(f"adapt: {config.adapt}, but the model has no parameters there, or they are frozen; use all")
    return chosen


def over_tasks(fabric: Fabric, config: MAMLConfig, model: nn.Module) -> TaskModel:
    """The model for several tasks, at once or one after another."""
    # On a CPU, convolutions over this many images fill a core by themselves, and vmap's grouped ones are slower.
    filled = config.data == "omniglot" and config.ways * config.shots >= 16 and fabric.device.type == "cpu"
    auto = config.task_batching == "auto" and not config.exact_reduction and not filled
    return TaskModel(bare(fabric, model), together=auto or config.task_batching == "vmap")


def joint_step(fabric: Fabric, config: MAMLConfig, state: MAMLState, loss: TaskLoss, share: Sequence[Tensor]) -> None:
    """The baseline's update: support and query samples of all tasks as one regression or classification."""
    model, optimizer = cast("nn.Module", state.joint), cast("Optimizer", state.joint_optimizer)
    learned, of_each_task = [part for part in model.parameters() if part.requires_grad], []
    weight = (1 if config.exact_reduction else fabric.world_size) / config.meta_batch_size
    # Task by task, for batch normalisation: statistics of a share would depend on the number of processes.
    task_model = over_tasks(fabric, config, model)
    optimizer.zero_grad()
    for part in one_after_another(share, all_at_once=task_model.together, largest=config.tasks_at_once):
        support_inputs, support_targets, query_inputs, query_targets = part
        inputs, targets = torch.cat([support_inputs, query_inputs], 1), torch.cat([support_targets, query_targets], 1)
        fabric.backward(loss(task_model(inputs, initial_of(model)), targets).sum() * weight)
        if config.exact_reduction:
            of_each_task.append(take_gradient_(learned))
    if config.exact_reduction:
        sum_in_fixed_order_(fabric, learned, of_each_task)
    else:
        mean_gradients_(fabric, model)
    optimizer.step()


def validate(fabric: Fabric, config: MAMLConfig, state: MAMLState, loss: TaskLoss, tasks: Sampler) -> dict[str, float]:
    """Scores on held-out tasks, of the baseline too, and for sinusoids a picture of what is learned of four."""
    networks = {"val": (state.model, state.rates)} | ({"joint": (state.joint, None)} if state.joint else {})
    scores: dict[str, float] = {}
    pictured = {}
    for name, (model, rates) in networks.items():
        scores |= evaluate(fabric, config, model, rates, loss, tasks, config.val_tasks, name)
        shown = (0, 1, config.test_steps) if name == "val" else (config.test_steps,)
        pictured["MAML" if name == "val" else name] = (learner(fabric, config, model, rates, loss), shown)
    if isinstance(tasks, Sinusoids):
        with evaluating(*(model for model, _ in networks.values())), torch.enable_grad():
            picture = wave_picture(fabric, pictured, tasks)
        state.metrics.image(state.step, "adaptation", picture)
    return scores


def evaluate(
    fabric: Fabric,
    config: MAMLConfig,
    model: nn.Module,
    rates: nn.Module | None,
    loss: TaskLoss,
    tasks: Sampler,
    number: int,
    name: str,
) -> dict[str, float]:
    """Scores on ``number`` held-out tasks along ``test_steps`` updates of the inner loop."""
    learned, all_at_once = learner(fabric, config, model, rates, loss), over_tasks(fabric, config, model).together
    largest = at_once(fabric, config.tasks_at_once, config.meta_batch_size)
    with evaluating(model), torch.enable_grad():
        return held_out_scores(fabric, learned, tasks, number, loss, name, all_at_once=all_at_once, largest=largest)


def learner(fabric: Fabric, config: MAMLConfig, model: nn.Module, rates: nn.Module | None, loss: TaskLoss) -> Learner:
    """What the model predicts along its inner loop."""
    task_model, initial, inner_rates = over_tasks(fabric, config, model), initial_of(model), by_name(rates)

    def along(inputs: Tensor, targets: Tensor) -> Iterator[Predict]:
        steps = config.test_steps
        for adapted in inner_loop(task_model, config, loss, initial, inner_rates, inputs, targets, steps=steps):
            yield partial(query_outputs, task_model, adapted, inputs, statistics=config.batch_statistics)

    return along


def adapt(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    *,
    config: MAMLConfig,
    rates: nn.Module | None = None,
    steps: int | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of ``model`` that has learned one task: inputs ``[K, ...]`` and targets ``[K, ...]`` of its support set.

    ``model`` may be the state's, and is left as it is. ``steps`` is the config's ``test_steps`` by default. With
    :func:`load`:

        model, settings = load("runs/maml/first")
        adapted = adapt(model, (inputs, targets), **settings)
    """
    model = unwrap(model)
    task_model, losses = TaskModel(Bare(model, Precision()), together=False), per_task(loss)
    initial, inner_rates = initial_of(model), by_name(rates)
    inputs, targets = (part.unsqueeze(0) for part in support)
    number = config.test_steps if steps is None else steps
    with torch.enable_grad():
        *_, adapted = inner_loop(task_model, config, losses, initial, inner_rates, inputs, targets, steps=number)
    return with_parameters(model, adapted)


def load(run_dir: str, *, which: Literal["best", "last"] = "best") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run of the command line, from its best or last checkpoint, and settings for :func:`adapt`."""
    config = config_of_run(MAMLConfig, run_dir)
    model = network(config)
    model.load_state_dict(load_module(run_dir, "model", which=which))
    freeze_(model, config.frozen)
    rates = learned_rates(config, model)
    if rates is not None:
        rates.load_state_dict(load_module(run_dir, "rates", which=which))
    return model, {"config": config, "rates": rates}


def network(config: MAMLConfig) -> nn.Module:
    """The network that the config names."""
    return few_shot_network(config.data, ways=config.ways, width=config.width, seed=config.seed)


def main(config: MAMLConfig) -> str:
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


def summary(fabric: Fabric, config: MAMLConfig, state: MAMLState, tasks: Sampler, seconds: float) -> None:
    """Test the best checkpoint on held-out tasks and print the result, where the run is, and how to look at it."""
    unwrap(state.model).load_state_dict(load_module(str(config.run_dir), "model"))
    if state.rates is not None:
        unwrap(state.rates).load_state_dict(load_module(str(config.run_dir), "rates"))
    losses, number = per_task(None), config.test_tasks
    lines = score_lines("MAML", evaluate(fabric, config, state.model, state.rates, losses, tasks, number, "test"))
    if state.joint is not None:
        unwrap(state.joint).load_state_dict(load_module(str(config.run_dir), "joint"))
        lines += score_lines("joint", evaluate(fabric, config, state.joint, None, losses, tasks, number, "test"))
    print_test(fabric, config, lines, seconds)


if __name__ == "__main__":
    sys.exit(command_line(MAMLConfig, main, presets=PRESETS, description=__doc__))
