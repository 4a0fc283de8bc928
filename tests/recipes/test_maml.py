"""The MAML recipe: bits over processes, precision, adaptation, what a user gives it, and its command line."""

import dataclasses
import itertools
import json
import runpy
import sys
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
import yaml
from lightning.fabric.plugins.precision import Precision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss, smooth_l1_loss
from torch.profiler import ProfilerActivity, profile

from lightning_custom import compiled_gradient
from lightning_custom.checkpoint import load_module, read_best
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed, seed_step
from lightning_custom.metrics import read_rows
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.tasks import Sinusoids
from lightning_custom.testing import assert_resumes_exactly, in_processes, single_process
from recipes import maml
from recipes.maml import MAMLConfig
from tests.recipes.cases import TaskStream, image_tasks
from tests.recipes.program import ROOT, finish, start

WAVES = Sinusoids(3, 4)
SMALL = MAMLConfig(
    steps=10, log_every=1, validate_every=0, checkpoint_every=0, meta_batch_size=5, width=8, shots=3, query_shots=4,
    test_steps=3, val_tasks=5, test_tasks=6, inner_lr=0.05, joint=False, accelerator="cpu",
)  # fmt: skip


def train(fabric, folder, *, model=None, tasks=WAVES.__call__, loss=None, val_tasks=None, **fields):
    config = dataclasses.replace(SMALL, run_dir=str(folder), **fields)
    model = model or maml.network(config)
    return maml.train(fabric, config, model=model, tasks=tasks, loss=loss, val_tasks=val_tasks)


def flat(parts):
    return torch.cat([part.detach().flatten().cpu() for part in parts])


def parameters(state):
    return flat(part for module in (state.model, state.rates, state.joint) if module for part in module.parameters())


def gradient(state):
    return flat(part.grad.double() for module in (state.model, state.joint) if module for part in module.parameters())


def plain_run(config, losses, steps):
    """Adam on ``losses(model, tasks)`` of the tasks that the recipe draws."""
    model = maml.network(config)
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    for step in range(steps):
        tasks = WAVES(config.meta_batch_size, seed_step(config.seed, step, single_process()).shared)
        optimizer.zero_grad()
        losses(model, *tasks).backward()
        optimizer.step()
    return flat(model.parameters())


def test_a_run_that_needs_less_memory_goes_on_with_a_warning_and_with_another_test_without(tmp_path):
    straight = train(single_process(), tmp_path / "straight")
    train(single_process(), tmp_path / "resumed", stop_at=4)
    train(single_process(), tmp_path / "resumed", stop_at=6, test_tasks=9)
    with pytest.warns(UserWarning, match="not to the last bit: tasks_at_once: 0 -> 2, task_batching: auto -> loop"):
        resumed = train(single_process(), tmp_path / "resumed", tasks_at_once=2, task_batching="loop")
    torch.testing.assert_close(parameters(resumed), parameters(straight), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="another config: inner_steps"):
        train(single_process(), tmp_path / "resumed", inner_steps=2)


# Processes


VARIANTS = {"plain": {"joint": True}, "learned-rates": {"learn_inner_lr": True, "inner_steps": 2}}


def exact_and_not(fabric, folder):
    found = {}
    for name, fields in VARIANTS.items():
        for exact in (True, False):
            fields = {**fields, "meta_batch_size": 7, "exact_reduction": exact}
            state = train(fabric, f"{folder}/{name}-{exact}-{fabric.world_size}", **fields)
            found[f"{name}-{exact}"] = parameters(state)
    return found


@pytest.mark.distributed
def test_exact_reduction_gives_the_same_bits_on_1_2_and_4_processes_and_without_it_they_differ(tmp_path):
    one = exact_and_not(single_process(), str(tmp_path))
    several = [in_processes(exact_and_not, number, str(tmp_path)) for number in (2, 4)]
    for name in VARIANTS:
        for found in several:
            assert all(torch.equal(part[f"{name}-True"], one[f"{name}-True"]) for part in found)
            assert not torch.equal(found[0][f"{name}-False"], one[f"{name}-False"])
            torch.testing.assert_close(found[0][f"{name}-False"], one[f"{name}-False"], rtol=1e-4, atol=1e-5)


