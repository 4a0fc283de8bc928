"""The outer gradient of every variant against finite differences and MAML's, the annealings, per-step normalisation."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import yaml
from lightning.fabric.plugins.precision import Precision
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.config import stored_fields
from lightning_custom.errors import ConfigError
from lightning_custom.loop import seed_step
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.task_norm import BatchStatisticsNorm, PerStepNorm, per_step_norms
from lightning_custom.tasks import FewShot, Sinusoids
from lightning_custom.testing import single_process
from recipes import maml, maml_plus_plus
from recipes.maml_plus_plus import MAMLPlusPlusConfig

TASKS, WAYS, STEPS = 3, 3, 3


def mlp():
    return nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), BatchStatisticsNorm(4), nn.Tanh(),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(),
        nn.Flatten(), nn.Linear(64, WAYS),
    )  # fmt: skip


def waves():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(TASKS, size, 1, generator=draw, dtype=torch.float64) for size in (4, 4, 5, 5)]


def images():
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(TASKS, WAYS * n, 1, 8, 8, generator=draw, dtype=torch.float64) for n in (2, 3)]
    targets = [torch.arange(WAYS).repeat_interleave(n).repeat(TASKS, 1) for n in (2, 3)]
    return inputs[0], targets[0], inputs[1], targets[1]


PROBLEMS = {"regression": (mlp, waves), "images": (conv_net, images)}
OFF = {
    "per_step_rates": False, "multi_step_share": 0.0, "first_order_share": 0.0, "per_step_norm": False,
    "inner_clip_norm": 0.0, "schedule": "constant",
}  # fmt: skip
VARIANTS = {
    "all": {},
    "off": OFF,
    "per-step-rates": OFF | {"per_step_rates": True},
    "clipped": OFF | {"inner_clip_norm": 0.3},
    "multi-step-loss": OFF | {"multi_step_share": 0.5},
    "per-step-norm": OFF | {"per_step_norm": True},
    "running-statistics": OFF | {"per_step_norm": True, "statistics": "running"},
}
STEP = 2  # of 10: several query losses count, and the derivative is of second order
every_problem = pytest.mark.parametrize("problem", PROBLEMS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def config_of(variant, **fields):
    return MAMLPlusPlusConfig(
        **{"steps": 10, "inner_lr": 0.1, "inner_steps": STEPS, "multi_step_share": 0.5, "first_order_share": 0.1}
        | VARIANTS[variant]
        | fields
    )


class Problem:
    """A network, tasks, and what is learned; every number of it away from where it starts."""

    def __init__(self, problem, config, batching="loop"):
        make, tasks = PROBLEMS[problem]
        torch.manual_seed(0)
        self.config, self.tasks = config, tasks()
        self.module = maml_plus_plus.with_norms(config, make()).double()
        self.model = TaskModel(Bare(self.module, Precision()), together=batching == "vmap")
        rates = maml_plus_plus.learned_rates(config, self.module)
        self.initial = maml_plus_plus.initial_of(self.module)
        self.rates = {} if rates is None else maml_plus_plus.by_name(rates.double())
        self.learned = [*self.initial.values(), *self.rates.values()]
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for part in self.learned:
                part.add_(torch.randn(part.shape, generator=draw, dtype=part.dtype), alpha=0.02)

    def outer_loss(self, step=STEP, second_order=None):
        if second_order is None:
            second_order = maml_plus_plus.is_second_order(self.config, step)
        return partial(
            maml_plus_plus.outer_loss, self.model, self.config, per_task(None), second_order=second_order
        ), torch.tensor(maml_plus_plus.loss_weights(self.config, step), dtype=torch.float64)

    def loss(self, **when):
        function, weights = self.outer_loss(**when)
        return function(self.initial, self.rates, weights, *self.tasks)[0]

    def gradient(self, **when):
        return torch.autograd.grad(self.loss(**when), self.learned, allow_unused=True, materialize_grads=True)


def flat(gradients):
    return torch.cat([part.flatten() for part in gradients])


def relative(actual, expected):
    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())


def finite_difference(setup, directions, width=1e-5):
    """The derivative along ``directions``, by five points: an error of the fourth power of the width."""
    values, place = {}, 0
    for target in (-2, -1, 1, 2, 0):
        with torch.no_grad():
            for part, direction in zip(setup.learned, directions, strict=True):
                part.add_(direction, alpha=(target - place) * width)
        values[target], place = float(setup.loss().detach()), target
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * width)


# The outer gradient


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@every_variant
@every_problem
def test_outer_gradient_is_that_of_finite_differences(problem, variant, batching):
    setup = Problem(problem, config_of(variant), batching)
    gradient = setup.gradient()
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        directions = [torch.randn(part.shape, generator=draw, dtype=part.dtype) for part in setup.learned]
        found = sum(float((part * direction).sum()) for part, direction in zip(gradient, directions, strict=True))
        assert found == pytest.approx(finite_difference(setup, directions), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("second_order", [False, True])
@every_variant
@every_problem
def test_all_tasks_at_once_give_the_gradient_of_one_after_another(problem, variant, second_order):
    one, all_at_once = (
        Problem(problem, config_of(variant), batching).gradient(second_order=second_order)
        for batching in ("loop", "vmap")
    )
    assert relative(all_at_once, one) <= 1e-10


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("second_order", [False, True])
@every_problem
def test_all_off_is_maml(problem, second_order, batching):
    setup = Problem(problem, config_of("off"), batching)
    config = maml.MAMLConfig(inner_lr=0.1, inner_steps=STEPS, first_order=not second_order)
    total, _ = maml.query_loss(setup.model, config, per_task(None), setup.initial, {}, *setup.tasks)
    expected = torch.autograd.grad(total, setup.learned)
    found = setup.gradient(second_order=second_order)
    assert relative(found, expected) <= 1e-12
    other = Problem(problem, config_of("multi-step-loss"), batching)
    assert relative(other.gradient(second_order=second_order), expected) > 1e-2


@pytest.mark.parametrize("step", [0, STEP, 7], ids=["first order", "several losses", "one loss"])
@every_problem
def test_outer_gradient_is_that_of_the_loop_written_out(problem, step):
    """As a reader of the paper would write it: per-step rates and norms, weighted losses, order of the derivative."""
    setup = Problem(problem, config_of("all"))
    config, norms = setup.config, per_step_norms(setup.module)
    weights = {0: [1 / 3] * 3, STEP: [0.2, 0.2, 0.6], 7: [0, 0, 1]}[step]
    total = 0
    for support_inputs, support_targets, query_inputs, query_targets in zip(*setup.tasks, strict=True):
        loss = mse_loss if query_targets.is_floating_point() else cross_entropy
        parameters = dict(setup.initial)
        for k in range(config.inner_steps):
            for norm in norms.values():
                norm.inner_step = k
            outputs = functional_call(setup.module, parameters, (support_inputs,))
            gradients = torch.autograd.grad(
                loss(outputs, support_targets), [parameters[name] for name in setup.rates], create_graph=step > 0
            )
            for (name, rates), gradient in zip(setup.rates.items(), gradients, strict=True):
                parameters[name] = parameters[name] - rates[k] * gradient
            total = total + weights[k] * loss(functional_call(setup.module, parameters, (query_inputs,)), query_targets)
    expected = torch.autograd.grad(total, setup.learned, allow_unused=True, materialize_grads=True)
    assert relative(setup.gradient(step=step), expected) <= 1e-10


@every_problem
def test_first_order_gradient_is_another_one_but_has_one_for_the_rates(problem):
    setup = Problem(problem, config_of("all"))
    first, second = (setup.gradient(second_order=order) for order in (False, True))
    assert relative(first, second) > 1e-3
    assert all(part.abs().min() > 0 for part in first[-len(setup.rates) :])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_compiled_gradient_is_the_eager_one_for_several_losses_and_for_one():
    # Images, and tasks one after another, compile for minutes and add nothing: both are in the tests of MAML.
    setup = Problem("regression", config_of("all"), "vmap")
    function, _ = setup.outer_loss()
    compiled = CompiledGradient(function)
    for step in (STEP, 7, STEP + 1):
        _, weights = setup.outer_loss(step=step)
        total, values = compiled(setup.initial, setup.rates, weights, *setup.tasks)
        found = torch.autograd.grad(total, setup.learned, allow_unused=True, materialize_grads=True)
        assert relative(found, setup.gradient(step=step)) <= 1e-10
        assert float(values["loss/outer"]) == pytest.approx(float(setup.loss(step=step).detach()), rel=1e-10)


# Annealings


def weights_by_epoch(number, epoch, epochs):
    """The weights of the query losses of ``number`` inner steps in an epoch, as published, one formula a line."""
    least, decay = 0.03 / number, 1 / number / epochs
    early = max(1 / number - epoch * decay, least)
    last = min(1 / number + epoch * (number - 1) * decay, 1 - (number - 1) * least)
    return [early] * (number - 1) + [last]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_loss_weights_are_those_of_the_paper_at_the_start_of_each_of_its_epochs(number):
    preset = {**maml_plus_plus.PRESETS["omniglot-5way-1shot"], "inner_steps": number}
    config = MAMLPlusPlusConfig(**preset)
    for epoch in range(100):
        found = maml_plus_plus.loss_weights(config, 500 * epoch)
        if epoch < 10:
            assert found == pytest.approx(weights_by_epoch(number, epoch, 10), abs=1e-15)
        else:
            assert found == [1.0]


def test_loss_weights_sum_to_one_and_go_over_to_the_last_step():
    config = MAMLPlusPlusConfig(steps=1000, multi_step_share=0.5, inner_steps=4)
    rows = [maml_plus_plus.loss_weights(config, step) for step in range(501)]
    assert all(math.fsum(row) == pytest.approx(1) for row in rows)
    assert all(one[-1] <= later[-1] for one, later in pairwise(rows))
    assert rows[0] == [0.25] * 4
    assert rows[499] == pytest.approx([0.0075] * 3 + [0.9775])
    assert rows[500] == [1.0]
    assert maml_plus_plus.loss_weights(MAMLPlusPlusConfig(multi_step_share=0.0), 0) == [1.0]


def test_order_of_the_derivative_changes_after_its_share_of_the_run():
    def orders(**fields):
        config = MAMLPlusPlusConfig(**{"steps": 10, **fields})
        return [maml_plus_plus.is_second_order(config, step) for step in range(10)]

    assert orders(first_order_share=0.3) == [False] * 3 + [True] * 7
    assert orders(first_order_share=0.0) == [True] * 10
    assert orders(first_order_share=1.0) == [False] * 10
    assert orders(first_order_share=0.5, anneal_steps=4) == [False] * 2 + [True] * 8


def test_outer_learning_rate_falls_along_half_a_cosine():
    schedule = maml_plus_plus.learning_rate(MAMLPlusPlusConfig(steps=200, lr=1e-3, min_lr=1e-5))
    for step in (0, 37, 100, 200, 300):
        expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * min(step / 200, 1)))
        assert schedule(step) == pytest.approx(expected, rel=1e-12)
    assert maml_plus_plus.learning_rate(MAMLPlusPlusConfig(schedule="constant"))(1234) == 1e-3


# Normalisation for each step, and what is adapted


def test_the_inner_loop_leaves_the_norms_alone_and_each_step_has_a_rate_for_each_other_tensor():
    config = config_of("all")
    module = maml_plus_plus.with_norms(config, conv_net())
    assert maml_plus_plus.adapted_by(module) == ["0.weight", "3.weight", "7.weight", "7.bias"]
    rates = maml_plus_plus.by_name(maml_plus_plus.learned_rates(config, module))
    assert {name: part.tolist() for name, part in rates.items()} == {
        name: [pytest.approx(0.1)] * STEPS for name in maml_plus_plus.adapted_by(module)
    }
    assert len(maml_plus_plus.adapted_by(maml_plus_plus.with_norms(config_of("off"), conv_net()))) == 8


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_support_and_query_of_a_step_have_the_norm_of_that_step(batching):
    """Every number of step k's norm gets a gradient from the losses from step k on, and none from those before."""
    setup = Problem("images", config_of("per-step-norm", multi_step_share=0.5), batching)
    function, _ = setup.outer_loss()
    norms = [part for layer in per_step_norms(setup.module).values() for part in (layer.weight, layer.bias)]
    for counted in range(STEPS):
        weights = torch.eye(STEPS, dtype=torch.float64)[counted]
        total, _ = function(setup.initial, setup.rates, weights, *setup.tasks)
        for gradient in torch.autograd.grad(total, norms):
            assert [bool(row.abs().min() > 0) for row in gradient] == [step <= counted for step in range(STEPS)]
            assert gradient[counted + 1 :].abs().sum() == 0


