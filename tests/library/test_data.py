import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_custom.data import Batches, GlobalOrder, evaluation_batches, require_map_style, value_range
from lightning_custom.errors import ConfigError
from lightning_custom.testing import single_process


def process(rank=0, world_size=1):
    return SimpleNamespace(
        global_rank=rank, world_size=world_size, device=torch.device("cpu"), strategy=single_process().strategy
    )


class Indices(Dataset):
    """Sample i is i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return torch.tensor(index)


class Augmented(Indices):
    """Sample i is i and a random number from each of the default generators."""

    def __getitem__(self, index):
        numbers = torch.tensor([np.random.rand(), random.random()])
        return super().__getitem__(index), torch.rand(2), numbers


class AugmentedTensors(TensorDataset):
    def __getitem__(self, index):
        (value,) = super().__getitem__(index)
        return (-value,)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def flat(batches):
    return torch.cat([torch.as_tensor(batch) for batch in batches]).tolist()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))


class Listed:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_the_range_of_values_is_that_of_all_tensors_and_of_evenly_spread_items():
    inputs = torch.zeros(301, 2)
    inputs[150], inputs[300] = 7, -3
    assert value_range(TensorDataset(inputs, torch.zeros(301))) == (-3, 7)
    assert value_range(Listed([(item, 0) for item in inputs]), looked_at=3) == (-3, 7)
    assert value_range(Listed(inputs), looked_at=2) == (-3, 0)
    assert value_range(Listed([])) is None
    assert value_range(iter(inputs)) is None
    assert value_range(DataLoader(TensorDataset(inputs), batch_size=7)) == (-3, 7)
    labels = torch.arange(301)
    for dataset in (TensorDataset(inputs, labels), Listed(list(zip(inputs, labels, strict=True)))):
        assert value_range(dataset, part=1) == (0, 300)
        assert value_range(dataset, part=2) is None


def test_what_cannot_be_indexed_is_named():
    require_map_style("val_data", [(1, 2)])
    with pytest.raises(ConfigError, match=r"val_data: a DataLoader cannot be indexed; .* such as its own dataset"):
        require_map_style("val_data", DataLoader(Indices(3)))
    with pytest.raises(ConfigError, match=r"val_data: a NoneType cannot be indexed; give a map-style data set$"):
        require_map_style("val_data", None)


@pytest.mark.parametrize("size, batch_size", [(10, 4), (12, 4), (3, 8), (1, 1)])
def test_every_pass_holds_every_sample_once_in_an_order_of_its_own(size, batch_size):
    batches = Batches(process(), Indices(size), batch_size=batch_size, seed=0)
    count = 4 * size  # a whole number of passes for every batch size here
    samples = flat(take(batches, count))
    passes = [samples[i : i + size] for i in range(0, len(samples), size)]
    assert all(sorted(part) == list(range(size)) for part in passes)
    if size > 3:
        assert len({tuple(part) for part in passes}) == len(passes)


def test_batch_k_is_a_function_of_seed_and_k():
    straight = take(Batches(process(), Indices(10), batch_size=4, seed=5), 12)
    for k in (0, 1, 2, 7, 11):
        batches = Batches(process(), Indices(10), batch_size=4, seed=5)
        batches.load_state_dict({"position": k})
        assert torch.equal(next(batches), straight[k])
    other = take(Batches(process(), Indices(10), batch_size=4, seed=6), 12)
    assert flat(other) != flat(straight)


def test_reading_ahead_does_not_move_the_position():
    batches = Batches(process(), Indices(10), batch_size=4, seed=5, num_workers=2)
    straight = take(Batches(process(), Indices(10), batch_size=4, seed=5), 6)
    take(batches, 3)
    assert batches.state_dict() == {"position": 3}
    resumed = Batches(process(), Indices(10), batch_size=4, seed=5, num_workers=2)
    resumed.load_state_dict(batches.state_dict())
    assert equal(take(resumed, 3), straight[3:])


def test_a_restore_drops_what_was_read_ahead():
    batches = Batches(process(), Indices(10), batch_size=4, seed=5)
    first = next(batches)
    take(batches, 4)
    batches.load_state_dict({"position": 0})
    assert torch.equal(next(batches), first)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_processes_are_the_global_batch(world_size):
    whole = take(Batches(process(), Augmented(10), batch_size=8, seed=1), 6)
    parts = [take(Batches(process(r, world_size), Augmented(10), batch_size=8, seed=1), 6) for r in range(world_size)]
    for k, batch in enumerate(whole):
        assert equal(batch, [torch.cat([part[k][i] for part in parts]) for i in range(3)])


def test_augmentation_is_the_same_for_any_number_of_workers():
    alone = take(Batches(process(), Augmented(10), batch_size=4, seed=1), 5)
    assert equal(take(Batches(process(), Augmented(10), batch_size=4, seed=1, num_workers=2), 5), alone)
    unseeded = Batches(process(), Augmented(10), batch_size=4, seed=1, num_workers=2, seed_samples=False)
    different = take(unseeded, 5)
    assert equal([batch[0] for batch in different], [batch[0] for batch in alone])
    assert not equal([batch[1] for batch in different], [batch[1] for batch in alone])


def test_augmentation_differs_between_samples_and_passes_and_leaves_the_default_generators_alone():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    batches = take(Batches(process(), Augmented(4), batch_size=4, seed=1), 2)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    for i in (1, 2):
        numbers = torch.cat([batch[i] for batch in batches]).flatten().tolist()
        assert len(set(numbers)) == len(numbers)


@pytest.mark.distributed
def test_workers_start_by_spawn():
    batches = Batches(process(), Augmented(6), batch_size=3, seed=1, num_workers=1, multiprocessing_context="spawn")
    assert equal(take(batches, 3), take(Batches(process(), Augmented(6), batch_size=3, seed=1), 3))


def test_tensors_in_memory_give_what_the_loader_gives():
    tensors = torch.arange(10.0).view(10, 1), torch.arange(10)
    whole = TensorDataset(*tensors)
    fast = take(Batches(process(), whole, batch_size=4, seed=2), 6)
    slow = take(Batches(process(), whole, batch_size=4, seed=2, num_workers=1), 6)
    assert equal(fast, slow)


def test_a_subclass_or_a_collate_function_of_ones_own_is_not_passed_over():
    values = torch.arange(1.0, 7.0)
    (negative,) = next(Batches(process(), AugmentedTensors(values), batch_size=6, seed=0))
    assert sorted((-negative).tolist()) == values.tolist()
    collated = next(Batches(process(), TensorDataset(values), batch_size=2, seed=0, collate=len))
    assert collated == 2
    assert [batch[0].tolist() for batch in evaluation_batches(process(), AugmentedTensors(values), batch_size=6)] == [
        (-values).tolist()
    ]
    assert list(evaluation_batches(process(), TensorDataset(values), batch_size=4, collate=len)) == [3, 3]


class OfNumPy(Dataset):
    """A real input and a real target of float64, an integer and its name."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.full(2, index / 3), {"place": index / 3, "kind": index, "name": str(index)}


