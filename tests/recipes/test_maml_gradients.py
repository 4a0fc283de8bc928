"""The outer gradient of every variant against finite differences, against a loop written out, and against peers."""

from functools import partial

import pytest
import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.errors import ConfigError
from lightning_custom.inner_optimizers import LearnedRates
from lightning_custom.layers import freeze_
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.task_norm import BatchStatisticsNorm
from recipes import maml

TASKS, WAYS = 3, 3


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def mlp():
    return nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))


def normalised_mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, WAYS))


class ConvNet(nn.Module):
    """With normalisation of four kinds; not a sequence, so that tasks at once go through vmap."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            BatchStatisticsNorm(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, WAYS)

    def forward(self, images):
        return self.head(self.norm(self.trunk(images).flatten(1)))


def waves(support=4, query=5):
    draw = torch.Generator().manual_seed(1)
    sizes = (support, support, query, query)
    return [torch.randn(TASKS, size, 1, generator=draw, dtype=torch.float64) for size in sizes]


def classes(shape, support=2, query=3):
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(TASKS, WAYS * n, *shape, generator=draw, dtype=torch.float64) for n in (support, query)]
    targets = [torch.arange(WAYS).repeat_interleave(n).repeat(TASKS, 1) for n in (support, query)]
    return inputs[0], targets[0], inputs[1], targets[1]


PROBLEMS = {
    "regression": (mlp, waves),
    "classification": (normalised_mlp, partial(classes, (4,))),
    "images": (ConvNet, partial(classes, (1, 8, 8))),
}
VARIANTS = {
    "one-step": {},
    "three-steps": {"inner_steps": 3},
    "no-steps": {"inner_steps": 0},
    "momentum": {"inner_steps": 3, "inner_optimizer": "momentum"},
    "adam": {"inner_steps": 3, "inner_optimizer": "adam", "inner_lr": 0.02},
    "clipped": {"inner_steps": 2, "inner_clip_norm": 0.3},
    "learned-rates": {"inner_steps": 2, "learn_inner_lr": True},
    "learned-rates-of-adam": {"inner_steps": 2, "learn_inner_lr": True, "inner_optimizer": "adam"},
    "head": {"inner_steps": 2, "adapt": "head"},
    "body": {"inner_steps": 2, "adapt": "body"},
    "recomputed": {"inner_steps": 3, "checkpoint_inner": True},
    "recomputed-momentum-of-the-head": {
        "inner_steps": 3, "checkpoint_inner": True, "inner_optimizer": "momentum", "adapt": "head",
        "learn_inner_lr": True,
    },
}  # fmt: skip
OF_CLASSES = {
    "prototypes": {"inner_steps": 2, "proto_head": True},
    "prototypes-without-steps": {"inner_steps": 0, "proto_head": True},
    "statistics-of-the-support": {"inner_steps": 2, "batch_statistics": "support"},
    "statistics-of-both": {"inner_steps": 2, "batch_statistics": "both"},
}
ALL = [
    *((problem, variant) for problem in PROBLEMS for variant in VARIANTS),
    *((problem, variant) for problem in ("classification", "images") for variant in OF_CLASSES),
]
every_problem_and_variant = pytest.mark.parametrize("problem, variant", ALL)


def config_of(variant, **fields):
    return maml.MAMLConfig(**{"inner_lr": 0.1, "ways": WAYS, **(VARIANTS | OF_CLASSES)[variant], **fields})


class Problem:
    """A network, tasks, and what the variant learns beside the network."""

    def __init__(self, problem, config, batching="loop"):
        make, tasks = PROBLEMS[problem]
        module = seeded(make)
        freeze_(module, config.frozen)
        self.config, self.tasks = config, tasks()
        self.model = TaskModel(Bare(module, Precision()), together=batching == "vmap")
        self.initial = dict(module.named_parameters())
        adapted = {name: self.initial[name] for name in maml.adapted_by(config, module)}
        self.rates = LearnedRates(adapted, config.inner_lr).by_name() if config.learn_inner_lr else {}
        self.learned = [part for part in (*self.initial.values(), *self.rates.values()) if part.requires_grad]
        self.outer_loss = partial(maml.query_loss, self.model, config, per_task(None))

    def loss(self):
        return self.outer_loss(self.initial, self.rates, *self.tasks)[0]

    def gradient(self):
        return torch.autograd.grad(self.loss(), self.learned, allow_unused=True, materialize_grads=True)


def flat(gradients):
    return torch.cat([part.flatten() for part in gradients])


def relative(actual, expected):
    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())


def finite_difference(problem, directions, width=1e-5):
    """The derivative along ``directions``, by five points: an error of the fourth power of the width."""
    values, place = {}, 0
    for target in (-2, -1, 1, 2, 0):
        with torch.no_grad():
            for part, direction in zip(problem.learned, directions, strict=True):
                part.add_(direction, alpha=(target - place) * width)
        values[target], place = float(problem.loss().detach()), target
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * width)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@every_problem_and_variant
def test_outer_gradient_is_that_of_finite_differences(problem, variant, batching):
    setup = Problem(problem, config_of(variant), batching)
    gradient = setup.gradient()
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        directions = [torch.randn(part.shape, generator=draw, dtype=part.dtype) for part in setup.learned]
        expected = finite_difference(setup, directions)
        found = sum(
            float((part * direction).sum().detach()) for part, direction in zip(gradient, directions, strict=True)
        )
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("first_order", [False, True])
@every_problem_and_variant
def test_all_tasks_at_once_give_the_gradient_of_one_after_another(problem, variant, first_order):
    config = config_of(variant, first_order=first_order)
    one, all_at_once = (Problem(problem, config, batching).gradient() for batching in ("loop", "vmap"))
    assert relative(all_at_once, one) <= 1e-10


# Written out: a loop over tasks, as a paper's reader would write it


def plain_update(config, memory, name, gradient, rate):
    if config.inner_optimizer == "sgd":
        return rate * gradient
    if config.inner_optimizer == "momentum":
        memory[name] = gradient if name not in memory else 0.9 * memory[name] + gradient
        return rate * memory[name]
    mean, square, count = memory.get(name, (0, 0, 0))
    mean, square, count = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2, count + 1
    memory[name] = (mean, square, count)
    return rate * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)) + 1e-16) ** 0.5


def written_out(setup, module):
    """The outer gradient by autograd.grad(create_graph) through a loop over tasks."""
    config, total = setup.config, 0
    for support_inputs, support_targets, query_inputs, query_targets in zip(*setup.tasks, strict=True):
        loss = mse_loss if query_targets.is_floating_point() else cross_entropy
        parameters, memory = dict(setup.initial), {}
        for _ in range(config.inner_steps):
            outputs = functional_call(module, parameters, (support_inputs,))
            names = maml.adapted_by(config, module)
            gradients = torch.autograd.grad(
                loss(outputs, support_targets), [parameters[name] for name in names],
                create_graph=not config.first_order,
            )  # fmt: skip
            norm = sum((gradient**2).sum() for gradient in gradients) ** 0.5
            if config.inner_clip_norm and norm > config.inner_clip_norm:
                gradients = [gradient * config.inner_clip_norm / norm for gradient in gradients]
            for name, gradient in zip(names, gradients, strict=True):
                rate = setup.rates.get(name, config.inner_lr)
                parameters[name] = parameters[name] - plain_update(config, memory, name, gradient, rate)
        total = total + loss(functional_call(module, parameters, (query_inputs,)), query_targets)
    return torch.autograd.grad(total, setup.learned, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("first_order", [False, True])
@every_problem_and_variant
def test_outer_gradient_is_that_of_the_loop_written_out(problem, variant, first_order):
    config = config_of(variant, first_order=first_order)
    if variant in OF_CLASSES:
        pytest.skip("held by finite differences")
    setup = Problem(problem, config)
    assert relative(setup.gradient(), written_out(setup, setup.model.module)) <= 1e-10


@pytest.mark.parametrize("problem", PROBLEMS)
def test_first_order_gradient_is_another_one(problem):
    first, second = (Problem(problem, config_of("one-step", first_order=order)).gradient() for order in (True, False))
    assert relative(first, second) > 1e-3


def test_frozen_parameters_get_no_gradient_and_are_not_adapted():
    setup = Problem("regression", config_of("three-steps", frozen=("0.",)))
    assert maml.adapted_by(setup.config, setup.model.module) == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert len(setup.learned) == 4
    assert relative(setup.gradient(), written_out(setup, setup.model.module)) <= 1e-10
    with pytest.raises(ConfigError, match="frozen: no parameter's name begins with 'nothing'"):
        freeze_(setup.model.module, ("nothing",))


# Peers


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.filterwarnings("ignore")
def test_outer_gradient_is_that_of_higher(problem, first_order):
    higher = pytest.importorskip("higher")
    setup = Problem(problem, config_of("three-steps", first_order=first_order))
    module = setup.model.module
    descent = torch.optim.SGD(module.parameters(), setup.config.inner_lr)
    for support_inputs, support_targets, query_inputs, query_targets in zip(*setup.tasks, strict=True):
        loss = mse_loss if query_targets.is_floating_point() else cross_entropy
        with higher.innerloop_ctx(module, descent, copy_initial_weights=False, track_higher_grads=not first_order) as (
            adapted,
            optimizer,
        ):
            for _ in range(3):
                optimizer.step(loss(adapted(support_inputs), support_targets))
            outputs = adapted(query_inputs)
            if first_order:  # higher then cuts the graph; the gradient at the adapted parameters is the first-order one
                found = torch.autograd.grad(loss(outputs, query_targets), list(adapted.parameters()))
                for parameter, gradient in zip(module.parameters(), found, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            else:
                loss(outputs, query_targets).backward()
    assert relative(setup.gradient(), [part.grad for part in module.parameters()]) <= 1e-10


@pytest.mark.filterwarnings("ignore")
def test_outer_gradient_is_that_of_torchopt():
    torchopt = pytest.importorskip("torchopt")
    setup = Problem("regression", config_of("three-steps"))
    module = setup.model.module
    descent = torchopt.MetaSGD(module, lr=setup.config.inner_lr)
    start = (
        torchopt.extract_state_dict(module, by="reference", detach_buffers=True),
        torchopt.extract_state_dict(descent),
    )
    total = 0
    for support_inputs, support_targets, query_inputs, query_targets in zip(*setup.tasks, strict=True):
        for _ in range(3):
            descent.step(mse_loss(module(support_inputs), support_targets))
        total = total + mse_loss(module(query_inputs), query_targets)
        torchopt.recover_state_dict(module, start[0])
        torchopt.recover_state_dict(descent, start[1])
    expected = torch.autograd.grad(total, list(module.parameters()))
    assert relative(setup.gradient(), expected) <= 1e-10


# Refusals, and the compiled gradient


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm([4, 6, 6]),
    "group": lambda: nn.GroupNorm(2, 4),
    "root-mean-square": lambda: nn.RMSNorm([4, 6, 6]),
    "batch-statistics": lambda: BatchStatisticsNorm(4),
}


def with_norm(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), NORMS[norm](), nn.Tanh(), nn.Flatten(), nn.Linear(144, WAYS))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_has_the_right_second_order_gradient_all_tasks_at_once(norm, monkeypatch):
    monkeypatch.setitem(PROBLEMS, "norm", (partial(with_norm, norm), partial(classes, (1, 8, 8))))
    setup = Problem("norm", config_of("three-steps"), "vmap")
    gradient = setup.gradient()
    assert relative(gradient, written_out(setup, setup.model.module)) <= 1e-10
    directions = [torch.ones_like(part) for part in setup.learned]
    found = sum(float(part.sum()) for part in gradient)
    assert found == pytest.approx(finite_difference(setup, directions), rel=1e-6)


def test_a_gradient_inside_vmap_is_wrong_for_batch_norm_so_that_only_the_forward_pass_may_be_there(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "norm", (partial(with_norm, "batch"), partial(classes, (1, 8, 8))))
    setup = Problem("norm", config_of("one-step"))
    module = setup.model.module

    def query(parameters, support_inputs, support_targets, query_inputs, query_targets):
        def support(parameters):
            return cross_entropy(functional_call(module, parameters, (support_inputs,)), support_targets)

        gradients = torch.func.grad(support)(parameters)
        adapted = {name: part - 0.1 * gradients[name] for name, part in parameters.items()}
        return cross_entropy(functional_call(module, adapted, (query_inputs,)), query_targets)

    total = torch.func.vmap(query, in_dims=(None, 0, 0, 0, 0))(setup.initial, *setup.tasks).sum()
    wrong = torch.autograd.grad(total, setup.learned)
    if relative(wrong, setup.gradient()) < 1e-10:
        pytest.skip("this torch has mended it")
    assert relative(wrong, setup.gradient()) > 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
@pytest.mark.parametrize(
    "problem, variant, batching",
    # Unrolled over tasks the larger ones compile for minutes.
    [("regression", "learned-rates", "loop"), ("regression", "three-steps", "vmap"), ("images", "one-step", "vmap")],
)
def test_compiled_gradient_is_the_eager_one(problem, variant, batching):
    setup = Problem(problem, config_of(variant), batching)
    expected = setup.gradient()
    compiled = CompiledGradient(setup.outer_loss)
    for _ in range(2):
        total, values = compiled(setup.initial, setup.rates, *setup.tasks)
        found = torch.autograd.grad(3 * total, setup.learned, allow_unused=True, materialize_grads=True)
        assert float(total.detach()) == pytest.approx(float(setup.loss().detach()), rel=1e-10)
        assert float(values["loss/query"]) == float(total.detach())
        assert relative([part / 3 for part in found], expected) <= 1e-10