def refusals_of_several(fabric, folder):
    found = []
    for meta_batch_size, tasks in ((1, WAVES), (7, [])):
        tasks = tasks if callable(tasks) else TaskStream(single_process(), WAVES, 7)  # each process has all of them
        with pytest.raises(ConfigError) as refusal:
            train(fabric, f"{folder}/{meta_batch_size}", tasks=tasks, meta_batch_size=meta_batch_size)
        found.append(str(refusal.value))
    return found


@pytest.mark.distributed
def test_shares_that_are_none_or_not_a_part_are_refused(tmp_path):
    first, second = in_processes(refusals_of_several, 2, str(tmp_path))
    assert first[0] == second[0] == "meta_batch_size: 1 for 2 processes; each needs one"
    for rank, (found, share) in enumerate(((first, 4), (second, 3))):
        assert found[1] == (
            f"meta_batch_size: 7 over 2 processes is {share} for process {rank}, but the iterable yields 7 tasks; "
            "make them equal"
        )


def test_exact_reduction_changes_the_order_of_a_sum_and_nothing_else(tmp_path):
    one, other = (train(single_process(), tmp_path / str(exact), exact_reduction=exact) for exact in (False, True))
    torch.testing.assert_close(parameters(one), parameters(other), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"^exact_reduction: needs each task's own gradient; use --task_batching "):
        dataclasses.replace(SMALL, exact_reduction=True, task_batching="vmap")


# Precision


# 8 bits of mantissa: a relative error of 4e-3 in every number.
BOUNDS = {"bf16-mixed": (1e-3, 5e-2), "bf16-true": (1e-3, 5e-2), "64-true": (1e-9, 1e-6)}


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("precision", BOUNDS)
def test_the_first_outer_gradient_of_every_precision_is_near_that_of_float32(
    precision, order, tmp_path, record_property
):
    expected, found = (
        gradient(
            train(
                single_process(mode), tmp_path / mode, precision=mode, steps=1, width=40, meta_batch_size=25,
                tasks=Sinusoids().__call__, inner_lr=0.01, first_order=order == "first",
            )
        )
        for mode in ("32-true", precision)
    )  # fmt: skip
    difference = float((found - expected).norm() / expected.norm())
    record_property("relative difference to 32-true", difference)
    print(f"{precision}, {order} order: the outer gradient differs from 32-true by {difference:.2g}, relative")
    low, high = BOUNDS[precision]
    assert low < difference < high


# What the loops compute


def test_without_inner_steps_the_model_is_trained_on_all_query_sets_as_by_a_plain_loop(tmp_path):
    state = train(single_process(), tmp_path, inner_steps=0)

    def losses(model, support_inputs, support_targets, query_inputs, query_targets):
        return mse_loss(model(query_inputs), query_targets)

    torch.testing.assert_close(parameters(state), plain_run(SMALL, losses, 10), rtol=1e-4, atol=1e-6)
    # It adapts when it is validated all the same.
    (scores,) = [row for row in read_rows(tmp_path) if "val/loss" in row]
    assert len({scores[f"val/loss_after/{step:02d}"] for step in range(4)}) == 4


def test_the_joint_baseline_is_a_plain_loop_over_all_samples(tmp_path):
    state = train(single_process(), tmp_path, joint=True)

    def losses(model, support_inputs, support_targets, query_inputs, query_targets):
        inputs, targets = torch.cat([support_inputs, query_inputs], 1), torch.cat([support_targets, query_targets], 1)
        return mse_loss(model(inputs), targets)

    expected = plain_run(SMALL, losses, 10)
    torch.testing.assert_close(flat(state.joint.parameters()), expected, rtol=1e-4, atol=1e-6)