@pytest.mark.parametrize("precision, expected", [("32-true", torch.float32), ("64-true", torch.float64)])
def test_numbers_of_numpy_come_in_the_precision_of_the_run(precision, expected):
    fabric = single_process(precision)
    thirds = torch.arange(6, dtype=torch.float64).div(3).to(expected)
    loader = DataLoader(OfNumPy(), batch_size=6)
    found = [
        next(Batches(fabric, OfNumPy(), batch_size=6, seed=0)),
        next(Batches(fabric, loader, batch_size=6, seed=0)),
    ]
    for inputs, targets in [*found, *evaluation_batches(fabric, OfNumPy(), batch_size=6)]:
        assert torch.equal(targets["place"], thirds[targets["kind"]])
        assert torch.equal(inputs, targets["place"].unsqueeze(1).expand(6, 2))
        assert (inputs.dtype, targets["place"].dtype, targets["kind"].dtype) == (expected, expected, torch.int64)
        assert targets["name"] == [str(kind) for kind in targets["kind"].tolist()]
    whole = TensorDataset(torch.arange(6, dtype=torch.float64).div(3), torch.arange(6))
    for values, index in [
        next(Batches(fabric, whole, batch_size=6, seed=0)),
        *evaluation_batches(fabric, whole, batch_size=6),
    ]:
        assert values.dtype is expected
        assert torch.equal(values, thirds[index])


def test_where_float64_is_the_default_numbers_stay_in_it():
    torch.set_default_dtype(torch.float64)
    inputs, _ = next(Batches(single_process(), OfNumPy(), batch_size=6, seed=0))
    assert inputs.dtype is torch.float64


