import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_custom import storage
from lightning_custom.checkpoint import Checkpointer
from lightning_custom.config import RunConfig
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.run import Run, config_of_run, exit_status
from lightning_custom.testing import in_processes, single_process
from tests.library.counting_loop import CountingConfig, Started, run

REPOSITORY = Path(__file__).parents[2]


def config_in(folder: Path, **fields: Any) -> CountingConfig:
    return CountingConfig(run_dir=str(folder), **fields)


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


# One owner


def test_a_second_owner_is_refused_with_host_and_pid_until_the_first_leaves(tmp_path):
    first, second = Run(config_in(tmp_path)), Run(config_in(tmp_path))
    first.open()
    words = rf"run_dir: {tmp_path} is in use by host {socket.gethostname()} pid {os.getpid()}; wait for it, stop it, or"
    with pytest.raises(ConfigError, match=words):
        second.open()
    first.close()
    second.open()
    second.close()


@pytest.mark.parametrize("name", ["events.out.tfevents.1.host", "metrics.jsonl"])
def test_a_fresh_run_does_not_clear_what_another_program_has_logged(name, tmp_path):
    (tmp_path / name).write_text("a week of work\n")
    (tmp_path / ".tmp-mine").mkdir()
    with pytest.raises(ConfigError, match=f"run_dir: {tmp_path} holds {name} and no run of ours, and would lose it"):
        Run(config_in(tmp_path)).open()
    assert (tmp_path / name).read_text() == "a week of work\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", name]


def test_the_lock_is_freed_when_the_loop_fails(tmp_path):
    fabric = single_process()

    def fail() -> None:
        with Checkpointer(fabric, config_in(tmp_path)):
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


def test_only_the_owner_sweeps(tmp_path):
    owner = Run(config_in(tmp_path))
    owner.open()
    stale = [owner.checkpoints / ".tmp-step-00000002", tmp_path / ".tmp-status.json"]
    stale[0].mkdir()
    stale[1].write_text("half")
    with pytest.raises(ConfigError, match="in use"):
        Run(config_in(tmp_path)).open()
    assert all(path.exists() for path in stale)
    owner.close()
    owner.open()
    assert not any(path.exists() for path in stale)
    owner.close()


@pytest.mark.distributed
def test_the_same_command_started_twice_at_once_runs_once(tmp_path):
    words = ("--run_dir", str(tmp_path / "run"), "--steps", "20", "--pause", "0.1")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with Started(folders[0], *words) as a, Started(folders[1], *words) as b:
        statuses = [a.status(), b.status()]
        assert sorted(statuses) == [0, 2], (a.text(), b.text())
        winner, loser = (a, b) if statuses == [0, 2] else (b, a)
        line = f"error: run_dir: {tmp_path}/run is in use by host {socket.gethostname()} pid {winner.pid}; wait for it,"
        assert loser.text().startswith(line)
        assert loser.text().count("\n") == 1
        assert winner.text().endswith("step 20\n")
    assert status_of(tmp_path / "run")["state"] == "complete"


def test_kill_9_frees_the_lock_while_a_forked_worker_lives(tmp_path):
    words = ("--run_dir", str(tmp_path / "run"), "--steps", "1000", "--pause", "0.01", "--workers", "1")
    with Started(tmp_path, *words) as started:
        started.wait_for("step 3")
        workers = Path(f"/proc/{started.pid}/task/{started.pid}/children")
        if not workers.exists():
            pytest.skip("no /proc to list a process's children")
        children = [int(pid) for pid in workers.read_text().split()]
        assert children
        for child in children:
            os.kill(child, signal.SIGSTOP)  # a worker that notices nothing
        os.kill(started.pid, signal.SIGKILL)
        assert started.status() == -signal.SIGKILL
        assert all(Path(f"/proc/{child}").exists() for child in children)
        assert status_of(tmp_path / "run")["state"] == "running"
        free = Run(config_in(tmp_path / "run"))
        free.open()
        free.close()


def both_visible(fabric: Any, first: str, second: str) -> str:
    folder = first if fabric.global_rank == 0 else second
    try:
        with Checkpointer(fabric, CountingConfig(run_dir=folder)):
            return "shared"
    except ConfigError as error:
        return str(error)


@pytest.mark.distributed
def test_a_run_directory_that_is_not_shared_is_refused(tmp_path):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert in_processes(both_visible, 2, folders[0], folders[0]) == ["shared", "shared"]
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)  # as an earlier run on that node left it
    for text in in_processes(both_visible, 2, *folders):
        assert "is not the same directory for processes 0 and 1" in text


# Where it cannot write


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=rf"run_dir: cannot write to {folder} \(.*\); choose another with --run_"):
            Run(config_in(folder)).open()


def test_an_unwritable_directory_is_named():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to other users
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(ConfigError, match=rf"run_dir: cannot write to {folder}/run \(Permission denied\); choose"):
            Run(config_in(folder / "run")).open()
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


# auto, must, never


def test_resume_must_needs_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=rf"resume: must, but {tmp_path}/run holds no checkpoint; check --run_dir"):
        run(single_process(), config_in(tmp_path / "run", resume="must"))
    assert not (tmp_path / "run").exists()
    run(single_process(), config_in(tmp_path / "run", stop_at=2))
    assert run(single_process(), config_in(tmp_path / "run", resume="must")).step == 6