def test_ten_outer_steps_are_those_of_a_loop_written_out(tmp_path):
    state = train(single_process(), tmp_path)

    def losses(model, *tasks):
        total, named = 0, dict(model.named_parameters())
        for support_inputs, support_targets, query_inputs, query_targets in zip(*tasks, strict=True):
            loss = mse_loss(functional_call(model, named, (support_inputs,)), support_targets)
            found = torch.autograd.grad(loss, list(named.values()), create_graph=True)
            adapted = {name: part - 0.05 * g for (name, part), g in zip(named.items(), found, strict=True)}
            total = total + mse_loss(functional_call(model, adapted, (query_inputs,)), query_targets)
        return total / len(tasks[0])

    torch.testing.assert_close(parameters(state), plain_run(SMALL, losses, 10), rtol=1e-4, atol=1e-6)


def test_the_logged_loss_is_the_mean_query_loss_over_tasks_after_the_inner_loop(tmp_path):
    train(single_process(), tmp_path, steps=1, tasks_at_once=2)
    tasks = WAVES(5, seed_step(0, 0, single_process()).shared)
    model, expected = maml.network(SMALL), []
    for support_inputs, support_targets, query_inputs, query_targets in zip(*tasks, strict=True):
        adapted = maml.adapt(model, (support_inputs, support_targets), config=SMALL, steps=1)
        expected.append(float(mse_loss(adapted(query_inputs), query_targets).detach()))
    assert read_rows(tmp_path)[0]["loss/query"] == pytest.approx(sum(expected) / 5, rel=1e-5)


@pytest.mark.parametrize("fields", [{"tasks_at_once": 2}, {"task_batching": "loop"}, {"exact_reduction": True}])
def test_how_tasks_are_computed_changes_no_gradient_and_no_score_but_by_rounding(fields, tmp_path):
    settings = {"steps": 1, "precision": "64-true", "joint": True, "meta_batch_size": 3}
    one, other = (
        train(single_process("64-true"), tmp_path / str(i), **settings, **changed)
        for i, changed in enumerate(({}, fields))
    )
    torch.testing.assert_close(gradient(one), gradient(other), rtol=1e-10, atol=1e-14)
    scores = [next(row for row in read_rows(tmp_path / str(i)) if "val/loss" in row) for i in range(2)]
    names = [name for name in scores[0] if name.startswith(("val/", "joint/"))]
    assert len(names) == 12
    assert [scores[0][name] for name in names] == pytest.approx([scores[1][name] for name in names], rel=1e-10)


@pytest.mark.parametrize("asked, most", [(0, 3), (2, 2), (4, 4)])
def test_no_more_tasks_are_computed_at_once_than_in_training_or_as_asked(asked, most, tmp_path, monkeypatch):
    """Of the baseline, and on held-out tasks, of which there are more than in a meta-batch."""
    seen, call = [], TaskModel.__call__
    monkeypatch.setattr(TaskModel, "__call__", lambda self, *given: (seen.append(len(given[0])), call(self, *given))[1])
    train(single_process(), tmp_path, steps=1, joint=True, meta_batch_size=3, tasks_at_once=asked)
    assert max(seen) == most


# Recomputed inner steps


def outer_gradient(module, tasks, **fields):
    """The outer gradient of ``module`` as a function without arguments."""
    config = dataclasses.replace(SMALL, **fields)
    model = TaskModel(Bare(module, Precision()), together=True)

    def compute():
        total, _ = maml.query_loss(model, config, per_task(None), maml.initial_of(module), {}, *tasks)
        return flat(torch.autograd.grad(total, list(module.parameters())))

    return compute


