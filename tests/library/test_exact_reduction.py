"""Sums of gradients whose bits do not depend on how many processes the items are divided over."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_custom.distributed import take_share
from lightning_custom.exact_reduction import sum_by_pairs, sum_in_fixed_order_, take_gradient_
from lightning_custom.testing import in_processes, single_process

ITEMS = 7
SHAPES = [(50, 20), (20,), (3, 4, 5)]


def parameters():
    return [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def vectors(items=ITEMS):
    """Gradients of very different sizes, whose float32 sum depends on the order."""
    draw = torch.Generator().manual_seed(0)
    size = sum(parameter.numel() for parameter in parameters())
    return torch.randn(items, size, generator=draw) * 10 ** torch.randint(-4, 4, (items, 1), generator=draw)


def summed(fabric, items):
    learned = parameters()
    sum_in_fixed_order_(fabric, learned, list(take_share(vectors(items), fabric)))
    return [parameter.grad for parameter in learned]


def summed_plainly(fabric, items):
    own = take_share(vectors(items), fabric)
    total = own[0].clone()
    for vector in own[1:]:
        total += vector
    if fabric.world_size > 1:
        dist.all_reduce(total)
    return total


def both_sums(fabric, items):
    return {"fixed": summed(fabric, items), "plain": summed_plainly(fabric, items)}


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def test_neighbours_are_added_first():
    # 1 is lost beside 2**24 in float32, 1 + 1 is not.
    items = torch.tensor([2.0**24, 0.0, 1.0, 1.0])
    assert sum_by_pairs(items) == 2**24 + 2
    assert items[0] + items[1] + items[2] + items[3] == 2**24
    assert sum_by_pairs(torch.tensor([1.0, 1.0, 2.0**24])) == 2**24 + 2  # the odd one comes last


@pytest.mark.parametrize("number", range(1, 10))
def test_the_sum_has_every_item_once(number):
    items = 2.0 ** torch.arange(number)
    assert sum_by_pairs(items) == 2**number - 1
    assert torch.equal(sum_by_pairs(items.view(-1, 1, 1).expand(-1, 2, 3)), torch.full((2, 3), 2.0**number - 1))


def test_taken_gradients_are_in_the_order_of_the_parameters_and_leave_none_behind():
    learned = parameters()
    learned[0].grad = torch.arange(1000.0).view(50, 20)
    learned[2].grad = torch.full((3, 4, 5), 7.0)
    taken = take_gradient_(learned)
    assert torch.equal(taken, torch.cat([torch.arange(1000.0), torch.zeros(20), torch.full((60,), 7.0)]))
    assert all(parameter.grad is None for parameter in learned)


def test_the_sum_becomes_the_gradient_of_each_parameter():
    found = summed(single_process(), ITEMS)
    assert [part.shape for part in found] == [torch.Size(shape) for shape in SHAPES]
    torch.testing.assert_close(flat(found).double(), vectors().double().sum(0), rtol=1e-5, atol=1e-2)
    assert len({part.untyped_storage().data_ptr() for part in found}) == len(SHAPES)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bits_and_a_plain_sum_does_not(processes):
    one, several = both_sums(single_process(), ITEMS), in_processes(both_sums, processes, ITEMS)
    assert all(torch.equal(flat(part["fixed"]), flat(one["fixed"])) for part in several)
    assert not torch.equal(several[0]["plain"], one["plain"])
    torch.testing.assert_close(several[0]["plain"], one["plain"], rtol=1e-3, atol=1e-2)


@pytest.mark.distributed
def test_a_process_may_have_no_item():
    one, several = summed(single_process(), 2), in_processes(summed, 3, 2)
    assert all(torch.equal(flat(part), flat(one)) for part in several)
