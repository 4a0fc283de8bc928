"""Reptile's step against loops written out, and its rate against the line that it is to follow."""

import dataclasses
import math

import pytest
import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn
from torch.nn.functional import mse_loss

from lightning_custom.loop import seed_step
from lightning_custom.metrics import read_rows
from lightning_custom.precision import Bare, unwrap
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.tasks import Sinusoids
from lightning_custom.testing import single_process
from recipes import reptile

WAVES = Sinusoids(3, 4)
CONFIG = reptile.ReptileConfig(
    steps=3, stop_at=1, log_every=1, validate_every=0, checkpoint_every=0, meta_batch_size=4, lr=0.5, inner_steps=5,
    inner_batch_size=4, width=5, test_steps=3, test_batch_size=2, precision="64-true",
)  # fmt: skip


def double_waves(number, generator):
    return [part.double() for part in WAVES(number, generator)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def trained_on(task, order, config):
    """What a torch optimizer makes of the network along the order of one task's samples, and the losses it saw."""
    inputs, targets = torch.cat([task[0], task[2]]), torch.cat([task[1], task[3]])
    model, losses = network(), []
    if config.inner_optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), config.inner_lr, betas=(0.0, 0.999))
    else:
        optimizer = torch.optim.SGD(model.parameters(), config.inner_lr)
    for samples in order:
        optimizer.zero_grad()
        losses.append(mse_loss(model(inputs[samples]), targets[samples]))
        losses[-1].backward()
        optimizer.step()
    return [part.detach() for part in model.parameters()], [float(loss.detach()) for loss in losses]


def one_step(config, run_dir, **own_parts):
    config = dataclasses.replace(config, run_dir=str(run_dir))
    fabric = single_process("64-true")
    state = reptile.train(fabric, config, model=network(), tasks=double_waves, **own_parts)
    rng = seed_step(config.seed, 0, fabric)
    tasks = double_waves(config.meta_batch_size, rng.shared)
    order = reptile.train_order(config, tasks[0].shape[1] + tasks[2].shape[1], rng.shared)
    ends, losses = zip(
        *(trained_on(task, order[i], config) for i, task in enumerate(zip(*tasks, strict=True))), strict=True
    )
    means = [torch.stack(parts).mean(0) for parts in zip(*ends, strict=True)]
    return list(unwrap(state.model).parameters()), means, losses


@pytest.mark.parametrize("fields", [{}, {"inner_optimizer": "adam", "inner_lr": 0.01}, {"task_batching": "loop"}])
def test_a_step_goes_part_of_the_way_to_the_mean_of_networks_that_torch_trains_on_each_task(fields, tmp_path):
    after, means, losses = one_step(dataclasses.replace(CONFIG, **fields), tmp_path)
    for part, start, mean in zip(after, network().parameters(), means, strict=True):
        # The library's Adam has its eps within the square root.
        torch.testing.assert_close(part, start + 0.5 * (mean - start), rtol=1e-6, atol=1e-7)
    (row,) = read_rows(tmp_path)
    for tag, index in (("loss/first", 0), ("loss/last", -1)):
        assert row[tag] == pytest.approx(sum(found[index] for found in losses) / len(losses), rel=1e-6)


def test_another_outer_optimizer_gets_the_way_back_as_its_gradient(tmp_path):
    after, means, _ = one_step(CONFIG, tmp_path, optimizer=torch.optim.Adam)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.5)
    for part, mean in zip(model.parameters(), means, strict=True):
        part.grad = part.detach() - mean
    optimizer.step()
    for part, expected in zip(after, model.parameters(), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-8)


def test_with_one_inner_step_of_all_samples_it_is_joint_training(tmp_path):
    config = dataclasses.replace(CONFIG, inner_steps=1, inner_batch_size=7, lr=1.0)
    after, _, _ = one_step(config, tmp_path)
    tasks = double_waves(4, seed_step(config.seed, 0, single_process()).shared)
    model = network()
    inputs, targets = (torch.cat([tasks[i], tasks[i + 2]], 1).flatten(0, 1) for i in (0, 1))
    mse_loss(model(inputs), targets).backward()
    for part, start in zip(after, model.parameters(), strict=True):
        torch.testing.assert_close(part, start - config.inner_lr * start.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("anneal, rates", [(True, [0.6, 0.4, 0.2]), (False, [0.6, 0.6, 0.6])])
def test_rate_falls_in_a_line_to_zero_after_the_last_step(anneal, rates, tmp_path):
    config = dataclasses.replace(CONFIG, stop_at=None, lr=0.6, anneal=anneal, run_dir=str(tmp_path))
    reptile.train(single_process(), config, model=network().float(), tasks=WAVES.__call__)
    assert [row["lr"] for row in read_rows(tmp_path) if "lr" in row] == pytest.approx(rates)


def test_an_adapted_copy_is_what_torch_trains_on_the_support_set():
    inputs, targets, *_ = (part[0].double() for part in WAVES(1, torch.Generator().manual_seed(3)))
    model = network()
    adapted = reptile.adapt(model, (inputs, targets), config=CONFIG)
    order = reptile.test_order(CONFIG, 3, 3)[0]
    expected, _ = trained_on((inputs, targets, inputs[:0], targets[:0]), order, CONFIG)
    for part, other in zip(adapted.parameters(), expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-12)
    for part, same in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(part, same)


def test_tasks_at_once_and_one_after_another_end_at_the_same_place():
    inputs, targets, *_ = double_waves(3, torch.Generator().manual_seed(3))
    order = reptile.test_order(CONFIG, 3, 3).expand(3, -1, -1)
    ends = []
    for together in (True, False):
        model = TaskModel(Bare(network(), Precision()), together=together)
        ends.append(reptile.displacement(model, CONFIG, per_task(None), inputs, targets, order)[0])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-10, atol=1e-12)
    assert math.sqrt(sum(float(part.square().sum()) for part in ends[0].values())) > 1e-3