def peak_bytes(function):
    """The most memory that ``function`` held at a time, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held, most = 0, 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_recomputed_inner_steps_give_the_same_gradient_in_a_tenth_of_the_memory_a_step():
    tasks = Sinusoids(300, 300)(2, torch.Generator().manual_seed(0))
    growth, gradients = [], []
    for recomputed in (False, True):
        small, large = (
            outer_gradient(
                maml.network(MAMLConfig()), tasks, inner_steps=steps, inner_lr=0.01, checkpoint_inner=recomputed
            )
            for steps in (2, 8)
        )
        growth.append((peak_bytes(large) - peak_bytes(small)) / 6)
        gradients.append(large())
    assert torch.equal(*gradients)
    # What is kept of a step is then its parameters: of two tasks, 1,761 numbers of 4 bytes each.
    assert 2 * 1761 * 4 <= growth[1] < growth[0] / 10


def test_recomputed_inner_steps_drop_the_same_units_again():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1))
    found = []
    for recomputed in (False, True):
        compute = outer_gradient(module, WAVES(5, torch.Generator()), inner_steps=3, checkpoint_inner=recomputed)
        torch.manual_seed(1)
        found.append(compute())
    assert torch.equal(*found)


# Adaptation


def plainly_adapted(model, inputs, targets, *, steps, rate, loss=mse_loss):
    named = {name: part.detach().requires_grad_() for name, part in model.named_parameters()}
    for _ in range(steps):
        found = torch.autograd.grad(loss(functional_call(model, named, (inputs,)), targets), list(named.values()))
        named = {
            name: (part - rate * g).detach().requires_grad_()
            for (name, part), g in zip(named.items(), found, strict=True)
        }
    return partial(functional_call, model, named)


@pytest.fixture(scope="module")
def support():
    inputs, targets, queries, _ = WAVES(1, torch.Generator().manual_seed(7))
    return inputs[0], targets[0], queries[0]


@pytest.mark.parametrize("steps", [None, 0, 1, 7])
def test_an_adapted_model_is_the_inner_loops_and_the_model_stays_as_it_was(steps, support):
    inputs, targets, queries = support
    model = maml.network(SMALL)
    before = flat(model.parameters())
    with torch.no_grad():  # as at prediction time
        adapted = maml.adapt(model, (inputs, targets), config=SMALL, steps=steps)
    number = SMALL.test_steps if steps is None else steps
    expected = plainly_adapted(model, inputs, targets, steps=number, rate=SMALL.inner_lr)((queries,))
    torch.testing.assert_close(adapted(queries), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(flat(model.parameters()), before)
    assert torch.equal(flat(adapted.parameters()), before) == (steps == 0)


def test_adaptation_takes_a_loss_of_ones_own(support):
    inputs, targets, queries = support
    model = maml.network(SMALL)
    adapted = maml.adapt(model, (inputs, targets), config=SMALL, loss=smooth_l1_loss)
    expected = plainly_adapted(model, inputs, targets, steps=3, rate=SMALL.inner_lr, loss=smooth_l1_loss)
    torch.testing.assert_close(adapted(queries), expected((queries,)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(adapted(queries), maml.adapt(model, (inputs, targets), config=SMALL)(queries))


def test_a_head_alone_is_adapted_where_the_config_says_so(support):
    inputs, targets, _ = support
    model = maml.network(SMALL)
    adapted = maml.adapt(model, (inputs, targets), config=dataclasses.replace(SMALL, adapt="head"))
    changed = [
        name
        for (name, one), other in zip(model.named_parameters(), adapted.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert changed == ["4.weight", "4.bias"]


@pytest.mark.parametrize("adapt, frozen", [("head", ("4.",)), ("body", ("0.", "2."))])
def test_an_inner_loop_with_nothing_to_change_is_refused(adapt, frozen, tmp_path):
    with pytest.raises(ConfigError, match=f"^adapt: {adapt}, but the model has no parameters there, or they are"):
        train(single_process(), tmp_path, adapt=adapt, frozen=frozen)


def test_two_lines_adapt_the_network_of_a_run(finished, support):
    run_dir, inputs, targets, queries = str(finished[0]), *support
    model, settings = maml.load(run_dir)
    adapted = maml.adapt(model, (inputs, targets), **settings)

    config, rates = settings["config"], settings["rates"]
    assert (config.width, config.test_steps, config.learn_inner_lr) == (8, 3, True)
    expected = maml.network(config)
    expected.load_state_dict(load_module(run_dir, "model"))
    by_name = {name: part.detach() for name, part in rates.by_name().items()}
    assert any((part != config.inner_lr).any() for part in by_name.values())
    named = {name: part.detach().requires_grad_() for name, part in expected.named_parameters()}
    for _ in range(3):
        loss = mse_loss(functional_call(expected, named, (inputs,)), targets)
        found = torch.autograd.grad(loss, list(named.values()))
        named = {
            name: (part - by_name[name] * g).detach().requires_grad_()
            for (name, part), g in zip(named.items(), found, strict=True)
        }
    torch.testing.assert_close(adapted(queries), functional_call(expected, named, (queries,)), rtol=1e-5, atol=1e-6)


def test_the_best_and_the_last_network_of_a_run_are_loaded_as_asked(tmp_path):
    calls = itertools.count()

    def ever_harder(number, generator):
        inputs, targets, queries, answers = WAVES(number, generator)
        return inputs, targets, queries, answers + 100 * next(calls)

    state = train(single_process(), tmp_path, steps=4, validate_every=2, val_tasks=ever_harder, lr=0.01)
    assert read_best(tmp_path)["step"] == 2
    loaded = {which: maml.load(str(tmp_path), which=which)[0] for which in ("best", "last")}
    assert torch.equal(flat(loaded["last"].parameters()), parameters(state))
    for which, model in loaded.items():
        saved = load_module(tmp_path, "model", which=which)
        assert all(torch.equal(part, saved[name]) for name, part in model.state_dict().items())
    assert not torch.equal(*(flat(model.parameters()) for model in loaded.values()))


# What a user gives


def rays(number, generator):
    """Tasks of one's own, lines with slopes around 5: a plain function that returns a plain tuple."""
    slopes = 4 + 2 * torch.rand(number, 1, 1, generator=generator)
    points = torch.randn(number, 9, 1, generator=generator)
    return points[:, :4], slopes * points[:, :4], points[:, 4:], slopes * points[:, 4:]


