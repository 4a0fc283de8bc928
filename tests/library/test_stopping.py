import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_custom import storage
from lightning_custom.run import exit_status
from lightning_custom.stopping import STOP_SIGNALS, Stopper, ignore_stop_signals
from lightning_custom.testing import assert_states_equal, in_processes, single_process
from tests.library.counting_loop import CountingConfig, CountingState, Started, run

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def signal_at(step: int, number: int) -> Any:
    def after_step(state: CountingState) -> None:
        if state.step == step:
            os.kill(os.getpid(), number)

    return after_step


@SIGNALS
def test_a_signal_lets_the_step_finish_saves_and_leaves_a_run_that_resumes_exactly(tmp_path, number):
    config = CountingConfig(run_dir=str(tmp_path / "run"), checkpoint_every=0)
    before = handlers()
    stopped = run(single_process(), config, after_step=signal_at(3, number))
    assert stopped.step == 3
    assert handlers() == before
    assert storage.saved_steps(tmp_path / "run" / "checkpoints") == [3]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"], status["signal"]) == ("stopped", 3, number)
    assert exit_status(tmp_path / "run") == 128 + number
    resumed = run(single_process(), config)
    straight = run(single_process(), CountingConfig(run_dir=str(tmp_path / "straight")))
    assert_states_equal(straight, resumed)
    assert exit_status(tmp_path / "run") == 0


def test_a_signal_in_the_last_step_leaves_a_complete_run(tmp_path):
    config = CountingConfig(run_dir=str(tmp_path))
    assert run(single_process(), config, after_step=signal_at(6, signal.SIGTERM)).step == 6
    assert (status_of(tmp_path)["state"], exit_status(tmp_path)) == ("complete", 0)


def test_stop_at_stops_as_a_signal_does_with_status_0(tmp_path):
    config = CountingConfig(run_dir=str(tmp_path), checkpoint_every=0, stop_at=4)
    assert run(single_process(), config).step == 4
    assert storage.saved_steps(tmp_path / "checkpoints") == [4]
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["signal"], exit_status(tmp_path)) == ("stopped", None, 0)


def test_max_time_stops_as_a_signal_does_with_status_0(tmp_path):
    config = CountingConfig(run_dir=str(tmp_path), checkpoint_every=0, steps=1000, max_time="1s")
    state = run(single_process(), config, after_step=lambda state: time.sleep(0.3))
    assert 1 < state.step < 1000
    assert storage.saved_steps(tmp_path / "checkpoints") == [state.step]
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["signal"], exit_status(tmp_path)) == ("stopped", None, 0)


def test_the_first_signal_puts_the_earlier_handlers_back(tmp_path):
    received = []
    earlier = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        stopper = Stopper(single_process())
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stopper.poll(), received) == (signal.SIGUSR1, [])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stopper.poll(), received) == (signal.SIGUSR1, [signal.SIGUSR1])
        stopper.close()
    finally:
        signal.signal(signal.SIGUSR1, earlier)


def test_handlers_come_back_when_the_loop_fails(tmp_path):
    before = handlers()

    def fail(state: CountingState) -> None:
        assert handlers() != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(single_process(), CountingConfig(run_dir=str(tmp_path)), after_step=fail)
    assert handlers() == before


def test_outside_the_main_thread_a_run_takes_no_signals_but_stops_at_its_step(tmp_path):
    states, seen = [], []
    config = CountingConfig(run_dir=str(tmp_path), stop_at=2)
    before = handlers()

    def loop() -> None:
        states.append(run(single_process(), config, after_step=lambda state: seen.append(handlers())))

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert [state.step for state in states] == [2]
    assert seen == [before, before]


