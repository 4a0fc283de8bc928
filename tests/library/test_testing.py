import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_custom.checkpoint import Checkpointer
from lightning_custom.config import RunConfig
from lightning_custom.data import Batches
from lightning_custom.distributed import mean_gradients_
from lightning_custom.ema import EMA
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import MetricLogger
from lightning_custom.testing import (
    assert_resumes_exactly,
    assert_rows_equal,
    assert_world_size_invariant,
    first_difference,
    in_processes,
    largest_difference,
    single_process,
)


@dataclass(frozen=True, kw_only=True)
class TinyConfig(RunConfig):
    steps: int = 8
    log_every: int = 3
    checkpoint_every: int = 4
    flaw: str = "none"
    """What the loop does wrong."""


@dataclass
class TinyState:
    model: nn.Module
    optimizer: Optimizer
    average: EMA
    batches: Batches
    metrics: MetricLogger
    step: int = 0


UNSEEDED = torch.Generator().manual_seed(123)
OUTSIDE = itertools.count(1)


def run(fabric, config):
    """Fit a line to noisy samples; ``config.flaw`` names the line that is wrong or missing."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
    batches = Batches(fabric, torch.arange(20), batch_size=4, seed=config.seed)
    metrics = MetricLogger(fabric, config.run_dir)
    state = TinyState(model, optimizer, EMA(model, half_life=8.0), batches, metrics)
    momentum = torch.zeros(())

    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            index = next(batches).to(model.weight.dtype)
            inputs = torch.stack([index, index.square() / 20, torch.ones_like(index)], dim=1)
            noise = torch.rand((), generator=UNSEEDED if config.flaw == "unseeded" else rng.shared)
            loss = (model(inputs) - index.unsqueeze(1) * noise).square().mean()
            if config.flaw == "hidden state":
                momentum = 0.9 * momentum + loss.detach()
                loss = loss * (1 + momentum)
            if config.flaw == "rank in the loss":
                loss = loss * (1 + fabric.global_rank)
            optimizer.zero_grad()
            fabric.backward(loss)
            if config.flaw != "no averaging":
                mean_gradients_(fabric, model)
            optimizer.step()
            state.step += 1
            state.average.update_(batch_size=4, samples_seen=4 * state.step)
            metrics.update({"loss": loss})
            if config.flaw == "rows":
                metrics.update({"count": float(next(OUTSIDE))})
            if due(state.step, config.log_every, last=config.steps):
                metrics.flush(state.step)
            if checkpointer.due(state.step):
                checkpointer.save(state)
            if checkpointer.stop_requested and config.flaw != "does not stop":
                break
    return state


def config(**fields):
    return TinyConfig(threads=1, **fields)


def test_a_folder_with_runs_of_an_earlier_test_is_refused(tmp_path):
    """They would be complete already, and agree whatever the loop does."""
    assert_resumes_exactly(run, config(), stop_at=5, folder=tmp_path)
    with pytest.raises(AssertionError, match=f"{tmp_path} holds straight, of an earlier test; give an empty one"):
        assert_resumes_exactly(run, config(flaw="unseeded"), stop_at=5, folder=tmp_path)
    (tmp_path / "processes-2").mkdir()
    with pytest.raises(AssertionError, match="holds processes-2, of an earlier test"):
        assert_world_size_invariant(run, config(), folder=tmp_path)


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_a_right_loop_resumes_exactly(tmp_path, stop_at):
    assert_resumes_exactly(run, config(), stop_at=stop_at, folder=tmp_path)


@pytest.mark.parametrize(
    "flaw, message",
    [
        ("unseeded", "model.weight: differs by up to"),
        ("hidden state", "model.weight: differs by up to"),
        ("rows", "row 0: .*count"),
        ("does not stop", "did not stop at 5 but at 8"),
    ],
)
def test_a_loop_that_does_not_resume_is_found_out(tmp_path, flaw, message):
    with pytest.raises(AssertionError, match=message):
        assert_resumes_exactly(run, config(flaw=flaw), stop_at=5, folder=tmp_path)


@pytest.mark.distributed
def test_a_right_loop_is_the_same_on_two_processes(tmp_path):
    assert_world_size_invariant(run, config(), folder=tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "flaw, message",
    [("no averaging", "processes 0 and 1 differ: .*model.weight"), ("rank in the loss", "2 processes differ from one")],
)
def test_a_loop_that_depends_on_the_number_of_processes_is_found_out(tmp_path, flaw, message):
    with pytest.raises(AssertionError, match=message):
        assert_world_size_invariant(run, config(flaw=flaw), folder=tmp_path)


def fail_on_second(fabric):
    if fabric.global_rank == 1:
        raise ArithmeticError("only here")


@pytest.mark.distributed
def test_a_failure_of_one_process_reaches_the_test():
    with pytest.raises(Exception, match="ArithmeticError: only here"):
        in_processes(fail_on_second, 2)


def describe(fabric, text):
    return {"rank": fabric.global_rank, "text": text, "dtype": str(fabric.setup(nn.Linear(1, 1)).weight.dtype)}


@pytest.mark.distributed
def test_results_come_back_in_order_of_rank():
    expected = [{"rank": rank, "text": "hello", "dtype": "torch.float64"} for rank in range(2)]
    assert in_processes(describe, 2, "hello", precision="64-true") == expected


NAN = float("nan")


@pytest.mark.parametrize(
    "one, other, difference",
    [
        ({"a": torch.tensor([1.0, NAN])}, {"a": torch.tensor([1.0, NAN])}, None),
        (torch.zeros(2), torch.tensor([0.0, -0.0]), "state: differs by up to 0"),
        (torch.tensor(1.0), torch.tensor(1.5), "state: differs by up to 0.5"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), r"state: \(2,\) torch.float32 and \(2,\) torch.float64"),
        (torch.zeros(2), torch.zeros(2, 1), r"state: \(2,\) torch.float32 and \(2, 1\)"),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.zeros(4, 4).T, torch.zeros(4, 4), None),
        (torch.tensor(True), torch.tensor(True), None),
        ({"a": 1}, {"b": 1}, r"state: only one has \['a', 'b'\]"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "state.a.1.b: 2 and 3"),
        ([1, 2], [1], "state: 2 and 1 entries"),
        ("x", "x", None),
        (torch.zeros(1), [0.0], "state: tensor"),
    ],
)
def test_the_first_difference_is_named(one, other, difference):
    found = first_difference(one, other)
    if difference is None:
        assert found is None
    else:
        with pytest.raises(AssertionError, match=difference):
            assert found is None, found


def test_the_largest_difference_counts_nan_as_infinite_and_leaves_optimizers_out():
    one = {"w": torch.tensor([1.0, 2.0]), "average": {"w": torch.zeros(1)}, "count": torch.tensor(1)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}
    assert largest_difference({**one, "o": optimizer}, {**one, "o": {**optimizer, "state": {}}}) == 0
    assert largest_difference(one, {**one, "w": torch.tensor([1.0, 2.5])}) == 0.5
    assert largest_difference(one, {**one, "average": {"w": torch.tensor([3.0])}}) == 3
    assert largest_difference(one, {**one, "w": torch.tensor([NAN, 2.0])}) == float("inf")


def test_rows_that_only_one_run_has_are_a_difference(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    assert_rows_equal(first, second)
    logger = MetricLogger(SimpleNamespace(global_rank=0, world_size=1, loggers=[], device=torch.device("cpu")), first)
    logger.flush(1)
    with pytest.raises(AssertionError, match="only one of"):
        assert_rows_equal(first, second)
    MetricLogger(single_process(), second).flush(1)  # the speed alone may differ
    assert_rows_equal(first, second)
    logger.record(2, {"a": 1.0})
    with pytest.raises(AssertionError, match="2 and 1 rows"):
        assert_rows_equal(first, second)
