import pickle
import random
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler

from lightning_custom.errors import ConfigError
from lightning_custom.schedules import (
    Constant,
    Cosine,
    Cyclical,
    Exponential,
    Join,
    Linear,
    OneCycle,
    Scaled,
    StepDecay,
    WarmRestarts,
    set_learning_rate,
    with_warmup,
)
from lightning_custom.state import capture, mismatches, restore_
from lightning_custom.testing import first_difference, single_process


def two_groups(optimizer_class=SGD, lr=0.4, **settings):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "name": name} for name in ("trunk", "head")]
    return optimizer_class(groups, lr=lr, **settings)


def rates_of_torch(scheduler_of, steps, lr):
    """The rates that a scheduler of torch's gives to ``steps`` steps, going through them in order."""
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def linear_then_exponential(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.05, total_iters=30),
        lr_scheduler.ExponentialLR(optimizer, 0.99),
        lr_scheduler.StepLR(optimizer, 20, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [30, 75])


restarts = lr_scheduler.CosineAnnealingWarmRestarts
cyclic = partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.4, cycle_momentum=False)
one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.4, total_steps=200, cycle_momentum=False)

# Schedule, torch's scheduler on an optimizer with rate 0.4, and the number of steps that both are asked for.
EQUALS = {
    "linear": (Linear(0.02, 0.4, 60), partial(lr_scheduler.LinearLR, start_factor=0.05, total_iters=60), 100),
    "linear down": (
        Linear(0.4, 0.04, 60),
        partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=60),
        100,
    ),
    "cosine": (Cosine(0.4, 100, 1e-3), partial(lr_scheduler.CosineAnnealingLR, T_max=100, eta_min=1e-3), 101),
    # The recurrence of CosineAnnealingLR loses digits where it ends at zero; one course of SGDR is the same curve.
    "cosine to zero": (Cosine(0.4, 1000), partial(restarts, T_0=1000), 1000),
    "step": (StepDecay(0.4, 17, 0.3), partial(lr_scheduler.StepLR, step_size=17, gamma=0.3), 100),
    "exponential": (Exponential(0.4, 0.97), partial(lr_scheduler.ExponentialLR, gamma=0.97), 200),
    "triangular": (Cyclical(0.01, 0.4, 12, 30), partial(cyclic, step_size_up=12, step_size_down=30), 300),
    "triangular, even": (Cyclical(0.01, 0.4, 25), partial(cyclic, step_size_up=25), 300),
    "triangular2": (
        Cyclical(0.01, 0.4, 12, 30, mode="triangular2"),
        partial(cyclic, step_size_up=12, step_size_down=30, mode="triangular2"),
        300,
    ),
    "exp_range": (
        Cyclical(0.01, 0.4, 12, 30, mode="exp_range", factor=0.99),
        partial(cyclic, step_size_up=12, step_size_down=30, mode="exp_range", gamma=0.99),
        300,
    ),
    "one cycle": (OneCycle(0.4, 200), one_cycle, 200),
    "one cycle, linear": (
        OneCycle(0.4, 200, anneal="linear", end_divisor=50),
        partial(one_cycle, anneal_strategy="linear", final_div_factor=50),
        200,
    ),
    "one cycle, three phases": (
        OneCycle(0.4, 200, warmup=0.22, start_divisor=10, three_phase=True),
        partial(one_cycle, pct_start=0.22, div_factor=10, three_phase=True),
        200,
    ),
    "one cycle, three phases, linear": (
        OneCycle(0.4, 200, anneal="linear", end_divisor=50, three_phase=True),
        partial(one_cycle, anneal_strategy="linear", final_div_factor=50, three_phase=True),
        200,
    ),
    "one cycle, a way up shorter than a step": (
        OneCycle(0.4, 40, warmup=0.02),
        partial(one_cycle, total_steps=40, pct_start=0.02),
        40,
    ),
    "restarts": (WarmRestarts(0.4, 40, minimum=1e-3), partial(restarts, T_0=40, eta_min=1e-3), 200),
    "restarts, doubled": (WarmRestarts(0.4, 10, 2), partial(restarts, T_0=10, T_mult=2), 400),
    "restarts, tripled": (WarmRestarts(0.4, 5, 3), partial(restarts, T_0=5, T_mult=3), 700),
    "join": (
        Join((Linear(0.02, 0.4, 30), Exponential(0.4, 0.99), StepDecay(0.4, 20, 0.5)), (30, 75)),
        linear_then_exponential,
        160,
    ),
}