def trained(tmp_path, **fields):
    config = MAMLPlusPlusConfig(
        **{
            "steps": 6, "meta_batch_size": 4, "width": 4, "inner_steps": 2, "test_steps": 3, "validate_every": 3,
            "val_tasks": 4, "ways": WAYS, "shots": 1, "query_shots": 2, "inner_lr": 0.1, "accelerator": "cpu",
            "run_dir": str(tmp_path),
        }
        | fields
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    tasks = FewShot(torch.rand(6, 4, 1, 8, 8, generator=draw), ways=WAYS, shots=1, query_shots=2)
    torch.manual_seed(0)
    return maml_plus_plus.train(single_process(), config, model=conv_net(), tasks=tasks), config, tasks


def norms_of(state):
    return list(per_step_norms(state.model.module).values())


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_running_statistics_are_averages_of_what_support_and_query_have_at_each_step(tmp_path, batching):
    fields = {
        "steps": 1,
        "statistics": "running",
        "validate_every": 0,
        "first_order_share": 0.0,
        "lr": 0.0,
        "min_lr": 0.0,
    }
    state, _, tasks = trained(tmp_path, task_batching=batching, multi_step_share=0.5, **fields)
    module = maml_plus_plus.with_norms(config_of("all", inner_steps=2), conv_net())
    module.load_state_dict(state.model.module.state_dict())
    drawn = tasks(4, seed_step(0, 0, single_process()).shared)
    means = [[], []]
    for support_inputs, support_targets, query_inputs, _ in zip(*drawn, strict=True):
        parameters = dict(module.named_parameters())
        for k in range(2):
            for norm in per_step_norms(module).values():
                norm.inner_step, norm.statistics = k, "batch"
            names = maml_plus_plus.adapted_by(module)
            loss = cross_entropy(functional_call(module, parameters, (support_inputs,)), support_targets)
            gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
            means[k].append(functional_call(module[0], {"weight": parameters["0.weight"]}, (support_inputs,)))
            for name, gradient in zip(names, gradients, strict=True):
                parameters[name] = parameters[name] - 0.1 * gradient
            means[k].append(functional_call(module[0], {"weight": parameters["0.weight"]}, (query_inputs,)))
    for k in range(2):
        expected = torch.stack([part.mean((0, 2, 3)) for part in means[k]]).mean(0)
        variance = torch.stack([part.var((0, 2, 3)) for part in means[k]]).mean(0)
        assert torch.allclose(norms_of(state)[0].running_mean[k], 0.1 * expected, atol=1e-6)
        assert torch.allclose(norms_of(state)[0].running_var[k], 0.9 + 0.1 * variance, atol=1e-6)


def test_batch_statistics_collect_nothing_and_running_ones_are_what_held_out_tasks_get(tmp_path):
    state, *_ = trained(tmp_path / "batch")
    assert torch.equal(norms_of(state)[0].running_mean, torch.zeros(2, 4))
    state, config, _ = trained(tmp_path / "running", statistics="running")
    assert norms_of(state)[0].running_mean.abs().min() > 0
    model = TaskModel(Bare(state.model.module, Precision()), together=True)
    along = maml_plus_plus.learner(config, model, maml_plus_plus.by_name(state.rates), per_task(None))
    draw = torch.Generator().manual_seed(5)
    support, queries = (torch.rand(2, size, 1, 8, 8, generator=draw) for size in (3, 6))
    targets = torch.arange(3).repeat(2, 1)
    *_, predict = along(support, targets)
    # Nothing depends on which other queries there are.
    assert torch.allclose(predict(queries)[:, :2], predict(queries[:, :2]), atol=1e-6)


def test_adapted_copy_predicts_what_validation_does_after_as_many_steps(tmp_path):
    state, config, tasks = trained(tmp_path)
    module = state.model.module
    support_inputs, support_targets, query_inputs, _ = (part[:1] for part in tasks(1, torch.Generator().manual_seed(0)))
    model = TaskModel(Bare(module, Precision()), together=False)
    along = maml_plus_plus.learner(config, model, maml_plus_plus.by_name(state.rates), per_task(None))
    before = [part.clone() for part in module.parameters()]
    for steps, predict in enumerate(along(support_inputs, support_targets)):
        expected = predict(query_inputs)[0]
        adapted = maml_plus_plus.adapt(
            module, (support_inputs[0], support_targets[0]), config=config, rates=state.rates, steps=steps
        )
        assert torch.allclose(adapted(query_inputs[0]), expected, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))


