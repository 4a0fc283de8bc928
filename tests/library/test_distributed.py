import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.nn import functional as F

from lightning_custom.distributed import (
    all_objects,
    divide_items,
    first_process,
    gather_shares,
    global_batch,
    global_mean,
    mean_gradients_,
    process_item,
    share,
    sum_over_processes,
    take_share,
    together,
)
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.loop import seed_step
from lightning_custom.precision import bare
from lightning_custom.testing import _run_and_keep, in_processes, single_process


def processes(rank, world_size):
    return SimpleNamespace(global_rank=rank, world_size=world_size, to_device=lambda tensor: tensor)


# What each of two processes does; every test below looks at one part of what comes back.


def work(fabric):
    rank = fabric.global_rank
    parts = [means, mixed_dtypes, initial_weights, shares, agreement, randomness, global_means, global_batches]
    return {part.__name__: part(fabric, rank) for part in parts}


class Parameters(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def means(fabric, rank):
    module = Parameters(
        everywhere=torch.zeros(2, 3), nowhere=torch.zeros(4), first_only=torch.zeros(2), second_only=torch.zeros(1)
    )
    frozen = Parameters(frozen=torch.zeros(2))
    frozen.requires_grad_(False)
    module.everywhere.grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    if rank == 0:
        module.first_only.grad = torch.tensor([4.0, 8.0])
    else:
        module.second_only.grad = torch.tensor([6.0])
    mean_gradients_(fabric, module, frozen)
    result = {name: parameter.grad for name, parameter in module.named_parameters()}
    without = Parameters(a=torch.zeros(3))
    mean_gradients_(fabric, without)
    return {**result, "frozen": frozen.frozen.grad, "without": without.a.grad}


def mixed_dtypes(fabric, rank):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    module = Parameters(**{str(dtype).replace("torch.", "of_"): torch.zeros(2, dtype=dtype) for dtype in dtypes})
    for parameter in module.parameters():
        # 1 and 256: their sum has nine significant bits, one more than bfloat16.
        parameter.grad = torch.full((2,), 1.0 if rank == 0 else 256.0, dtype=parameter.dtype)
    if rank == 0:
        module.of_complex64.grad = None
    mean_gradients_(fabric, module)
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def initial_weights(fabric, rank):
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    network[1].running_mean.fill_(float(rank + 5))
    before = network[0].weight.detach().clone()
    network = fabric.setup(network)
    return {
        "before": before,
        "weight": network.module[0].weight.detach(),
        "buffer": network.module[1].running_mean,
        "wrapped": isinstance(network._forward_module, nn.parallel.DistributedDataParallel),
    }


def shares(fabric, rank):
    batch = torch.arange(10.0).view(5, 2).bfloat16()
    part = take_share(batch, fabric)
    rows = torch.arange(rank * 3).view(-1, 1)  # process 0 has none
    return {
        "part": part,
        "gathered": gather_shares(part, fabric),
        "uneven": gather_shares(rows, fabric),
        "none": gather_shares(torch.zeros(0, 3), fabric),
        "sum": sum_over_processes(fabric, torch.tensor([1.0, 2.0]) * (rank + 1)),
        "objects": all_objects(fabric, f"rank {rank}"),
    }


def agreement(fabric, rank):
    def fail_on_second(kind):
        if rank == 1:
            raise kind("steps: 0; use more")
        return rank

    def outcome(action):
        try:
            return action()
        except Exception as error:
            return [type(error).__name__, str(error)]

    return {
        "good": together(fabric, lambda: rank * 10),
        "config": outcome(lambda: together(fabric, lambda: fail_on_second(ConfigError))),
        "disk": outcome(lambda: together(fabric, lambda: fail_on_second(OSError))),
        "first": first_process(fabric, lambda: f"from {rank}"),
        "first fails": outcome(lambda: first_process(fabric, lambda: [][0])),
    }


def randomness(fabric, rank):
    generators = seed_step(0, 3, fabric)
    return {
        "shared": torch.rand(3, generator=generators.shared),
        "local": torch.rand(3, generator=generators.local),
        "default": torch.rand(3),
    }


def cube_of_the_mean(parts):
    """The cube of the global mean of ``weight * numbers``, its derivative by the weight, and that one's."""
    numbers = torch.arange(6.0, dtype=torch.float64).chunk(parts.world_size)[parts.global_rank]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    cube = global_mean(weight * numbers) ** 3
    (first,) = torch.autograd.grad(cube, weight, create_graph=True)
    (second,) = torch.autograd.grad(first, weight)
    return torch.stack([cube, first, second]).detach()


def global_means(fabric, rank):
    return cube_of_the_mean(fabric)


def contrast(features, others, first):
    """Each row is to be told from the other rows: a loss that no part of the batch has alone."""
    return F.cross_entropy(features @ others.T, torch.arange(first, first + len(features)))


def contrast_and_derivatives(inputs, gather, first, *, whole):
    weight = torch.tensor([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.7]], dtype=torch.float64, requires_grad=True)
    features = inputs @ weight
    others = gather(features)
    loss = contrast(others, others, 0) if whole else contrast(features, others, first)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.arange(6.0).view(3, 2)).sum(), weight)
    return torch.cat([loss.detach().view(1), gradient.detach().flatten(), second.flatten()])