def test_resume_never_refuses_a_directory_that_holds_a_run(tmp_path):
    assert run(single_process(), config_in(tmp_path, resume="never", stop_at=2)).step == 2
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"resume: never, but {tmp_path} holds a run; choose another --run_dir"):
        run(single_process(), config_in(tmp_path, resume="never"))
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_auto_begins_and_goes_on(tmp_path):
    steps: list[int] = []
    config = config_in(tmp_path)
    run(single_process(), config_in(tmp_path, stop_at=3), after_step=lambda state: steps.append(state.step))
    run(single_process(), config, after_step=lambda state: steps.append(state.step))
    run(single_process(), config, after_step=lambda state: steps.append(state.step))
    assert steps == [1, 2, 3, 4, 5, 6]


# status.json


def test_status_follows_the_run(tmp_path):
    seen = []
    config = config_in(tmp_path, stop_at=3)
    run(single_process(), config, after_step=lambda state: seen.append((state.step, status_of(tmp_path))))
    assert [(step, status["state"], status["step"]) for step, status in seen] == [
        (1, "running", 0),
        (2, "running", 0),
        (3, "running", 2),
    ]
    stopped = status_of(tmp_path)
    assert {name: stopped[name] for name in ("state", "step", "steps", "signal", "error", "recipe")} == {
        "state": "stopped",
        "step": 3,
        "steps": 6,
        "signal": None,
        "error": None,
        "recipe": "counting_loop",
    }
    assert (stopped["host"], stopped["pid"]) == (socket.gethostname(), os.getpid())
    assert time.strptime(stopped["time"], "%Y-%m-%dT%H:%M:%S%z")
    assert shlex.split(stopped["command"])[-2:] == ["--run_dir", str(tmp_path)]
    assert exit_status(tmp_path) == 0
    run(single_process(), config_in(tmp_path))
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("complete", 6)
    assert exit_status(tmp_path) == 0


def test_status_of_a_failed_run_says_why(tmp_path):
    def fail(state: Any) -> None:
        if state.step == 3:
            raise ZeroDivisionError("by design")

    with pytest.raises(ZeroDivisionError):
        run(single_process(), config_in(tmp_path), after_step=fail)
    status = status_of(tmp_path)
    assert (status["state"], status["step"], status["error"]) == ("failed", 2, "ZeroDivisionError: by design")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_exit_status_is_128_plus_the_signal(tmp_path, number):
    Run(config_in(tmp_path)).write_status("stopped", 3, signal=number)
    assert exit_status(tmp_path) == 128 + number
    Run(config_in(tmp_path)).write_status("complete", 6)
    assert exit_status(tmp_path) == 0


@pytest.mark.slow
def test_the_command_in_the_status_goes_on_with_the_run(tmp_path):
    """The program as a user starts it: a preset and flags that the command need not repeat."""
    program = [sys.executable, "-m", "tests.library.counting_loop", "--preset", "wide", "--steps", "9"]
    folder = tmp_path / "a run"
    words = ["--run_dir", str(folder), "--stop_at", "4"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*program, *words], cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    status = status_of(folder)
    assert (status["state"], status["step"]) == ("stopped", 4)
    assert status["command"] == f"python -m tests.library.counting_loop --run_dir {shlex.quote(str(folder))}"
    resumed = subprocess.run(
        status["command"], shell=True, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    assert resumed.stdout == "".join(f"step {step}\n" for step in range(5, 10))
    assert status_of(folder)["state"] == "complete"
    assert yaml.safe_load((folder / "config.yaml").read_text())["size"] == 5


# config.yaml


def test_config_yaml_holds_what_a_fresh_run_needs_and_no_more(tmp_path):
    run(single_process(), config_in(tmp_path, lr=0.3, stop_at=1, max_time="1h", resume="never"))
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["lr"] == 0.3
    assert stored["betas"] == [0.9, 0.99]
    assert not {"run_dir", "resume", "stop_at", "max_time"} & stored.keys()
    assert Run(config_in(tmp_path)).stored_config() == stored
    assert Run(config_in(tmp_path / "elsewhere")).stored_config() is None


def test_the_config_of_a_run_is_read_by_its_own_kind_alone(tmp_path):
    run(single_process(), config_in(tmp_path, lr=0.3, stop_at=1))
    found = config_of_run(CountingConfig, str(tmp_path), steps=7)
    assert (found.lr, found.steps, found.run_dir) == (0.3, 7, None)
    with pytest.raises(ConfigError, match=r"holds a run of counting_loop, not of config; check the path"):
        config_of_run(RunConfig, str(tmp_path))
    with pytest.raises(ConfigError, match=f"run_dir: {tmp_path / 'none'} holds no run; check the path"):
        config_of_run(CountingConfig, str(tmp_path / "none"))


def test_a_damaged_config_is_named(tmp_path):
    run(single_process(), config_in(tmp_path, stop_at=2))
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=rf"config: {tmp_path}/config.yaml is not valid YAML"):
        run(single_process(), config_in(tmp_path))
    assert storage.saved_steps(tmp_path / "checkpoints") == [2]


def test_a_directory_that_became_unwritable_is_an_error_on_one_line(tmp_path, monkeypatch):
    def fail(path: Path, text: str) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(storage, "write_atomically", fail)
    with pytest.raises(CheckpointError, match=r"OSError: \[Errno 30\] Read-only file system: .*config.yaml") as caught:
        run(single_process(), config_in(tmp_path))
    assert "\n" not in str(caught.value)
