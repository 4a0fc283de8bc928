"""What every recipe and every variant of it holds: resume to the bit, any number of processes, every precision."""

import dataclasses
import importlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from lightning_custom.checkpoint import Checkpointer
from lightning_custom.metrics import read_rows
from lightning_custom.precision import unwrap
from lightning_custom.state import capture, components
from lightning_custom.storage import saved_steps
from lightning_custom.testing import (
    assert_resumes_exactly,
    first_difference,
    in_processes,
    largest_difference,
    single_process,
)
from tests.recipes.cases import CASES

VARIANTS = {f"{case.name}-{name}": (case, config) for case in CASES for name, config in case.configs().items()}
BETWEEN_FLUSHES = 11
# The first test that asks for two processes waits for the runs of all.
pytestmark = pytest.mark.timeout(1800)


def every_case(function):
    return pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])(function)


def every_variant(function):
    return pytest.mark.parametrize("name", VARIANTS)(function)


def slow_but(quick, names):
    """Values of a parameter, all but the quick ones for the slow run."""
    return [pytest.param(name, marks=() if quick(name) else pytest.mark.slow) for name in names]


# One process


@pytest.mark.parametrize("name", slow_but(lambda name: name.endswith("-default"), VARIANTS))
def test_resumed_run_equals_straight_run(name, tmp_path):
    case, config = VARIANTS[name]
    assert_resumes_exactly(case.run, config, stop_at=BETWEEN_FLUSHES, folder=tmp_path)


@pytest.mark.slow
@every_case
def test_a_run_resumes_from_every_step(case, tmp_path):
    config = dataclasses.replace(case.config, steps=9, validate_every=3, checkpoint_every=4)
    for step in range(1, 9):
        assert_resumes_exactly(case.run, config, stop_at=step, folder=tmp_path / str(step))


@every_case
def test_a_run_stopped_at_every_step_equals_straight_run(case, tmp_path):
    config = dataclasses.replace(case.config, steps=9, validate_every=3, run_dir=str(tmp_path / "straight"))
    straight = case.run(single_process(), config)
    stopped = dataclasses.replace(config, run_dir=str(tmp_path / "stopped"))
    for step in range(1, 10):
        state = case.run(single_process(), dataclasses.replace(stopped, stop_at=step))
        assert state.step == step
    assert first_difference(capture(straight), capture(state)) is None


@every_case
def test_resume_is_not_exact_where_randomness_has_a_history(case, tmp_path):
    history = torch.Generator().manual_seed(0)
    with (
        patch(f"{case.module}.seed_step", lambda *_: SimpleNamespace(shared=history, local=history)),
        pytest.raises(AssertionError, match="differs by up to"),
    ):
        assert_resumes_exactly(case.run, case.config, stop_at=BETWEEN_FLUSHES, folder=tmp_path)


# The bound on the first step's losses is what 8 bits of mantissa may cost.
PRECISIONS = {
    "32-true": (0.0, torch.float32),
    "bf16-mixed": (2e-2, torch.float32),
    "bf16-true": (2e-2, torch.bfloat16),
    "64-true": (1e-5, torch.float64),
}


def losses(run_dir):
    beginnings = ("loss/", "losses/", "train/loss")
    return {tag: value for tag, value in read_rows(run_dir)[0].items() if tag.startswith(beginnings)}


@pytest.mark.parametrize("precision", slow_but("bf16-mixed".__eq__, PRECISIONS))
@every_case
def test_every_precision_resumes_exactly_and_begins_with_the_losses_of_32_true(case, precision, tmp_path):
    bound, dtype = PRECISIONS[precision]
    config = dataclasses.replace(case.config, precision=precision, steps=12, log_every=1)
    assert_resumes_exactly(case.run, config, stop_at=5, folder=tmp_path, precision=precision)

    one_step = dataclasses.replace(config, steps=1, run_dir=str(tmp_path / "32-true"))
    state = case.run(single_process(), one_step)
    expected = losses(tmp_path / "32-true")
    assert expected
    assert losses(tmp_path / "straight") == pytest.approx(expected, rel=bound, abs=bound / 10)

    state = case.run(single_process(precision), dataclasses.replace(one_step, run_dir=str(tmp_path / "one")))
    assert {parameter.dtype for module in modules(state) for parameter in module.parameters()} == {dtype}


