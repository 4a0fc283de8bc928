"""The SLURM script of the pages, with stand-ins for srun and scontrol: stopped before the limit, requeued, complete."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_custom.metrics import read_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "how-to" / "slurm.sh"
SRUN = """#!/bin/bash
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" &
    echo $! >> tasks
done
wait
"""
RUN_DIR = "runs/long"
FLAGS = ["--accelerator", "cpu", "--log_every", "10", "--validate_every", "0", "--checkpoint_every", "0"]


@pytest.fixture
def cluster(tmp_path):
    """A folder with the stand-ins, and the environment of a job in it."""
    programs = {"srun": SRUN, "scontrol": '#!/bin/bash\necho "$@" >> requeued\n'}
    programs["python"] = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "long", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return tmp_path, environment


def submit(cluster, *words):
    folder, environment = cluster
    return subprocess.Popen(["bash", str(SCRIPT), RUN_DIR, *words], cwd=folder, env=environment)


def status(folder):
    return json.loads((folder / RUN_DIR / "status.json").read_text())


def signal_tasks_once_there_are_rows(folder, number):
    deadline = time.monotonic() + 200
    while not (folder / RUN_DIR / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for pid in (folder / "tasks").read_text().split():
        os.kill(int(pid), number)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_job_that_is_told_to_stop_saves_requeues_itself_and_ends_complete(cluster):
    folder, _ = cluster
    job = submit(cluster, "recipes.classification", "--steps", "100000", "--schedule", "constant", *FLAGS)
    signal_tasks_once_there_are_rows(folder, signal.SIGUSR1)
    assert job.wait(250) == 0
    stopped = status(folder)
    assert (stopped["state"], stopped["signal"]) == ("stopped", signal.SIGUSR1)
    assert (folder / "requeued").read_text() == "requeue 4711\n"
    assert submit(cluster, "recipes.classification", "--steps", str(stopped["step"] + 20), *FLAGS).wait(250) == 0
    complete = status(folder)
    assert (complete["state"], complete["step"]) == ("complete", stopped["step"] + 20)
    assert (folder / "requeued").read_text() == "requeue 4711\n"
    steps = [row["step"] for row in read_rows(folder / RUN_DIR) if "train/loss" in row]
    assert steps == sorted(set(steps))
    assert min(steps) <= stopped["step"] < max(steps)


@pytest.mark.distributed
def test_a_job_that_fails_is_not_requeued(cluster):
    folder, _ = cluster
    (folder / RUN_DIR).mkdir(parents=True)
    (folder / RUN_DIR / "status.json").write_text('{"state": "failed"}')
    assert submit(cluster, "no_module_of_this_name").wait(60) == 1
    assert not (folder / "requeued").exists()