def six_samples():
    return torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3).sin()


def global_batches(fabric, rank):
    inputs = take_share(six_samples(), fabric)
    return {
        "gathered": global_batch(inputs),
        "rows": contrast_and_derivatives(inputs, global_batch, 3 * rank, whole=False),
        "whole": contrast_and_derivatives(inputs, global_batch, 3 * rank, whole=True),
    }


@pytest.fixture(scope="module")
def results():
    return in_processes(work, 2)


@pytest.mark.distributed
def test_gradients_become_their_mean_and_absent_ones_count_as_zero_or_stay_absent(results):
    for result in (result["means"] for result in results):
        assert torch.equal(result["everywhere"], torch.arange(6.0).view(2, 3) * 1.5)
        assert torch.equal(result["first_only"], torch.tensor([2.0, 4.0]))
        assert torch.equal(result["second_only"], torch.tensor([3.0]))
        assert result["nowhere"] is None
        assert result["frozen"] is None
        assert result["without"] is None


@pytest.mark.distributed
def test_gradients_keep_their_dtype_and_half_precision_is_summed_in_float32(results):
    for result in (result["mixed_dtypes"] for result in results):
        for name in ("float32", "float64", "bfloat16", "float16"):
            expected = torch.full((2,), 128.5, dtype=torch.float64).to(getattr(torch, name))
            assert result[f"of_{name}"].dtype == expected.dtype
            assert torch.equal(result[f"of_{name}"], expected)
        assert torch.equal(result["of_complex64"], torch.full((2,), 128.0, dtype=torch.complex64))


@pytest.mark.distributed
def test_every_process_starts_from_the_first_ones_weights_and_buffers(results):
    first, second = (result["initial_weights"] for result in results)
    assert not torch.equal(first["before"], second["before"])
    for result in (first, second):
        assert torch.equal(result["weight"], first["before"])
        assert torch.equal(result["buffer"], torch.full((3,), 5.0))
        assert not result["wrapped"]


@pytest.mark.distributed
def test_shares_of_a_batch_come_back_as_the_batch(results):
    first, second = (result["shares"] for result in results)
    batch = torch.arange(10.0).view(5, 2).bfloat16()
    assert torch.equal(first["part"], batch[:3])
    assert torch.equal(second["part"], batch[3:])
    for result in (first, second):
        assert torch.equal(result["gathered"], batch)
        assert torch.equal(result["uneven"], torch.arange(3).view(3, 1))
        assert result["none"].shape == (0, 3)
        assert torch.equal(result["sum"], torch.tensor([3.0, 6.0]))
        assert result["objects"] == ["rank 0", "rank 1"]


@pytest.mark.distributed
def test_a_global_mean_and_its_derivatives_average_to_those_of_the_whole_batch(results):
    # (2.5 w)^3 at w = 2.
    closed_form = torch.tensor([125.0, 3 * 25 * 2.5, 6 * 5 * 2.5**2], dtype=torch.float64)
    torch.testing.assert_close(cube_of_the_mean(single_process()), closed_form)
    first, second = (result["global_means"] for result in results)
    assert first[0] == second[0]
    torch.testing.assert_close((first + second) / 2, closed_form)


