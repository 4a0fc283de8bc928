from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_custom.data import Batches, GlobalOrder
from lightning_custom.errors import ConfigError
from lightning_custom.multitask.batches import TaskBatches
from lightning_custom.state import capture, capture_items, mismatches, restore_
from lightning_custom.testing import first_difference, single_process

SIZES = {"depth": 40, "edges": 10, "normals": 25}
SAMPLED = {
    "proportional": {},
    "temperature": {"temperature": 3.0},
    "ratios": {"ratios": {"depth": 1.0, "edges": 6.0, "normals": 3.0}},
}
every_sampling = pytest.mark.parametrize("sampling", ["cycle", "shortest", *SAMPLED])


def process(rank=0, world_size=1):
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, device=torch.device("cpu"), strategy=single_process().strategy
    )


def sources(sizes=SIZES):
    """Sample i of a task is i."""
    return {task: TensorDataset(torch.arange(size)) for task, size in sizes.items()}


def make(sampling="cycle", fabric=None, seed=0, batch_size=4, data=None, **options):
    return TaskBatches(
        fabric or process(),
        data or sources(),
        batch_size=batch_size,
        seed=seed,
        sampling=sampling,
        **{**SAMPLED.get(sampling, {}), **options},
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def samples(steps, task):
    return torch.cat([step[task][0] for step in steps if task in step]).tolist()


def passes(numbers, size):
    return [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]


def test_each_task_cycles_through_its_own_data():
    steps = take(make("cycle"), 50)
    for task, size in SIZES.items():
        assert all(sorted(part) == list(range(size)) for part in passes(samples(steps, task), size))
    assert all(list(step) == list(SIZES) for step in steps)


def test_with_the_shortest_every_task_begins_anew_with_other_samples():
    steps = take(make("shortest"), 50)  # 20 passes of 10 samples
    for task, size in SIZES.items():
        parts = passes(samples(steps, task), 10)
        assert len(parts) == 20
        assert all(len(set(part)) == 10 for part in parts)
        assert len({frozenset(part) for part in parts}) == (1 if task == "edges" else 20)
        assert set(samples(steps, task)) == set(range(size))
    # Which is not what cycling does: there a longer task repeats nothing before it is through.
    cycled = passes(samples(take(make("cycle"), 50), "depth"), 40)
    assert all(len(set(part)) == 40 for part in cycled)
    assert len(set(samples(steps, "depth")[:40])) < 40


def test_with_batch_sizes_of_their_own_the_first_to_end_is_the_shortest():
    batches = make("shortest", batch_size={"depth": 8, "edges": 1, "normals": 5})
    steps = take(batches, 10)  # two passes of depth and normals, one of edges: normals in 5 steps, depth too
    assert [step["depth"][0].shape[0] for step in steps] == [8] * 10
    for task, size in (("depth", 40), ("normals", 25), ("edges", 5)):
        first, second = passes(samples(steps, task), size)
        assert len(set(first)) == len(set(second)) == size


@pytest.mark.parametrize(
    "sampling, options, expected",
    [
        ("proportional", {}, [40 / 75, 10 / 75, 25 / 75]),
        ("temperature", {"temperature": 1.0}, [40 / 75, 10 / 75, 25 / 75]),
        ("temperature", {"temperature": 2.0}, [40**0.5, 10**0.5, 25**0.5]),
        ("temperature", {"temperature": 1e9}, [1, 1, 1]),
        ("temperature", {"temperature": 1e-4}, [1, 0, 0]),
        ("ratios", {"ratios": {"normals": 3.0, "depth": 1.0, "edges": 0.0}}, [1, 0, 3]),
    ],
)
def test_tasks_are_drawn_as_often_as_said(sampling, options, expected):
    batches, count = make(sampling, **options), 6000
    drawn = [batches.tasks_of(step) for step in range(count)]
    assert all(len(tasks) == 1 for tasks in drawn)
    for task, share in zip(SIZES, expected, strict=True):
        probability = share / sum(expected)
        assert batches.probabilities[task] == pytest.approx(probability, abs=1e-8)
        times = sum(tasks == [task] for tasks in drawn)
        # Four standard deviations.
        assert times == pytest.approx(count * probability, abs=4 * (count * probability * (1 - probability)) ** 0.5)


def test_draws_of_neighbouring_steps_are_independent():
    batches = make("ratios", ratios={"depth": 1.0, "edges": 1.0, "normals": 0.0})
    draws = [batches.tasks_of(step)[0] == "depth" for step in range(4000)]
    equal = sum(one == other for one, other in pairwise(draws))
    assert equal == pytest.approx(2000, abs=130)


@every_sampling
def test_a_steps_batches_are_a_function_of_seed_and_step(sampling):
    straight = take(make(sampling), 30)
    batches = make(sampling)
    states = []
    for step in straight:
        states.append(batches.state_dict())
        assert first_difference(step, next(batches)) is None
    for k in (0, 1, 13, 29):
        resumed = make(sampling)
        resumed.load_state_dict(states[k])
        assert first_difference(straight[k:], take(resumed, 30 - k)) is None
    assert first_difference(straight, take(make(sampling, seed=1), 30)) is not None


@pytest.mark.parametrize("sampling", SAMPLED)
def test_a_drawn_task_goes_on_where_it_was(sampling):
    batches = make(sampling)
    steps = take(batches, 60)
    for task, size in SIZES.items():
        times = sum(task in step for step in steps)
        assert batches.state_dict()["tasks"][task] == {"position": times}
        assert all(sorted(part) == list(range(size)) for part in passes(samples(steps, task), size))


@every_sampling
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_processes_are_the_global_batches(sampling, world_size):
    whole = take(make(sampling), 20)
    parts = [take(make(sampling, process(rank, world_size)), 20) for rank in range(world_size)]
    for k, step in enumerate(whole):
        assert all(part[k].keys() == step.keys() for part in parts)
        for task, (batch,) in step.items():
            assert torch.equal(batch, torch.cat([part[k][task][0] for part in parts]))


def test_each_task_reads_what_batches_of_its_own_would_read_and_none_as_another():
    data = sources({"one": 20, "other": 20})
    steps = take(make(data=data), 10)
    assert samples(steps, "one") != samples(steps, "other")
    alone = take(make(data={"one": data["one"]}), 10)
    assert samples(steps, "one") == samples(alone, "one")


@every_sampling
def test_the_order_of_the_tasks_changes_nothing(sampling):
    turned = dict(reversed(sources().items()))
    steps, others = take(make(sampling), 20), take(make(sampling, data=turned), 20)
    for step, other in zip(steps, others, strict=True):
        assert first_difference(dict(sorted(step.items())), dict(sorted(other.items()))) is None


@dataclass
class State:
    batches: TaskBatches
    step: int = 0


class Counter:
    """An iterable of batches with a state of its own."""

    def __init__(self):
        self.value = 0

    def __iter__(self):
        while True:
            self.value += 1
            yield torch.tensor([self.value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def mixed():
    """A map-style data set and two iterables, one with a name that looks like a path."""
    data = {"map": sources()["edges"], "a": Counter(), "a/b": Counter()}
    return State(make("ratios", data=data, ratios={"map": 1.0, "a": 2.0, "a/b": 3.0}))


def test_as_a_field_of_a_state_it_resumes_to_the_bit_with_iterables_states():
    straight, stopped, resumed = mixed(), mixed(), mixed()
    expected = take(straight.batches, 40)
    take(stopped.batches, 17)
    stored, items = capture(stopped), capture_items(stopped)
    assert items["batches"].keys() == {"a/process-00000", "a/b/process-00000"}
    named = {"batches": dict(items["batches"])}
    assert mismatches(resumed, stored, named) == []
    restore_(resumed, stored, named)
    assert first_difference(expected[17:], take(resumed.batches, 23)) is None


def test_a_checkpoint_of_other_tasks_does_not_fit():
    stored = capture(State(make()))
    other = State(make(data=sources({"depth": 40, "edges": 10})))
    assert mismatches(other, stored, {"batches": {}}) == ["batches.tasks: only one of checkpoint and state has normals"]


def test_a_pass_of_fewer_samples_takes_the_first_of_its_order():
    whole, cut = GlobalOrder(10, 5, seed=3), GlobalOrder(10, 5, seed=3, pass_size=5)
    assert [cut.index(k).tolist() for k in range(3)] == [whole.index(2 * k).tolist() for k in range(3)]
    batches = Batches(process(), TensorDataset(torch.arange(10)), batch_size=5, seed=3, pass_size=5, num_workers=1)
    assert [batch[0].tolist() for batch in take(batches, 3)] == [cut.index(k).tolist() for k in range(3)]
    with pytest.raises(ConfigError, match="pass_size: 11 of 10 samples; give 1 to 10"):
        GlobalOrder(10, 5, seed=3, pass_size=11)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling": "random"}, "sampling: 'random'; choose cycle, shortest, proportional, temperature or ratios"),
        ({"sampling": "ratios", "ratios": None}, "ratios: given for none; the tasks are depth, edges, normals"),
        ({"sampling": "ratios", "ratios": dict.fromkeys(SIZES, 0.0)}, "ratios: .*; give numbers of at least 0, one of"),
        ({"sampling": "temperature", "temperature": 0.0}, "temperature: 0.0; give a number above 0"),
        ({"batch_size": {"depth": 4}}, "batch_size: given for depth; the tasks are depth, edges, normals"),
        ({"batch_size": 5, "fabric": process(0, 2)}, "batch_size: 5 does not divide among 2 processes"),
        (
            {"sampling": "shortest", "data": {"depth": Counter()}},
            "sampling: the data of task 'depth' has no length; use cycle or ratios",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