def test_a_model_of_ones_own_learns_to_start_from_the_middle_of_tasks_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    state = train(single_process(), tmp_path, model=model, tasks=rays, steps=150, lr=0.1, log_every=150)
    assert float(state.model.weight.detach()) == pytest.approx(5, abs=0.2)
    scores = read_rows(tmp_path)[-1]
    assert scores["val/loss"] < scores["val/loss_after/00"] < 1


def test_tasks_of_a_step_are_a_function_of_the_step_and_others_than_the_held_out_ones(tmp_path):
    drawn = []

    def kept(number, generator):
        drawn.append((number, generator.initial_seed(), WAVES(number, generator)))
        return drawn[-1][-1]

    train(single_process(), tmp_path, tasks=kept, steps=3)
    steps, held_out = drawn[:3], drawn[3:]
    assert [number for number, _, _ in drawn] == [5, 5, 5, 5]
    for step, (_, _, tasks) in enumerate(steps):
        again = WAVES(5, seed_step(0, step, single_process()).shared)
        assert all(torch.equal(*pair) for pair in zip(tasks, again, strict=True))
    assert [seed for _, seed, _ in held_out] == [hash_seed(0, "held-out tasks")]
    assert len({seed for _, seed, _ in drawn}) == 4


def test_held_out_tasks_of_ones_own_are_what_is_validated_on(tmp_path):
    def flat_lines(number, generator):
        inputs, _, queries, _ = WAVES(number, generator)
        return inputs, torch.zeros_like(inputs), queries, torch.full_like(queries, 100.0)

    train(single_process(), tmp_path, steps=1, val_tasks=flat_lines)
    rows = read_rows(tmp_path)
    assert 9e3 < rows[-1]["val/loss"] < 1.1e4
    assert rows[0]["loss/query"] < 100