# Two processes: one start of them for each precision serves all tests that were chosen


def chosen(request):
    """The names of the variants, and of the cases, that the tests to be run are about."""
    parameters = [item.callspec.params for item in request.session.items if request.fixturename in item.fixturenames]
    cases = [found["case"].name for found in parameters if "case" in found]
    variants = [found["name"] for found in parameters if "name" in found]
    return [*dict.fromkeys(variants + [f"{name}-default" for name in cases])], [*dict.fromkeys(cases)]


def of(names):
    return {name: VARIANTS[name] for name in names}.items()


def cases_of(names):
    return [case for case in CASES if case.name in names]


def modules(state):
    return [unwrap(part) for part in components(state).values() if isinstance(part, torch.nn.Module)]


def gradients(state):
    """The gradients that the last step left, a vector for each module."""
    found = [
        [part.grad.flatten() for part in module.parameters() if part.grad is not None] for module in modules(state)
    ]
    return [torch.cat(parts) for parts in found if parts]  # an average of weights has none


def run_all(fabric, folder, variants):
    """The state that each variant ends with."""
    return {
        name: capture(case.run(fabric, dataclasses.replace(config, run_dir=str(Path(folder) / name))))
        for name, (case, config) in of(variants)
    }


def run_without_averaging(fabric, folder, cases):
    found = {}
    for case in cases_of(cases):
        config = dataclasses.replace(case.config, run_dir=str(Path(folder) / f"{case.name}-unaveraged"))
        with patch.object(importlib.import_module(case.module), "mean_gradients_", lambda *_: None):
            found[case.name] = capture(case.run(fabric, config))
    return found


def first_gradients(fabric, folder, variants):
    found = {}
    for name, (case, config) in of(variants):
        config = dataclasses.replace(config, steps=1, run_dir=str(Path(folder) / f"{name}-first"))
        found[name] = gradients(case.run(fabric, config))
    return found


def run_part_way(fabric, folder, cases, stop_at):
    for case in cases_of(cases):
        config = dataclasses.replace(case.config, run_dir=str(Path(folder) / case.name), stop_at=stop_at)
        assert case.run(fabric, config).step == stop_at


def run_until_signalled(fabric, folder, cases):
    """One process alone gets a signal in step 5; where each stopped, and what each saved."""
    found = {}
    for case in cases_of(cases):
        saves, due, save = [], Checkpointer.due, Checkpointer.save

        def due_after_signal(self, step, due=due):
            if step == 5 and fabric.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return due(self, step)

        def counted_save(self, state, *scores, save=save, saves=saves):
            saves.append(state.step)
            return save(self, state, *scores)

        config = dataclasses.replace(
            case.config, run_dir=str(Path(folder) / f"{case.name}-signalled"), checkpoint_every=0, validate_every=0
        )
        with (
            patch.object(Checkpointer, "due", due_after_signal),
            patch.object(Checkpointer, "save", counted_save),
        ):
            state = case.run(fabric, config)
        found[case.name] = {"step": state.step, "saves": saves}
    return found


def run_presets(fabric, folder, cases):
    found = {}
    for case in cases_of(cases):
        config = dataclasses.replace(case.preset, run_dir=str(Path(folder) / f"{case.name}-preset"))
        found[case.name] = capture(case.run(fabric, config))
    return found


def in_float64(fabric, folder, divided, variants, cases):
    """All that two processes do in float64."""
    run_part_way(fabric, divided, cases, 17)
    return {
        "all": run_all(fabric, folder, variants),
        "unaveraged": run_without_averaging(fabric, folder, cases),
    }


def in_float32(fabric, folder, variants, cases):
    """All that two processes do in float32."""
    return {
        "gradients": first_gradients(fabric, folder, variants),
        "presets": run_presets(fabric, folder, cases),
        "signalled": run_until_signalled(fabric, folder, cases),
    }


class Results(NamedTuple):
    one: dict[str, Any]
    """Of one process."""
    two: list[dict[str, Any]]
    """Of each of two processes."""
    folder: Path