# Of torch 2.6's own SequentialLR.
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", EQUALS)
def test_equals_torch_over_the_whole_course(name):
    schedule, scheduler_of, steps = EQUALS[name]
    expected = rates_of_torch(scheduler_of, steps, lr=0.4)
    assert len(set(expected)) > 2, "the reference does not move"
    assert [schedule(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", EQUALS)
def test_any_step_can_be_asked_for_in_any_order(name):
    schedule, _, steps = EQUALS[name]
    in_order = [schedule(step) for step in range(steps)]
    order = random.Random(0).sample(range(steps), steps)
    assert [schedule(step) for step in order] == [in_order[step] for step in order]


@pytest.mark.parametrize("name", EQUALS)
def test_what_is_printed_makes_the_schedule_again(name):
    schedule = EQUALS[name][0]
    assert eval(repr(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "schedule, last, rate",
    [
        (Constant(0.3), 0, 0.3),
        (Linear(0.1, 0.3, 7), 7, 0.3),
        (Cosine(0.3, 7, 0.1), 7, 0.1),
        (OneCycle(0.5, 50), 49, 0.5 / 25 / 1e4),
        (OneCycle(0.5, 50, anneal="linear", three_phase=True), 49, 0.5 / 25 / 1e4),
    ],
    ids=str,
)
def test_rate_stays_at_the_last_value_to_the_bit(schedule, last, rate):
    assert [schedule(step) for step in (last, last + 1, 10 * last + 1000)] == [rate] * 3


def test_one_cycle_whose_way_up_is_one_step_begins_at_the_peak():
    """torch divides by zero there."""
    assert OneCycle(0.4, 4, warmup=0.25)(0) == 0.4
    assert OneCycle(0.4, 1)(0) == 0.4 / 25 / 1e4


def test_warmup_rises_to_the_first_rate_and_shifts_the_rest():
    cosine = Cosine(0.4, 90)
    schedule = with_warmup(cosine, 10, start=0.1)
    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx([0.1, 0.25, 0.4], rel=1e-15)
    assert [schedule(10 + step) for step in range(95)] == [cosine(step) for step in range(95)]


def test_extending_a_run_does_not_change_the_steps_before():
    """A schedule with steps of its own does not read the horizon: that of a longer one would differ."""
    assert Cosine(0.4, 100)(50) != Cosine(0.4, 200)(50)
    assert Scaled(Cosine(0.4, 100), 0.5)(50) == 0.5 * Cosine(0.4, 100)(50)


def test_one_schedule_sets_every_group_and_a_mapping_each_its_own():
    optimizer = two_groups()
    set_learning_rate(optimizer, Linear(0.0, 1.0, 4), 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    set_learning_rate(optimizer, {"head": Linear(0.0, 1.0, 4), 0: lambda step: step // 2}, 3)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.75]
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    set_learning_rate(optimizer, {"trunk": Constant(0.5)}, 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.75]


def test_rate_reaches_the_step_of_an_optimizer_that_fabric_wrapped():
    module = nn.Linear(1, 1, bias=False)
    raw = SGD(module.parameters(), lr=100.0)
    module, optimizer = single_process().setup(module, raw)
    before = module.weight.item()
    set_learning_rate(optimizer, Constant(0.5), 0)
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    assert raw.param_groups[0]["lr"] == 0.5
    assert module.weight.item() == pytest.approx(before - 0.5, abs=1e-6)


@pytest.mark.parametrize(
    "schedules, text",
    [
        ({"tail": Constant(1.0)}, r"'tail' is no parameter group; there are 0 to 1, named 'trunk', 'head'"),
        ({2: Constant(1.0)}, "2 is no parameter group; there are 0 to 1"),
        ({-1: Constant(1.0)}, "-1 is no parameter group"),
        ({"head": Constant(1.0), 1: Constant(2.0)}, "1 is parameter group 1, which has one already"),
    ],
)
def test_a_key_without_a_group_is_refused(schedules, text):
    with pytest.raises(ConfigError, match=text):
        set_learning_rate(two_groups(), schedules, 0)


def test_a_rate_that_is_a_tensor_is_refused():
    optimizer = two_groups(Adam, lr=torch.tensor(0.1))
    with pytest.raises(ConfigError, match="lr: parameter group 0 has a tensor"):
        set_learning_rate(optimizer, Constant(0.1), 0)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Linear(0, 1, 0), "steps: 0; give at least 1"),
        (lambda: Cosine(1, 0), "decay_steps: 0; give at least 1"),
        (lambda: StepDecay(1, 0), "every: 0; give at least 1"),
        (lambda: Cyclical(0, 1, 0), "up_steps: 0; give at least 1"),
        (lambda: Cyclical(0, 1, 5, 0), "down_steps: 0; give at least 1"),
        (lambda: Cyclical(0, 1, 5, mode="square"), "mode: 'square'; choose one of triangular, triangular2, exp_range"),
        (lambda: OneCycle(1, 100, anneal="cos"), "anneal: 'cos'; choose one of cosine, linear"),
        (lambda: OneCycle(1, 0), "total_steps: 0; give at least 1"),
        (lambda: OneCycle(1, 100, 1.0), "warmup: 1.0; give a share from 0 to below 1.0"),
        (lambda: OneCycle(1, 100, 0.5, three_phase=True), "warmup: 0.5; give a share from 0 to below 0.5"),
        (lambda: WarmRestarts(1, 0), "first_steps: 0; give at least 1"),
        (lambda: WarmRestarts(1, 5, 0), "multiplier: 0; give at least 1"),
        (lambda: Join((Constant(1),), (5,)), "boundaries: 1 for 1 schedules; give one fewer than schedules"),
        (lambda: Join((Constant(1),) * 3, (5, 5)), r"boundaries: \[5, 5\]; give rising steps above 0"),
    ],
)
def test_impossible_settings_are_refused(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@dataclass
class ScheduledState:
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler


SCHEDULERS = {
    **{name: scheduler_of for name, (_, scheduler_of, _) in EQUALS.items()},
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1),
    "multistep": partial(lr_scheduler.MultiStepLR, milestones=[5, 15, 15]),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=30, power=2.0),
}


def advance(state, steps, start=0):
    """The rates of ``steps`` steps; a scheduler that wants a metric gets one that stops falling."""
    rates = []
    for step in range(start, start + steps):
        state.optimizer.step()
        is_plateau = isinstance(state.scheduler, lr_scheduler.ReduceLROnPlateau)
        state.scheduler.step(*([max(1.0, 8.0 - step)] if is_plateau else []))
        rates.append([group["lr"] for group in state.optimizer.param_groups])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_goes_on_from_a_checkpoint(name, tmp_path):
    def fresh():
        optimizer = single_process().setup_optimizers(two_groups())
        return ScheduledState(optimizer, SCHEDULERS[name](optimizer))

    state = fresh()
    advance(state, 12)
    torch.save(capture(state), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    expected = advance(state, 12, start=12)
    assert len({rate for rates in expected for rate in rates}) > 1, "the rate does not move after the checkpoint"

    resumed = fresh()
    assert mismatches(resumed, stored, {}) == []
    # CyclicLR takes entries out of the dict that it loads.
    restore_(resumed, torch.load(tmp_path / "state.pt", weights_only=True), {})
    assert first_difference(stored, capture(resumed)) is None
    assert advance(resumed, 12, start=12) == expected
