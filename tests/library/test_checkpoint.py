import contextlib
import copy
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_custom import storage
from lightning_custom.checkpoint import Checkpointer, load_module, mode_of
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.metrics import MetricLogger
from lightning_custom.state import capture
from lightning_custom.testing import assert_resumes_exactly, first_difference, in_processes, single_process
from tests.library.counting_loop import CountingConfig, CountingState, Started, new_state, run, take_step
from tests.library.test_storage import Attack, Killed, flip


def config_in(folder: Path, **fields: Any) -> CountingConfig:
    return CountingConfig(run_dir=str(folder), **fields)


def trained(config: CountingConfig, steps: int, scores: dict[int, float] | None = None) -> CountingState:
    """A state after ``steps`` steps, saved after each."""
    fabric = single_process()
    state = new_state(fabric, config)
    with Checkpointer(fabric, config, best="score") as checkpointer:
        checkpointer.restore(state)
        while state.step < steps:
            take_step(fabric, config, state)
            value = (scores or {}).get(state.step)
            checkpointer.save(state, None if value is None else {"score": value})
    return state


def restored(config: CountingConfig) -> CountingState:
    fabric = single_process()
    state = new_state(fabric, config)
    with Checkpointer(fabric, config, best="score") as checkpointer:
        checkpointer.restore(state)
    return state


def kept(folder: Path) -> list[int]:
    return storage.saved_steps(folder / "checkpoints")


def checkpoint(folder: Path, step: int) -> Path:
    return storage.step_folder(folder / "checkpoints", step)


def snapshot(state: Any) -> dict[str, Any]:
    return copy.deepcopy(capture(state))


# Resuming


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_resumed_run_equals_a_straight_one(tmp_path, stop_at):
    assert_resumes_exactly(run, CountingConfig(checkpoint_every=2), stop_at=stop_at, folder=tmp_path)


def test_equality_after_a_resume_needs_the_optimizer(tmp_path):
    """The comparison above would notice a part that is not restored."""
    config = config_in(tmp_path)
    trained(config, 2)
    fabric, state = single_process(), restored(config)
    for moments in state.optimizer.state.values():
        moments["exp_avg"].zero_()
    take_step(fabric, config, state)
    straight = trained(config_in(tmp_path / "straight"), 3)
    assert first_difference(capture(straight)["network.weight"], capture(state)["network.weight"]) is not None


def test_a_fresh_run_restores_nothing(tmp_path):
    config = config_in(tmp_path)
    before = snapshot(new_state(single_process(), config))
    assert first_difference(before, snapshot(restored(config))) is None
    assert kept(tmp_path) == []


def test_a_run_needs_a_directory():
    with pytest.raises(ConfigError, match="run_dir: none; give one"):
        Checkpointer(single_process(), CountingConfig())


def test_the_files_are_read_by_the_safe_loader_alone(tmp_path):
    state = trained(config_in(tmp_path), 1)
    content = torch.load(checkpoint(tmp_path, 1) / "state.pt", weights_only=True)
    assert torch.equal(content["network.weight"], state.network.weight)
    assert content["step"] == 1
    assert content["optimizer"]["class"] == "Adam"


# Failing while saving