def test_a_loss_of_ones_own_is_that_of_both_loops(tmp_path):
    def loss(outputs, targets):
        assert outputs.shape == targets.shape
        assert outputs.dim() == 2  # of one task
        return smooth_l1_loss(outputs, targets)

    state = train(single_process(), tmp_path, steps=1, loss=loss)
    model, total = maml.network(SMALL), 0
    named = dict(model.named_parameters())
    for tasks in zip(*WAVES(5, seed_step(0, 0, single_process()).shared), strict=True):
        inner = smooth_l1_loss(functional_call(model, named, (tasks[0],)), tasks[1])
        found = torch.autograd.grad(inner, list(named.values()), create_graph=True)
        adapted = {name: part - 0.05 * g for (name, part), g in zip(named.items(), found, strict=True)}
        total = total + smooth_l1_loss(functional_call(model, adapted, (tasks[2],)), tasks[3]) / 5
    expected = flat(torch.autograd.grad(total, list(named.values())))
    torch.testing.assert_close(gradient(state).float(), expected, rtol=1e-4, atol=1e-6)


class Unstored:
    """An iterable of meta-batches that does not know its place."""

    def __init__(self, size=5, number=100):
        self.size, self.number = size, number

    def __iter__(self):
        for k in range(self.number):
            yield WAVES(self.size, torch.Generator().manual_seed(k))


def run_on_unstored(fabric, config):
    return maml.train(fabric, config, model=maml.network(config), tasks=Unstored(number=4))


@pytest.mark.filterwarnings("ignore:dataset. a Unstored has no state_dict; reading 7 batches forward:UserWarning")
def test_an_iterable_without_a_state_is_begun_again_at_its_end_and_read_forward_on_resume(tmp_path):
    assert_resumes_exactly(run_on_unstored, SMALL, stop_at=7, folder=tmp_path)
    rows = read_rows(tmp_path / "straight")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert not any("val/loss" in row for row in rows)  # there is nothing to draw held-out tasks from


def test_an_iterable_gives_the_run_of_the_sampler_that_it_draws_from(tmp_path):
    seeds = itertools.count()

    def same_tasks(number, generator):
        return WAVES(number, torch.Generator().manual_seed(next(seeds)))

    one = train(single_process(), tmp_path / "sampler", tasks=same_tasks, val_tasks=WAVES.__call__)
    stream = TaskStream(single_process(), WAVES, 5)
    other = train(single_process(), tmp_path / "iterable", tasks=stream, val_tasks=WAVES.__call__)
    assert torch.equal(parameters(one), parameters(other))


def test_an_iterable_of_another_number_of_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^meta_batch_size: 5 over 1 processes is 5 for process 0, but the iterable"):
        train(single_process(), tmp_path, tasks=Unstored(size=4))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_running_statistics_are_refused_with_the_remedy(norm, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ConfigError) as refusal:
        train(single_process(), tmp_path, model=model, tasks=image_tasks())
    assert f"running statistics in 1 ({type(norm).__name__})" in str(refusal.value)
    assert "track_running_stats=False, or call with_batch_statistics(model)" in str(refusal.value)
    assert not (tmp_path / "checkpoints").exists()


def test_accuracy_is_logged_and_validated_where_targets_are_classes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    fields = {"steps": 30, "lr": 1e-2, "ways": 3, "log_every": 10, "inner_lr": 0.1}
    train(single_process(), tmp_path, model=model, tasks=image_tasks(), **fields)
    rows = read_rows(tmp_path)
    assert rows[-1]["val/accuracy"] > 0.8 > 0.5 > rows[-1]["val/accuracy_after/00"]
    assert rows[2]["accuracy/query"] > rows[0]["accuracy/query"]
    assert rows[-1]["val/accuracy_interval"] < 0.2


def test_prototypes_are_the_class_means_of_the_supports_features():
    tasks = image_tasks()(2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = tasks[0].double(), tasks[1]
    config = dataclasses.replace(SMALL, proto_head=True, ways=3)
    start = maml.starting_point(
        TaskModel(Bare(module, Precision()), together=True), config, maml.initial_of(module), inputs, targets
    )
    queries = tasks[2].double()
    for task in range(2):
        own = {name: part[task] for name, part in start.items()}
        logits = functional_call(module, own, (queries[task],))
        features, of_queries = module[:3](inputs[task]), module[:3](queries[task])
        means = torch.stack([features[targets[task] == label].mean(0) for label in range(3)])
        distances = torch.cdist(of_queries, means).square()
        # Up to a number for each query, which a softmax takes away (Snell et al. 2017, eq. 8).
        torch.testing.assert_close(logits.softmax(1), (-distances).softmax(1), rtol=1e-8, atol=1e-10)


def of_two_layers(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, classes))