@pytest.mark.distributed
def test_a_loss_that_compares_samples_has_the_derivatives_of_the_whole_batch(results):
    expected = contrast_and_derivatives(six_samples(), global_batch, 0, whole=False)
    first, second = (result["global_batches"] for result in results)
    for result in (first, second):
        assert torch.equal(result["gathered"], six_samples())
    for way in ("rows", "whole"):
        torch.testing.assert_close((first[way] + second[way]) / 2, expected)
    # What carries no gradient from the others trains on something else.
    cut = contrast_and_derivatives(
        six_samples(), lambda features: gather_shares(features, single_process()), 0, whole=False
    )
    assert not torch.allclose(cut[1:7], expected[1:7], atol=1e-3)


@pytest.mark.distributed
def test_a_failure_of_one_process_is_raised_on_all(results):
    assert [result["agreement"]["good"] for result in results] == [0, 10]
    for result in (result["agreement"] for result in results):
        assert result["config"] == ["ConfigError", "process 1: steps: 0; use more"]
        assert result["disk"] == ["CheckpointError", "process 1: OSError: steps: 0; use more"]
        assert result["first"] == "from 0"
        assert result["first fails"] == ["CheckpointError", "process 0: IndexError: list index out of range"]


@pytest.mark.distributed
def test_the_shared_generator_agrees_over_processes_and_the_local_one_differs(results):
    first, second = (result["randomness"] for result in results)
    assert torch.equal(first["shared"], second["shared"])
    assert not torch.equal(first["local"], second["local"])
    assert not torch.equal(first["default"], second["default"])


def work_under_ddp(fabric):
    module, _ = fabric.setup(nn.Linear(2, 1, bias=False), torch.optim.SGD([torch.zeros(1)], lr=1.0))
    inputs = torch.full((1, 2), float(fabric.global_rank + 1))
    fabric.backward(module(inputs).sum())
    averaged = module.weight.grad.clone()
    module.weight.grad.fill_(float(fabric.global_rank))
    mean_gradients_(fabric, module)
    try:
        bare(fabric, module)
    except ConfigError as error:
        return {"averaged": averaged, "left": module.weight.grad, "bare": str(error)}
    return {}


@pytest.mark.distributed
def test_under_stock_ddp_nothing_is_averaged_twice_and_bare_refuses():
    fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="forkserver"))
    with tempfile.TemporaryDirectory() as folder:
        fabric.launch(_run_and_keep, work_under_ddp, folder, ())
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank, result in enumerate(results):
        assert torch.equal(result["averaged"], torch.full((1, 2), 1.5))
        assert torch.equal(result["left"], torch.full((1, 2), float(rank)))
        assert "strategy: DDPStrategy averages gradients inside its own wrapper" in result["bare"]


def test_with_one_process_gradients_stay_as_they_are():
    module = nn.Linear(2, 1)
    module.weight.grad = torch.tensor([[1.0, 2.0]])
    before = module.weight.grad
    mean_gradients_(single_process(), module)
    assert module.weight.grad is before
    assert torch.equal(before, torch.tensor([[1.0, 2.0]]))
    assert module.bias.grad is None


@pytest.mark.parametrize(
    "size, world_size, remedy", [(10, 4, "use 8 or 12, or other devices"), (3, 4, "use 4, or other devices")]
)
def test_what_does_not_divide_is_refused_with_the_remedy(size, world_size, remedy):
    with pytest.raises(ConfigError, match=f"batch_size: {size} does not divide among {world_size} processes; {remedy}"):
        share(size, processes(0, world_size), "batch_size")


def test_what_divides_is_divided():
    assert share(12, processes(0, 4), "batch_size") == 3


@pytest.mark.parametrize("size, world_size", [(7, 3), (2, 3), (6, 2), (0, 2)])
def test_shares_are_disjoint_cover_the_batch_and_differ_by_one_at_most(size, world_size):
    batch = torch.arange(size)
    parts = [take_share(batch, processes(rank, world_size)) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("stored, live", [(1, 1), (3, 3), (4, 2), (2, 4), (3, 2)])
def test_stored_items_are_dealt_out_once_each_and_stay_where_the_number_is_the_same(stored, live):
    items = {process_item(processes(rank, stored)): rank for rank in range(stored)}
    dealt = [divide_items(processes(rank, live), items) for rank in range(live)]
    assert sorted(item for part in dealt for item in part) == list(range(stored))
    if stored == live:
        assert dealt == [[rank] for rank in range(stored)]


def test_alone_a_failure_keeps_its_text():
    with pytest.raises(CheckpointError, match=r"^OSError: disk$"):
        together(single_process(), lambda: (_ for _ in ()).throw(OSError("disk")))
