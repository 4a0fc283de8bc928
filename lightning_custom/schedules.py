"""Learning rates as pure functions of the step: printable, composable, with nothing to store.

    schedule = schedules.with_warmup(schedules.Cosine(peak=1e-3, decay_steps=9500), steps=500)

    while state.step < config.steps:
        schedules.set_learning_rate(optimizer, schedule, state.step)

A schedule is anything that takes the number of finished steps and returns a float, so a ``lambda`` is one too. Any
step can be asked for in any order, which is why a resumed run needs nothing of it. Those that torch has are equal to
torch's over their whole course; where a course has an end, the rate stays at its last value.

A scheduler object of torch's works as well: made on the loop's optimizer and kept as a field of the state it has
``state_dict`` and ``load_state_dict``, so it is in the checkpoint. Call its ``step()`` after ``state.step += 1``.
"""

# ruff: noqa: D102 - what a schedule's one method does stands in its class's docstring
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_custom.errors import ConfigError

Schedule = Callable[[int], float]
"""The learning rate of a step, given the number of steps finished before it."""
Name = Literal["constant", "linear", "cosine", "one_cycle"]


@dataclass(frozen=True)
class Constant:
    """The same rate at every step."""

    rate: float

    def __call__(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over ``steps``, then ``end``; torch's ``LinearLR``."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _at_least_one("steps", self.steps)

    def __call__(self, step: int) -> float:
        return _between(self.start, self.end, min(step / self.steps, 1.0))


@dataclass(frozen=True)
class Cosine:
    """From ``peak`` to ``minimum`` along half a cosine over ``decay_steps``, then ``minimum``.

    ``decay_steps`` is a number of its own, not the run's ``steps``, so that a run may be extended. Loshchilov and
    Hutter 2017, eq. 5; torch's ``CosineAnnealingLR``, which climbs again afterwards.
    """

    peak: float
    decay_steps: int
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _at_least_one("decay_steps", self.decay_steps)

    def __call__(self, step: int) -> float:
        return _along_cosine(self.peak, self.minimum, min(step / self.decay_steps, 1.0))


@dataclass(frozen=True)
class StepDecay:
    """``initial``, multiplied by ``factor`` after every ``every`` steps; torch's ``StepLR``."""

    initial: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        _at_least_one("every", self.every)

    def __call__(self, step: int) -> float:
        return self.initial * self.factor ** (step // self.every)


@dataclass(frozen=True)
class Exponential:
    """``initial``, multiplied by ``factor`` after every step; torch's ``ExponentialLR``."""

    initial: float
    factor: float

    def __call__(self, step: int) -> float:
        return self.initial * self.factor**step


@dataclass(frozen=True)
class Cyclical:
    """Up from ``minimum`` to ``peak`` over ``up_steps``, down over ``down_steps`` (none: as many), again and again.

    ``triangular`` repeats itself, ``triangular2`` halves the height with every cycle, ``exp_range`` multiplies it by
    ``factor`` with every step. Smith 2017; torch's ``CyclicLR``.
    """

    minimum: float
    peak: float
    up_steps: int
    down_steps: int | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _at_least_one("up_steps", self.up_steps)
        if self.down_steps is not None:
            _at_least_one("down_steps", self.down_steps)
        _one_of("mode", self.mode, ("triangular", "triangular2", "exp_range"))

    def __call__(self, step: int) -> float:
        down_steps = self.up_steps if self.down_steps is None else self.down_steps
        cycle, position = divmod(step, self.up_steps + down_steps)
        height = min(position / self.up_steps, 1 - (position - self.up_steps) / down_steps)
        if self.mode == "triangular2":
            height *= 0.5**cycle
        elif self.mode == "exp_range":
            height *= self.factor**step
        return self.minimum + (self.peak - self.minimum) * height


@dataclass(frozen=True)
class OneCycle:
    """From ``peak / start_divisor`` up to ``peak``, then down to ``peak / start_divisor / end_divisor``.

    The way up takes the share ``warmup`` of ``total_steps``; where that is less than a step it is left out. With
    ``three_phase`` the way down first mirrors the way up, then goes on to the end. The last rate belongs to step
    ``total_steps - 1``. Smith and Topin 2018; torch's ``OneCycleLR``, without its momentum: set ``group["momentum"]``
    from a second schedule where it is wanted.
    """

    peak: float
    total_steps: int
    warmup: float = 0.3
    start_divisor: float = 25.0
    end_divisor: float = 1e4
    anneal: Literal["cosine", "linear"] = "cosine"
    three_phase: bool = False

    def __post_init__(self) -> None:
        _one_of("anneal", self.anneal, ("cosine", "linear"))
        _at_least_one("total_steps", self.total_steps)
        largest = 0.5 if self.three_phase else 1.0
        if not 0 <= self.warmup < largest:
            raise ConfigError(f"warmup: {self.warmup}; give a share from 0 to below {largest}")

    def __call__(self, step: int) -> float:
        start = self.peak / self.start_divisor
        top = self.warmup * self.total_steps - 1
        knots = [(0.0, start), (top, self.peak)]
        if self.three_phase:
            knots.append((2 * top, start))
        knots.append((self.total_steps - 1.0, start / self.end_divisor))
        anneal = _along_cosine if self.anneal == "cosine" else _between
        for (begin, high), (end, low) in pairwise(knots):
            if step <= end > begin:
                return anneal(high, low, (step - begin) / (end - begin))
        return knots[-1][1]


@dataclass(frozen=True)
class WarmRestarts:
    """A cosine from ``peak`` to ``minimum`` over ``first_steps``, begun anew each time it ends.

    Every course is ``multiplier`` times as long as the one before it. SGDR, Loshchilov and Hutter 2017, whose T_0 and
    T_mult these are; torch's ``CosineAnnealingWarmRestarts``.
    """

    peak: float
    first_steps: int
    multiplier: int = 1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        _at_least_one("first_steps", self.first_steps)
        _at_least_one("multiplier", self.multiplier)

    def __call__(self, step: int) -> float:
        length = self.first_steps
        if self.multiplier == 1:
            step %= length
        # Whole numbers: a logarithm would be off by one course at some restarts.
        while step >= length:
            step -= length
            length *= self.multiplier
        return _along_cosine(self.peak, self.minimum, step / length)


@dataclass(frozen=True)
class Join:
    """One schedule after another: the next takes over at its boundary, and counts its steps from there.

    ``boundaries`` are steps, one fewer than ``schedules``, rising. torch's ``SequentialLR``.
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.boundaries) != len(self.schedules) - 1:
            raise ConfigError(
                f"boundaries: {len(self.boundaries)} for {len(self.schedules)} schedules; give one fewer than schedules"
            )
        if any(later <= earlier for earlier, later in pairwise((0, *self.boundaries))):
            raise ConfigError(f"boundaries: {list(self.boundaries)}; give rising steps above 0")

    def __call__(self, step: int) -> float:
        index = bisect_right(self.boundaries, step)
        return self.schedules[index](step - (self.boundaries[index - 1] if index else 0))


@dataclass(frozen=True)
class Scaled:
    """``factor`` times another schedule, for a parameter group that learns more slowly, or faster, than the rest."""

    schedule: Schedule
    factor: float

    def __call__(self, step: int) -> float:
        return self.factor * self.schedule(step)


def with_warmup(schedule: Schedule, steps: int, *, start: float = 0.0) -> Join:
    """``schedule`` after a straight line over ``steps`` from ``start`` to its first rate.

    Step 0 has the rate ``start``: with the default it changes no weight.

    >>> [round(with_warmup(Constant(0.4), 4)(step), 3) for step in range(6)]
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]
    """
    return Join((Linear(start, schedule(0), steps), schedule), (steps,))


def named(name: Name, lr: float, steps: int, *, warmup_steps: int = 0) -> Schedule:
    """The schedule that a config names, of the highest rate ``lr`` over ``steps``, of which the first are a warm-up.

    ``linear`` and ``cosine`` fall to 0.

    >>> [round(named("linear", 0.4, 4, warmup_steps=2)(step), 3) for step in range(5)]
    [0.0, 0.2, 0.4, 0.2, 0.0]
    """
    length = max(steps - warmup_steps, 1)
    kinds: dict[Name, Callable[[], Schedule]] = {
        "constant": lambda: Constant(lr),
        "linear": lambda: Linear(lr, 0.0, length),
        "cosine": lambda: Cosine(lr, length),
        "one_cycle": lambda: OneCycle(lr, length),
    }
    schedule = kinds[name]()
    return with_warmup(schedule, warmup_steps) if warmup_steps else schedule


def set_learning_rate(optimizer: Optimizer, schedule: Schedule | Mapping[int | str, Schedule], step: int) -> None:
    """Give every parameter group the rate of ``step``, or each its own by index or by the group's ``name``.

    A group that the mapping leaves out keeps its rate. Works on what ``fabric.setup`` returns. :class:`ConfigError`
    for a key without a group, for two keys of one group, and for a rate that is a tensor.
    """
    groups = optimizer.param_groups
    if callable(schedule):
        by_index: Mapping[int, Schedule] = dict.fromkeys(range(len(groups)), schedule)
    else:
        by_index = _by_index(optimizer, schedule)
    for index, schedule_of_group in by_index.items():
        if isinstance(groups[index]["lr"], Tensor):
            # One tensor may be shared by all groups, and a captured graph would go on reading it.
            raise ConfigError(
                f"lr: parameter group {index} has a tensor; give the optimizer a float, or fill the tensor in the loop"
            )
        groups[index]["lr"] = float(schedule_of_group(step))


def _by_index(optimizer: Optimizer, schedules: Mapping[int | str, Schedule]) -> dict[int, Schedule]:
    names = {group["name"]: index for index, group in enumerate(optimizer.param_groups) if "name" in group}
    found: dict[int, Schedule] = {}
    for key, schedule in schedules.items():
        index = names.get(key) if isinstance(key, str) else key
        if index is None or not 0 <= index < len(optimizer.param_groups):
            raise ConfigError(
                f"schedule: {key!r} is no parameter group; there are 0 to {len(optimizer.param_groups) - 1}"
                + (f", named {', '.join(map(repr, names))}" if names else ', and none has a "name"')
            )
        if index in found:
            raise ConfigError(f"schedule: {key!r} is parameter group {index}, which has one already; give one")
        found[index] = schedule
    return found


def _between(start: float, end: float, share: float) -> float:
    return start * (1 - share) + end * share


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{field}: {value}; give at least 1")


def _one_of(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{field}: {value!r}; choose one of {', '.join(choices)}")