def test_there_are_as_many_prototypes_as_the_model_has_outputs(tmp_path):
    # The setting is of the tasks that the command line builds, and these are of three classes.
    train(single_process(), tmp_path, model=of_two_layers(3), tasks=image_tasks(), proto_head=True, steps=2)
    assert read_rows(tmp_path)[-1]["val/loss"] < 10


def test_a_class_that_the_support_lacks_begins_at_zero():
    inputs, targets = image_tasks()(2, torch.Generator().manual_seed(0))[:2]
    module, config = of_two_layers(5), dataclasses.replace(SMALL, proto_head=True)
    model = TaskModel(Bare(module, Precision()), together=True)
    start = maml.starting_point(model, config, maml.initial_of(module), inputs, targets.to(torch.uint8))
    for part in (start["3.weight"], start["3.bias"]):
        assert (part[:, :3].detach().abs().flatten(1).amin(1) > 0).all()
        assert (part[:, 3:] == 0).all()


@pytest.mark.parametrize("head", [nn.Linear(6, 3, bias=False), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))])
def test_prototypes_of_a_model_without_a_last_layer_to_begin_with_are_refused(head, tmp_path):
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), trunk=nn.Linear(64, 6), head=head))
    with pytest.raises(ConfigError, match=r"^proto_head: the last layer is a \w+; make it an nn\.Linear with"):
        train(single_process(), tmp_path, model=model, tasks=image_tasks(), proto_head=True)


# Compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_a_compiled_run_is_the_eager_one_and_is_compiled_into_one_graph(tmp_path, monkeypatch):
    compile_graph, found, graphs = compiled_gradient.compile_graph, [], []

    def counted(record, examples):
        graphs.append(record)
        return compile_graph(record, examples)

    monkeypatch.setattr(compiled_gradient, "compile_graph", counted)
    for compiled in (False, True):
        fields = {"steps": 4, "precision": "64-true", "compile": compiled, "inner_steps": 2, "learn_inner_lr": True}
        found.append(parameters(train(single_process("64-true"), tmp_path / str(compiled), **fields)))
        assert len(graphs) == int(compiled)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


# The command line

FLAGS = (
    *("--accelerator", "cpu", "--width", 8, "--meta_batch_size", 4, "--shots", 3, "--query_shots", 4),
    *("--test_steps", 3, "--val_tasks", 6, "--test_tasks", 8, "--log_every", 5, "--validate_every", 6),
    *("--checkpoint_every", 4, "--learn_inner_lr", "true"),
)