@pytest.fixture(scope="module")
def float64(request, tmp_path_factory):
    folder, (variants, cases) = tmp_path_factory.mktemp("float64"), chosen(request)
    fabric, divided = single_process("64-true"), folder / "divided"
    one = {"all": run_all(fabric, folder / "one", variants)}
    run_part_way(fabric, divided, cases, 7)
    two = in_processes(in_float64, 2, str(folder / "two"), str(divided), variants, cases, precision="64-true")
    return Results(one, two, folder)


@pytest.fixture(scope="module")
def float32(request, tmp_path_factory):
    folder, (variants, cases) = tmp_path_factory.mktemp("float32"), chosen(request)
    fabric = single_process()
    one = {
        "gradients": first_gradients(fabric, folder / "one", variants),
        "presets": run_presets(fabric, folder / "one", cases),
    }
    return Results(one, in_processes(in_float32, 2, str(folder / "two"), variants, cases), folder)


@pytest.mark.distributed
@pytest.mark.xdist_group("float64")
@every_variant
def test_two_processes_reach_the_state_of_one(float64, name):
    first, second = (part["all"][name] for part in float64.two)
    assert first_difference(first, second) is None
    assert largest_difference(float64.one["all"][name], first) <= 1e-9


@pytest.mark.distributed
@pytest.mark.xdist_group("float64")
@every_case
def test_two_processes_differ_from_one_without_the_averaging_line(float64, case):
    first, second = (part["unaveraged"][case.name] for part in float64.two)
    assert largest_difference(first, second) > 1e-4
    assert largest_difference(float64.one["all"][f"{case.name}-default"], first) > 1e-4


@pytest.mark.distributed
@pytest.mark.xdist_group("float64")
@every_case
def test_a_run_divided_over_one_then_two_then_one_process_equals_that_of_one(float64, case):
    run_dir = float64.folder / "divided" / case.name
    with pytest.warns(UserWarning, match="processes: 2 -> 1"):
        state = case.run(single_process("64-true"), dataclasses.replace(case.config, run_dir=str(run_dir)))
    assert state.step == case.config.steps
    assert largest_difference(float64.one["all"][f"{case.name}-default"], capture(state)) <= 1e-9
    straight = read_rows(float64.folder / "one" / f"{case.name}-default")
    rows = [without_times(row) for row in read_rows(run_dir)]
    assert rows == [pytest.approx(without_times(row), rel=1e-6) for row in straight]


def without_times(row):
    # A class without samples has no accuracy.
    return {tag: -1 if value is None else value for tag, value in row.items() if not is_rate(tag)}


def is_rate(tag):
    return tag.startswith("time/") or tag == "charts/SPS"


@pytest.mark.distributed
@pytest.mark.xdist_group("float32")
@every_variant
def test_first_gradient_of_two_processes_is_that_of_one_in_float32(float32, name):
    expected, (first, second) = float32.one["gradients"][name], (part["gradients"][name] for part in float32.two)
    assert len(expected) > 0
    for one, two, other in zip(expected, first, second, strict=True):
        assert torch.equal(two, other)
        assert (two - one).norm() <= 1e-5 * one.norm()


@pytest.mark.distributed
@pytest.mark.xdist_group("float32")
@every_case
def test_two_processes_reach_the_default_presets_state_of_one_in_float32(float32, case):
    one, (two, _) = float32.one["presets"][case.name], (part["presets"][case.name] for part in float32.two)
    assert largest_difference(one, two) <= 1e-5


@pytest.mark.distributed
@pytest.mark.xdist_group("float32")
@every_case
def test_a_signal_to_one_of_two_processes_saves_once_and_stops_both_after_the_same_step(float32, case):
    # Sent in step 5, agreed on after it, read after the next.
    assert [part["signalled"][case.name] for part in float32.two] == [{"step": 6, "saves": [6]}] * 2
    run_dir = float32.folder / "two" / f"{case.name}-signalled"
    assert saved_steps(run_dir / "checkpoints") == [6]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["signal"]) == ("stopped", 6, signal.SIGTERM)