def test_a_worker_ignores_stop_signals():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        ignore_stop_signals()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        assert handlers() == [signal.SIG_IGN] * len(STOP_SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The program, as schedulers see it


def long_run(folder: Path, *more: str) -> Started:
    words = ("--run_dir", str(folder / "run"), "--steps", "100000", "--checkpoint_every", "0")
    return Started(folder, *words, "--pause", "0.01", *more)


def assert_stopped(folder: Path, number: int) -> None:
    status = status_of(folder / "run")
    assert (status["state"], status["signal"]) == ("stopped", number)
    assert storage.saved_steps(folder / "run" / "checkpoints") == [status["step"]]


@SIGNALS
def test_the_exit_status_is_128_plus_the_signal(tmp_path, number):
    with long_run(tmp_path) as started:
        started.wait_for("step 3")
        os.kill(started.pid, number)
        assert started.status() == 128 + number
        *_, step, last = started.text().splitlines()
        status = status_of(tmp_path / "run")
        assert step == f"step {status['step']}", "more than the loop's own lines"
        assert last == f"stopped after step {status['step']} of 100000, saved; go on with: {status['command']}"
    assert_stopped(tmp_path, number)


def test_a_signal_to_the_process_group_leaves_data_workers_alive_until_the_save(tmp_path):
    with long_run(tmp_path, "--workers", "2") as started:
        started.wait_for("step 3")
        os.killpg(started.pid, signal.SIGTERM)
        assert started.status() == 128 + signal.SIGTERM
        assert "error" not in started.text().lower()
    assert_stopped(tmp_path, signal.SIGTERM)


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    with long_run(tmp_path, "--pause", "20") as started:  # the step in progress would take 20 s
        started.wait_for("step 1")
        os.kill(started.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert started.process.is_alive()
        os.kill(started.pid, signal.SIGTERM)
        assert started.status(seconds=5) == -signal.SIGTERM
    assert storage.saved_steps(tmp_path / "run" / "checkpoints") == []
    assert status_of(tmp_path / "run")["state"] == "running"


# Several processes


def stop_one(fabric: Any, folder: str, receiver: int, number: int) -> dict[str, Any]:
    """Where each process stops when only ``receiver`` gets a signal, in its third step."""
    config = CountingConfig(run_dir=folder, steps=50, checkpoint_every=0)

    def after_step(state: CountingState) -> None:
        if state.step == 3 and fabric.global_rank == receiver:
            os.kill(os.getpid(), number)

    state = run(fabric, config, after_step=after_step)
    return {"step": state.step, "weight": state.network.weight.detach()}


@pytest.mark.distributed
@pytest.mark.parametrize("receiver", [0, 1])
def test_all_processes_stop_after_the_same_step(tmp_path, receiver):
    first, second = in_processes(stop_one, 2, str(tmp_path), receiver, int(signal.SIGTERM))
    assert first["step"] == second["step"] == 4  # agreed on in step 3, read in step 4
    assert torch.equal(first["weight"], second["weight"])
    assert storage.saved_steps(tmp_path / "checkpoints") == [4]
    assert (status_of(tmp_path)["signal"], exit_status(tmp_path)) == (signal.SIGTERM, 128 + signal.SIGTERM)


def poll_differently(fabric: Any) -> list[int]:
    stopper = Stopper(fabric, max_seconds=0.0 if fabric.global_rank == 1 else None)
    seen = [stopper.poll()]
    if fabric.global_rank == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    seen += [stopper.poll(), stopper.poll(), stopper.poll()]
    stopper.finish()
    stopper.close()
    return seen


@pytest.mark.distributed
def test_processes_agree_on_the_time_limit_of_one(tmp_path):
    assert in_processes(poll_differently, 2) == [[0, -1, -1, -1]] * 2


def stop_nobody(fabric: Any, folder: str) -> int:
    return run(fabric, CountingConfig(run_dir=folder)).step


@pytest.mark.distributed
def test_processes_that_nobody_stops_finish(tmp_path):
    assert in_processes(stop_nobody, 2, str(tmp_path)) == [6, 6]
    assert status_of(tmp_path)["state"] == "complete"


@pytest.mark.distributed
def test_under_fabrics_own_launcher_process_0_carries_the_status(tmp_path):
    """The launcher starts the program again for process 1; a signal to the group reaches both."""
    words = ["--run_dir", str(tmp_path / "run"), "--steps", "100000", "--checkpoint_every", "0", "--pause", "0.01"]
    command = [sys.executable, "-m", "tests.library.counting_loop", "--devices", "2", *words]
    log = (tmp_path / "log.txt").open("w+")
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while (tmp_path / "log.txt").read_text().count("step 3") < 2:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log.txt").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
    assert_stopped(tmp_path, signal.SIGTERM)