@pytest.fixture
def program(monkeypatch, capsys):
    """``program(*words) -> (status, printed, errors)``: the recipe's file as ``__main__``, without a new process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["maml", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / "recipes" / "maml.py"), run_name="__main__")
        return leaving.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory and output of a run of 12 steps in a process of its own."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    status, printed, errors = finish(start("maml", *FLAGS, "--steps", 12, "--run_dir", run_dir))
    assert status == 0, errors
    return run_dir, printed


def test_a_run_leaves_curves_before_and_after_every_inner_step_and_pictures(finished):
    events = EventAccumulator(str(finished[0])).Reload()
    after = {f"{name}/loss_after/{step:02d}" for name in ("val", "joint") for step in range(4)}
    assert {"loss/query", "val/loss", "val/loss_interval", "joint/loss"} | after <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("adaptation")] == [6, 12]
    rows = [(row["step"], "val/loss" in row) for row in read_rows(finished[0])]
    assert rows == [(5, False), (6, True), (10, False), (12, False), (12, True)]
    assert json.loads((finished[0] / "status.json").read_text())["state"] == "complete"


def test_the_summary_is_the_test_of_the_best_checkpoint(finished):
    run_dir, printed = finished
    title, network, joint, *_ = printed.split("\n\n")[1].splitlines()
    assert title == "after 3 inner steps, mean and 95% interval over 8 held-out tasks"
    assert (network.split()[:2], joint.split()[:2]) == (["MAML", "loss"], ["joint", "loss"])
    assert f"look: tensorboard --logdir {run_dir}" in printed

    config = MAMLConfig(**yaml.safe_load((run_dir / "config.yaml").read_text()))
    model, settings = maml.load(str(run_dir))
    seed = hash_seed(hash_seed(0, "held-out tasks"), "test")
    tasks = Sinusoids(3, 4)(8, torch.Generator().manual_seed(seed))
    losses = []
    for support_inputs, support_targets, query_inputs, query_targets in zip(*tasks, strict=True):
        adapted = maml.adapt(model, (support_inputs, support_targets), **settings)
        losses.append(float(mse_loss(adapted(query_inputs), query_targets).detach()))
    assert config.test_tasks == 8
    assert float(network.split()[2]) == pytest.approx(sum(losses) / 8, abs=6e-5)


def printed_config(program, *words):
    status, printed, errors = program(*words, "--print_config")
    assert (status, errors) == (0, "")
    return yaml.safe_load(printed)


def test_every_preset_is_the_defaults_and_what_it_changes(program):
    defaults = printed_config(program)
    for name, preset in maml.PRESETS.items():
        assert printed_config(program, "--preset", name) == {**defaults, **preset}


PAPER = {  # Finn et al. 2017, appendix A.1: ways, shots, inner rate, inner steps in training and in testing, tasks
    "omniglot-5way-1shot": (5, 1, 0.4, 1, 3, 32),
    "omniglot-5way-5shot": (5, 5, 0.4, 1, 3, 32),
    "omniglot-20way-1shot": (20, 1, 0.1, 5, 5, 16),
    "omniglot-20way-5shot": (20, 5, 0.1, 5, 5, 16),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_omniglot_have_the_papers_settings(name):
    config = MAMLConfig(**maml.PRESETS[name])
    found = (config.ways, config.shots, config.inner_lr, config.inner_steps, config.test_steps, config.meta_batch_size)
    assert found == PAPER[name]
    assert (config.steps, config.width, config.query_shots) == (60000, 64, config.shots)


@pytest.mark.parametrize(
    "words, named",
    [
        (("--preset", "mini-imagenet"), "preset: 'mini-imagenet' is unknown; there are sinusoid, sinusoid-paper"),
        (("--colour", "red"), "--colour"),
        (("--inner_optimizer", "lion"), "inner_optimizer"),
        (("--adapt", "tail"), "adapt"),
        (("--meta_batch_size", 0), "meta_batch_size: 0; it must be at least 1"),
        (("--inner_steps", -1), "inner_steps: -1; it must be at least 0"),
        (("--inner_lr", -0.1), "inner_lr: -0.1; it must be at least 0"),
        (("--ways", 1), "ways: 1; it must be at least 2"),
        (("--exact_reduction", "true", "--compile", "true"), "exact_reduction: needs each task's own gradient"),
        (("--proto_head", "true"), "proto_head: targets are numbers; it needs classes"),
        (("--proto_head", "true", "--adapt", "body"), "proto_head: the inner loop goes on from that head"),
        (("--frozen", "[nothing]"), "frozen: no parameter's name begins with 'nothing'"),
        (("--preset", "omniglot-5way-1shot"), "data_root: none, but data omniglot needs one; give --data_root DIR"),
        (("--preset", "omniglot-5way-1shot", "--data_root", "nowhere"), "data_root: "),
        (("--strategy", "ddp"), "strategy: "),
        (("adapt",), "'adapt' is not a verb"),
    ],
)
def test_a_wrong_start_is_refused_in_one_line(words, named, program, tmp_path, monkeypatch):
    # As on a machine without torchvision, which would try to download.
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.chdir(tmp_path)
    status, printed, errors = program(*words)
    assert (status, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("error: ")
    assert named in line