def test_a_loaded_run_adapts_as_the_state_it_ended_with(tmp_path):
    config = MAMLPlusPlusConfig(steps=4, val_tasks=4, meta_batch_size=4, accelerator="cpu", run_dir=str(tmp_path))
    state = maml_plus_plus.train(single_process(), config, model=maml_plus_plus.network(config), tasks=Sinusoids())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored_fields(config)))
    model, settings = maml_plus_plus.load(str(tmp_path), which="last")
    inputs, targets, queries, _ = (part[0] for part in Sinusoids()(1, torch.Generator().manual_seed(0)))
    expected = maml_plus_plus.adapt(state.model.module, (inputs, targets), config=config, rates=state.rates)
    assert torch.equal(maml_plus_plus.adapt(model, (inputs, targets), **settings)(queries), expected(queries))
    assert not torch.equal(model(queries), expected(queries))


# Refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"multi_step_share": 1.5}, r"multi_step_share: 1.5; give a share of the run, from 0 to 1"),
        ({"first_order_share": -0.1}, r"first_order_share: -0.1; give a share"),
        ({"statistics": "running", "per_step_norm": False}, r"statistics: running needs --per_step_norm true"),
        ({"statistics": "running", "compile": True}, r"statistics: running needs .* no --compile; use batch"),
        ({"inner_clip_norm": -1.0}, r"inner_clip_norm: -1.0; it must be at least 0"),
        ({"lr": 1e-6}, r"min_lr: 1e-05, above lr 1e-06, which falls to it; lower min_lr too"),
        ({"inner_lr": -0.1}, r"inner_lr: -0.1; it must be at least 0"),
        ({"inner_steps": 0}, r"inner_steps: 0; it must be at least 1"),
        ({"anneal_steps": 0}, r"anneal_steps: 0; it must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        MAMLPlusPlusConfig(**fields)


def test_norms_with_running_statistics_are_replaced_or_refused():
    make = lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))  # noqa: E731
    assert isinstance(maml_plus_plus.with_norms(config_of("all"), make())[1], PerStepNorm)
    with pytest.raises(ConfigError, match=r"running statistics in 1 \(BatchNorm1d\)"):
        maml_plus_plus.with_norms(config_of("off"), make())