class Counter:
    """An iterable of batches with a state of its own, as torchdata's protocol has it."""

    def __init__(self):
        self.value = 0

    def __iter__(self):
        while self.value < 100:
            self.value += 1
            yield torch.tensor([self.value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_an_iterable_with_a_state_is_restored_by_it():
    batches = Batches(process(), Counter(), batch_size=1, seed=0)
    assert flat(take(batches, 3)) == [1, 2, 3]
    shared, items = batches.state_dict(), batches.item_state_dict()
    assert items == {"process-00000": {"value": 3}}
    resumed = Batches(process(), Counter(), batch_size=1, seed=0)
    resumed.load_state_dict(shared)
    resumed.load_item_state_dict(items)
    assert flat(take(resumed, 2)) == [4, 5]
    assert resumed.position == 5


def test_an_iterable_with_a_state_stays_on_its_number_of_processes():
    items = Batches(process(), Counter(), batch_size=1, seed=0).item_state_dict()
    other = Batches(process(0, 2), Counter(), batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="state is of 1 processes and cannot be divided among 2; resume on 1"):
        other.load_item_state_dict(items)


def test_a_shuffling_loader_is_read_forward_with_a_warning_and_shuffles_as_before():
    def loader():
        return DataLoader(Augmented(10), batch_size=3, shuffle=True)

    torch.manual_seed(1)
    straight = take(Batches(process(), loader(), batch_size=3, seed=0), 9)  # more than two passes
    torch.manual_seed(2)
    resumed = Batches(process(), loader(), batch_size=3, seed=0)
    with pytest.warns(UserWarning, match="a DataLoader has no state_dict; reading 6 batches forward"):
        resumed.load_state_dict({"position": 6})
    assert equal(take(resumed, 3), straight[6:])
    assert not equal(straight[:1], take(Batches(process(1, 2), loader(), batch_size=3, seed=0), 1))


def test_an_iterable_that_ends_is_begun_again_and_an_empty_one_is_refused():
    batches = Batches(process(), (part for part in [[1], [2]]), batch_size=1, seed=0)
    assert flat(take(batches, 2)) == [1, 2]
    with pytest.raises(ConfigError, match="dataset: the iterable yields nothing"):
        next(batches)

    class Twice:
        def __iter__(self):
            return iter([[1], [2]])

    assert flat(take(Batches(process(), Twice(), batch_size=1, seed=0), 5)) == [1, 2, 1, 2, 1]


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="batch_size: 5 does not divide among 2 processes"):
        Batches(process(0, 2), Indices(10), batch_size=5, seed=0)
    with pytest.raises(ConfigError, match="dataset: it is empty"):
        Batches(process(), Indices(0), batch_size=1, seed=0)


def test_the_order_over_passes_is_one_sequence_whatever_the_batch_size():
    sequences = []
    for batch_size in (3, 7, 20):
        order = GlobalOrder(7, batch_size, seed=4)
        parts = [order.batch(k) for k in range(-(-60 // batch_size))]
        sequences.append([list(zip(*(part.tolist() for part in pair), strict=True)) for pair in parts])
    flattened = [[pair for part in parts for pair in part][:60] for parts in sequences]
    assert flattened[0] == flattened[1] == flattened[2]
    assert [number for number, _ in flattened[0]] == [i // 7 for i in range(60)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 2, 5, 6, 7])
def test_evaluation_sees_every_sample_once_in_order_and_as_many_batches_on_every_process(size, world_size):
    for dataset, pick in ((Indices(size), lambda batch: batch), (TensorDataset(torch.arange(size)), lambda b: b[0])):
        parts = [
            [pick(batch) for batch in evaluation_batches(process(rank, world_size), dataset, batch_size=4)]
            for rank in range(world_size)
        ]
        assert {len(part) for part in parts} == {-(-size // 4)}
        batches = [torch.cat(batch) for batch in zip(*parts, strict=True)]
        assert flat(batches) == list(range(size)) if batches else size == 0
        sizes = [len(batch) for batch in batches]
        assert all(size <= 4 for size in sizes)
        assert not sizes or max(sizes) - min(sizes) <= 1
        assert all(part.dtype == torch.int64 for own in parts for part in own)


def test_batches_arrive_on_the_device_of_the_fabric():
    fabric = single_process()
    assert next(Batches(fabric, Indices(2), batch_size=2, seed=0)).device == fabric.device


def test_a_program_that_holds_its_batches_to_the_end_ends():
    """Workers ignore the signal that would end them at exit, and would be waited for for ever."""
    program = (
        "from lightning_custom.data import Batches\n"
        "from lightning_custom.testing import single_process\n"
        "batches = Batches(single_process(), list(range(40)), batch_size=4, seed=0, num_workers=2)\n"
        "next(batches)\n"
        "held = batches._iterator\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])