class Points:
    """Makes the n-th call of the calls that change files fail; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None, failure: type[BaseException], after: bool):
        self.calls: list[str] = []
        self._fail_at, self._failure, self._after = fail_at, failure, after
        for holder, name in (
            (os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "open"), (Path, "mkdir"), (Path, "unlink"),
            (shutil, "rmtree"), (torch, "save"),
        ):  # fmt: skip
            monkeypatch.setattr(holder, name, self._watched(name, getattr(holder, name)))

    def _watched(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            failing = len(self.calls) - 1 == self._fail_at
            if failing and not self._after:
                raise self._failure("injected")
            result = function(*arguments, **options)
            if failing:
                if name == "open":
                    result.close()
                raise self._failure("injected")
            return result

        return call


def save_third(config: CountingConfig, monkeypatch: pytest.MonkeyPatch, *failing: Any) -> tuple[list[str], bool]:
    """Save step 3 of a run that has steps 1 and 2 and keeps one; which calls there were, and whether it failed."""
    fabric = single_process()
    state = new_state(fabric, config)
    points, failed = None, False
    with contextlib.suppress(Killed, CheckpointError), Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
        take_step(fabric, config, state)
        points = Points(monkeypatch, *failing)
        try:
            checkpointer.save(state)
        except (Killed, CheckpointError):
            failed = True
            raise
        finally:
            monkeypatch.undo()
    assert points is not None
    return points.calls, failed


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trained(config_in(folder, keep=2), 2)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return {step: snapshot(trained(config_in(folder / str(step)), step)) for step in (2, 3)}


@pytest.mark.parametrize("failure", [Killed, OSError])
def test_failing_anywhere_inside_save_leaves_a_good_checkpoint_and_nothing_half_written(
    tmp_path, monkeypatch, two_saved, straight, failure
):
    shutil.copytree(two_saved, tmp_path / "counted")
    calls, failed = save_third(config_in(tmp_path / "counted", keep=1), monkeypatch, None, failure, False)
    assert not failed
    # The whole protocol is among the points: data, manifest, the folder's rename, its parent, pruning, the status.
    assert calls.count("fsync") >= 5
    assert {"mkdir", "save", "rename", "replace", "rmtree"} <= set(calls)
    outcomes = set()
    for point in range(len(calls)):
        for after in (False, True):
            folder = tmp_path / f"{point}-{after}"
            shutil.copytree(two_saved, folder)
            _, failed = save_third(config_in(folder, keep=1), monkeypatch, point, failure, after)
            for step in kept(folder):
                storage.verify(checkpoint(folder, step))
            newest = kept(folder)[-1]
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing is set aside
                state = restored(config_in(folder, keep=1))
            assert state.step == newest
            assert first_difference(straight[newest], capture(state)) is None, f"point {point} ({calls[point]})"
            left = {path.name for path in (folder / "checkpoints").iterdir()}
            assert all(name.startswith("step-") for name in left), left
            assert newest == 3 or failed, f"a save that returned is not on the disk: point {point} ({calls[point]})"
            outcomes.add((newest, failed))
    assert {(2, True), (3, True)} <= outcomes


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_a_straight_one(tmp_path):
    """A checkpoint after every step, so that many of the 25 kills fall inside save."""
    steps, random_moments = 100_000, random.Random(0)
    words = ("--run_dir", str(tmp_path / "run"), "--steps", str(steps), "--checkpoint_every", "1")
    reached = 0
    for _ in range(25):
        with Started(tmp_path, *words) as started:
            started.wait_for("step ")
            time.sleep(random_moments.uniform(0, 0.2))
            os.kill(started.pid, signal.SIGKILL)
            assert started.status() == -signal.SIGKILL
            lines = started.text().split("\n")[:-1]
        assert lines[0].startswith("step "), "a resumed run has nothing to warn of"
        first, last = (int(line.removeprefix("step ")) for line in (lines[0], lines[-1]))
        assert first in (reached, reached + 1), "a save that returned was lost"
        reached = last
    config = config_in(tmp_path / "run", checkpoint_every=1, steps=steps)
    state = restored(config)
    straight = run(single_process(), config_in(tmp_path / "straight", checkpoint_every=0, steps=state.step))
    assert first_difference(capture(straight), capture(state)) is None


def test_a_save_that_fails_names_the_folder_and_the_reason(tmp_path, monkeypatch, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    fabric, config = single_process(), config_in(tmp_path)
    state = new_state(fabric, config)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def save() -> None:
        with Checkpointer(fabric, config) as checkpointer:
            checkpointer.restore(state)
            take_step(fabric, config, state)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fail)
                checkpointer.save(state)

    with pytest.raises(CheckpointError) as caught:
        save()
    assert "step-00000003 could not be saved" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert "untouched" in str(caught.value)
    assert kept(tmp_path) == [1, 2]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left" in status["error"]


def test_a_disk_that_is_full_loses_nothing_and_goes_on_when_there_is_room(small_disk):
    """A real file system without room for a second checkpoint."""
    config = config_in(small_disk / "run", size=20_000)  # 240 kB: weights and Adam's two moments
    first = snapshot(trained(config, 1))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    with pytest.raises(CheckpointError, match="No space left on device"):
        trained(config, 2)
    state = restored(config)
    assert first_difference(first, capture(state)) is None
    assert kept(small_disk / "run") == [1]
    ballast.unlink()
    assert trained(config, 2).step == 2
    assert kept(small_disk / "run") == [1, 2]


# Damaged checkpoints


def truncate(folder: Path) -> None:
    data = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(data[:-100])


def flip_a_bit(folder: Path) -> None:
    flip(folder / "state.pt", 500, 3)


def remove_state(folder: Path) -> None:
    (folder / "state.pt").unlink()


def flip_the_manifest(folder: Path) -> None:
    flip(folder / "manifest.json", 200, 0)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def make_malicious(folder: Path) -> None:
    """A whole, well-formed checkpoint, checksums included, whose pickle would run a function."""
    root, step = folder.parent, int(folder.name[5:])
    shutil.rmtree(folder)
    temporary = storage.temporary_folder(root, step)
    temporary.mkdir()
    facts = storage.write_tensors(temporary / "state.pt", {"step": Attack(root / "attacked")})
    storage.publish(root, step, {"files": {"state.pt": facts}, "scores": {}})


DAMAGES = {
    "state.pt: .* bytes instead of": truncate,
    "state.pt: checksum differs": flip_a_bit,
    "state.pt: unreadable": remove_state,
    "manifest.json: ": flip_the_manifest,
    "manifest.json: missing": empty,
    "state.pt: refused by the safe loader": make_malicious,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, two_saved, straight, reason):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    DAMAGES[reason](checkpoint(tmp_path, 2))
    with pytest.warns(UserWarning, match=rf"step-00000002 is not usable: .*{reason}.*; moved aside to .*\.bad"):
        state = restored(config_in(tmp_path))
    assert state.step == 1
    assert kept(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "step-00000002.bad").is_dir()
    assert not (tmp_path / "checkpoints" / "attacked").exists()
    again = trained(config_in(tmp_path), 2)  # the lost step is done again, with the same bits
    assert first_difference(straight[2], capture(again)) is None
    assert kept(tmp_path) == [1, 2]


def test_without_a_good_checkpoint_every_file_and_reason_is_named(tmp_path, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    truncate(checkpoint(tmp_path, 1))
    flip_a_bit(checkpoint(tmp_path, 2))
    config = config_in(tmp_path)
    before = snapshot(state := new_state(single_process(), config))
    with (
        pytest.warns(UserWarning, match="not usable"),
        pytest.raises(CheckpointError) as caught,
        Checkpointer(single_process(), config) as checkpointer,
    ):
        checkpointer.restore(state)
    text = str(caught.value)
    assert text.startswith("no usable checkpoint in ")
    assert "step-00000002/state.pt: checksum differs" in text
    assert "step-00000001/state.pt: " in text
    assert "bytes instead of" in text
    assert first_difference(before, capture(state)) is None
    # A second start must not take the run for a fresh one, whose first act is to clear the curves.
    with (
        pytest.raises(CheckpointError, match=r"step-00000001.bad, step-00000002.bad are damaged; delete them to begin"),
        Checkpointer(single_process(), config) as checkpointer,
    ):
        checkpointer.restore(state)
    shutil.rmtree(tmp_path / "checkpoints")
    with Checkpointer(single_process(), config) as checkpointer:
        checkpointer.restore(state)


@pytest.mark.parametrize("score, best", [("val/fid_error", "min"), ("val/loss/size", "min"), ("val/f1", "max")])
def test_the_words_in_a_score_say_whether_more_is_better(score, best):
    assert mode_of(score) == best


def test_a_score_of_which_no_word_tells_is_refused_unless_the_mode_is_given(tmp_path):
    with pytest.raises(ConfigError, match="best: no word of 'val/size' says whether more is better"):
        Checkpointer(single_process(), config_in(tmp_path), best="val/size", mode="auto")
    Checkpointer(single_process(), config_in(tmp_path), best="val/size", mode="max")


def test_a_damaged_older_checkpoint_does_not_stop_a_good_newer_one(tmp_path, two_saved, straight):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    empty(checkpoint(tmp_path, 1))
    with pytest.warns(UserWarning, match="step-00000001 is not usable"):
        state = restored(config_in(tmp_path))
    assert first_difference(straight[2], capture(state)) is None
    assert kept(tmp_path) == [2]


# Checkpoints that do not fit


class Numbers:
    """An object with a state of its own."""

    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers

    def state_dict(self) -> dict[str, Any]:
        return dict(self.numbers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.numbers = dict(state_dict)


class Items:
    """Numbers by name of which each process has some."""

    def __init__(self, items: dict[str, float]) -> None:
        self.items = items

    def item_state_dict(self) -> dict[str, Any]:
        return dict(self.items)

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        self.items = dict(items)


@dataclass
class MixedState:
    network: Any
    optimizer: Any
    total: Any
    extra: Any
    step: int = 0


def mixed_state(
    network: nn.Module | None = None, optimizer: type[Optimizer] = Adam, total: Tensor | None = None, extra: Any = None
) -> MixedState:
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return MixedState(
        network,
        optimizer(network.parameters(), lr=0.1),
        torch.zeros(4) if total is None else total,
        Numbers(a=torch.ones(2), b=1) if extra is None else extra,
    )


def two_groups(parameters: Any, lr: float) -> Adam:
    first, *others = parameters
    return Adam([{"params": [first]}, {"params": others}], lr=lr)


def nothing_like_it() -> dict[str, Any]:
    """Name of what does not fit, to a state and the words that must be in the error."""
    linear, one = nn.Linear, nn.Linear(2, 1)
    return {
        "unknown key": ({"network": nn.Sequential(linear(3, 2), nn.ReLU())}, "network.1.weight is not in the state"),
        "missing key": (
            {"network": nn.Sequential(linear(3, 2), one, linear(1, 1))},
            "network.2.weight is missing from the checkpoint",
        ),
        "shape": (
            {"network": nn.Sequential(linear(4, 2), one)},
            "network.0.weight has shape (2, 3), the state's has (2, 4)",
        ),
        "dtype": ({"network": nn.Sequential(linear(3, 2), one).double()}, "is torch.float32, the state's is torch.fl"),
        "optimizer": ({"optimizer": SGD}, "optimizer is of Adam, the state's is of SGD"),
        "groups": (
            {"optimizer": two_groups},
            "optimizer has parameter groups of [4] parameters, the state's has [1, 3",
        ),
        "tensor shape": ({"total": torch.zeros(5)}, "total has shape (4,), the state's has (5,)"),
        "tensor dtype": ({"total": torch.zeros(4).long()}, "total is torch.float32, the state's is torch.int64"),
        "object key": ({"extra": Numbers(a=torch.ones(2), c=1)}, "extra: only one of checkpoint and state has b, c"),
        "object shape": ({"extra": Numbers(a=torch.ones(3), b=1)}, "extra.a has shape (2,), the state's has (3,)"),
        "kind": ({"extra": 3.0}, "extra is a dict, the state's is a float"),
        "items": ({"extra": Items({"p": 1.0})}, "extra is not in the state; extra is missing from the checkpoint"),
    }


@pytest.mark.parametrize("case", nothing_like_it())
def test_what_does_not_fit_is_named_and_nothing_is_touched(tmp_path, case):
    fabric, config = single_process(), config_in(tmp_path)
    saved = mixed_state()
    saved.network(torch.ones(1, 3)).sum().backward()
    saved.optimizer.step()
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(saved)
        saved.step = 1
        checkpointer.save(saved)
    fields, words = nothing_like_it()[case]
    state = mixed_state(**fields)
    before = snapshot(state)
    with pytest.raises(CheckpointError) as caught, Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
    assert words in str(caught.value)
    assert "step-00000001 does not fit this state" in str(caught.value)
    assert first_difference(before, capture(state)) is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001"]
    fitting = mixed_state()
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(fitting)
    assert first_difference(capture(saved), capture(fitting)) is None


def test_items_without_a_taker_are_an_error(tmp_path):
    fabric, config = single_process(), config_in(tmp_path)
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state := mixed_state(extra=Items({"p": 1.0})))
        checkpointer.save(state)
    with (
        pytest.raises(CheckpointError, match="extra is missing from the checkpoint; extra is not in the state"),
        Checkpointer(fabric, config) as checkpointer,
    ):
        checkpointer.restore(mixed_state())


def test_a_state_that_cannot_be_stored_says_which_part(tmp_path):
    state = mixed_state(extra=object())
    with Checkpointer(single_process(), config_in(tmp_path)) as checkpointer:
        checkpointer.restore(state)
        with pytest.raises(CheckpointError, match=r"extra: a object cannot be in a checkpoint; keep tensors, numbers"):
            checkpointer.save(state)
    assert kept(tmp_path) == []


# What is kept


@pytest.mark.parametrize(
    "keep, scores, expected",
    [
        (1, {}, [6]),
        (2, {}, [5, 6]),
        (2, {1: 0.5, 2: 0.1, 3: 0.3}, [2, 5, 6]),
        (1, {2: 0.1, 6: 0.05}, [6]),
        (2, {1: 0.2, 3: 0.2}, [1, 5, 6]),
        (2, {1: float("nan"), 3: 0.4}, [3, 5, 6]),
        (9, {2: 0.1}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, scores, expected):
    trained(config_in(tmp_path, keep=keep), 6, scores)
    assert kept(tmp_path) == expected
    best = tmp_path / "checkpoints" / "best.json"
    finite = {step: value for step, value in scores.items() if value == value}
    if finite:
        step = min(finite, key=lambda step: (finite[step], step))
        assert json.loads(best.read_text()) == {"step": step, "folder": f"step-{step:08d}", "score": finite[step]}
    else:
        assert not best.exists()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('{"step": 1}')])
def test_best_is_derived_from_the_manifests_at_every_restore(tmp_path, damage):
    config = config_in(tmp_path)
    trained(config, 4, {1: 0.5, 2: 0.1, 4: 0.3})
    best = tmp_path / "checkpoints" / "best.json"
    text = best.read_text()
    damage(best)
    restored(config)
    assert best.read_text() == text
    shutil.rmtree(checkpoint(tmp_path, 2))
    restored(config)
    assert json.loads(best.read_text())["step"] == 4


@pytest.mark.parametrize("mode, better, worse", [("min", 0.1, 0.3), ("max", 0.3, 0.1)])
def test_best_compares_with_every_checkpoint_that_exists(tmp_path, mode, better, worse):
    fabric, config = single_process(), config_in(tmp_path)
    state = new_state(fabric, config)
    with Checkpointer(fabric, config, best="score", mode=mode) as checkpointer:
        checkpointer.restore(state)
        assert checkpointer.is_best({"score": 0.2})
        assert not checkpointer.is_best({"score": float("nan")})
        assert not checkpointer.is_best({"other": better})
        checkpointer.save(state, {"score": 0.2})
        judged = [checkpointer.is_best({"score": value}) for value in (better, 0.2, worse)]
    assert judged == [True, False, False]
    with Checkpointer(fabric, config, best="score", mode=mode) as checkpointer:
        checkpointer.restore(state)
        assert [checkpointer.is_best({"score": value}) for value in (better, 0.2, worse)] == judged


def test_load_module_takes_the_best_or_the_last(tmp_path):
    config = config_in(tmp_path, keep=3)
    fabric, weights = single_process(), {}
    state = new_state(fabric, config)
    with Checkpointer(fabric, config, best="score") as checkpointer:
        checkpointer.restore(state)
        for score in (0.3, 0.1, 0.2):
            take_step(fabric, config, state)
            weights[state.step] = state.network.weight.detach().clone()
            checkpointer.save(state, {"score": score})
    assert torch.equal(load_module(tmp_path, "network")["weight"], weights[2])
    assert torch.equal(load_module(tmp_path, "network", which="last")["weight"], weights[3])
    with pytest.raises(CheckpointError, match="has no 'generator'; it has network, optimizer"):
        load_module(tmp_path, "generator")
    flip_a_bit(checkpoint(tmp_path, 2))
    with pytest.raises(CheckpointError, match="checksum differs"):
        load_module(tmp_path, "network")
    with pytest.raises(ConfigError, match=r"run_dir: .*holds no checkpoint"):
        load_module(tmp_path / "elsewhere", "network")


def test_load_module_takes_the_last_where_nothing_has_a_score(tmp_path):
    state = trained(config_in(tmp_path), 2)
    assert torch.equal(load_module(tmp_path, "network")["weight"], state.network.weight)


# What a resumed run may be


def test_a_changed_config_is_refused_and_the_run_left_as_it_was(tmp_path, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    stored = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"another config: lr \(0.1 -> 0.3\); take the change back"):
        restored(config_in(tmp_path, lr=0.3))
    assert (tmp_path / "config.yaml").read_text() == stored
    assert kept(tmp_path) == [1, 2]


def test_steps_may_change_unless_a_schedule_reads_them(tmp_path, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    fabric, config = single_process(), config_in(tmp_path, steps=9)
    with (
        pytest.raises(ConfigError, match=r"steps \(6 -> 9\)"),
        Checkpointer(fabric, config, steps_fixed=True),
    ):
        pass
    assert restored(config).step == 2


def test_a_run_without_a_checkpoint_may_begin_again_with_another_config(tmp_path):
    restored(config_in(tmp_path))
    assert restored(config_in(tmp_path, lr=0.3)).step == 0
    assert "lr: 0.3" in (tmp_path / "config.yaml").read_text()


def test_resuming_on_another_machine_names_what_differs(tmp_path, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="goes on, but not to the last bit: threads: 1 -> 2$"):
            restored(config_in(tmp_path))
    finally:
        torch.set_num_threads(1)


def with_scaler() -> Fabric:
    # Fabric itself picks bfloat16 on a CPU, which has no scaler.
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2))
    return Fabric(accelerator="cpu", devices=1, plugins=[plugin])


def test_the_scaler_of_16_mixed_is_part_of_a_checkpoint(tmp_path):
    config, fabric = config_in(tmp_path, precision="16-mixed"), with_scaler()
    state = new_state(fabric, config)
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
        while state.step < 3:
            take_step(fabric, config, state)
        checkpointer.save(state)
    saved = fabric.strategy.precision.state_dict()
    assert (saved["scale"], saved["_growth_tracker"]) == (128.0, 1)
    fabric = with_scaler()
    assert fabric.strategy.precision.state_dict()["scale"] == 64.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not to the last bit.*")
        with Checkpointer(fabric, config) as checkpointer:
            checkpointer.restore(new_state(fabric, config))
    assert fabric.strategy.precision.state_dict() == saved


# Several processes


@dataclass
class SharedState:
    network: nn.Module
    sums: MetricLogger
    items: Items
    step: int = 0


def shared_state(fabric: Fabric) -> SharedState:
    torch.manual_seed(0)
    network = fabric.setup(nn.Linear(2, 1)) if fabric.world_size > 1 else nn.Linear(2, 1)
    name = f"item-{fabric.global_rank}"
    return SharedState(network, MetricLogger(fabric, None), Items({name: float(fabric.global_rank)}))


def save_items(fabric: Fabric, folder: str) -> dict[str, Any]:
    state = shared_state(fabric)
    with Checkpointer(fabric, CountingConfig(run_dir=folder)) as checkpointer:
        checkpointer.restore(state)
        state.sums.update({"loss": float(10 + fabric.global_rank)})
        state.step = 1
        checkpointer.save(state)
    return {}


def load_items(fabric: Fabric, folder: str) -> dict[str, Any]:
    state = shared_state(fabric)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not to the last bit: processes.*")
        with Checkpointer(fabric, CountingConfig(run_dir=folder)) as checkpointer:
            checkpointer.restore(state)
    return {"items": state.items.items, "loss": state.sums.flush(2)["loss"], "step": state.step}


@pytest.mark.distributed
@pytest.mark.parametrize("saving, loading", [(2, 2), (2, 1), (1, 2)])
def test_items_resume_on_another_number_of_processes(tmp_path, saving, loading):
    in_processes(save_items, saving, str(tmp_path))
    names = {path.name for path in checkpoint(tmp_path, 1).iterdir()}
    assert names == {"state.pt", "manifest.json", *(f"rank-{rank:05d}.pt" for rank in range(saving))}
    everything = {f"item-{rank}": float(rank) for rank in range(saving)}
    mean = sum(10 + rank for rank in range(saving)) / saving
    for result in in_processes(load_items, loading, str(tmp_path)):
        assert result == {"items": everything, "loss": mean, "step": 1}


def fail_on_one(fabric: Fabric, folder: str, failing: int) -> dict[str, Any]:
    """What each process sees of a save in which only one fails, and of the save after it."""
    state = shared_state(fabric)
    with Checkpointer(fabric, CountingConfig(run_dir=folder)) as checkpointer:
        checkpointer.restore(state)
        state.step = 1
        checkpointer.save(state)
        state.step = 2
        fsync = os.fsync
        if fabric.global_rank == failing:
            os.fsync = _no_space
        try:
            checkpointer.save(state)
            text = "saved"
        except CheckpointError as error:
            text = str(error)
        os.fsync = fsync
        before = storage.saved_steps(Path(folder) / "checkpoints")
        state.step = 3
        checkpointer.save(state)
    return {"text": text, "before": before, "after": storage.saved_steps(Path(folder) / "checkpoints")}


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.distributed
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_on_one_process_raises_on_all(tmp_path, failing):
    for result in in_processes(fail_on_one, 2, str(tmp_path), failing):
        assert f"process {failing}: OSError: [Errno 28] No space left on device" in result["text"]
        assert result["before"] == [1]
        assert result["after"] == [1, 3]


def restore_damaged(fabric: Fabric, folder: str) -> dict[str, Any]:
    config = CountingConfig(run_dir=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = new_state(fabric, config)
        with Checkpointer(fabric, config) as checkpointer:
            checkpointer.restore(state)
    relevant = [str(warning.message) for warning in caught if "not usable" in str(warning.message)]
    return {"step": state.step, "warnings": len(relevant), "weight": state.network.weight.detach()}


@pytest.mark.distributed
def test_all_processes_fall_back_to_the_same_checkpoint(tmp_path, two_saved):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    truncate(checkpoint(tmp_path, 2))
    first, second = in_processes(restore_damaged, 2, str(tmp_path))
    assert (first["step"], second["step"]) == (1, 1)
    assert (first["warnings"], second["warnings"]) == (1, 0)
    assert torch.equal(first["weight"], second["weight"])


# Ends of a run


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"stop_at": 3}, "stop_at: 3, but the run is at 3 already; give a later step"),
        ({"steps": 2}, "steps: 2, but the run is at 3 already; give at least as many"),
    ],
)
def test_an_end_that_is_past_already_is_refused_and_nothing_is_written(fields, text, tmp_path):
    run(single_process(), config_in(tmp_path, stop_at=3))
    before = {name: (tmp_path / name).read_bytes() for name in ("status.json", "config.yaml")}
    with pytest.raises(ConfigError, match=text):
        run(single_process(), config_in(tmp_path, **fields))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert kept(tmp_path)[-1] == 3


def test_a_run_is_complete_when_its_loop_ends_by_itself_and_stopped_when_asked(tmp_path):
    run(single_process(), config_in(tmp_path / "stopped", stop_at=3))
    assert status(tmp_path / "stopped")["state"] == "stopped"

    early = config_in(tmp_path / "early")
    fabric = single_process()
    with Checkpointer(fabric, early) as checkpointer:
        checkpointer.restore(new_state(fabric, early))
        checkpointer.due(2)  # the loop found that two steps are enough
    assert status(tmp_path / "early")["state"] == "complete"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a descriptor is of")
def test_rows_are_on_the_disk_before_the_checkpoint_that_is_past_them(tmp_path, monkeypatch):
    @dataclass
    class LoggedState:
        metrics: MetricLogger
        step: int = 1

    fabric, synced = single_process(), []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(Path(f"/proc/self/fd/{file}").readlink().name), fsync(file))
    )
    state = LoggedState(MetricLogger(fabric, tmp_path))
    with Checkpointer(fabric, config_in(tmp_path)) as checkpointer:
        checkpointer.restore(state)
        state.metrics.record(1, {"score": 1.0})
        synced.clear()
        checkpointer.save(state)
    events = next(name for name in synced if "tfevents" in name)
    assert synced.index("metrics.jsonl") < synced.index(".tmp-manifest.json")
    assert synced.index(events) < synced.index(".tmp-manifest.json")
