"""Killed with -9 anywhere, in the middle of a save too, a run goes on to the same bits."""

import json
import os
import random
import signal
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_custom.storage import saved_steps, step_folder
from lightning_custom.testing import assert_rows_equal, first_difference
from tests.recipes.program import fork

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMMON = (
    *("--accelerator", "cpu", "--width", 8),
    *("--log_every", 10, "--validate_every", 250, "--checkpoint_every", 6),
)
RECIPES = {
    "gan": ("--batch_size", 8, "--latent_size", 4),
    "diffusion": ("--batch_size", 8, "--depth", 1, "--sample_steps", 2, "--schedule", "constant"),
    "classification": (
        *("--batch_size", 8, "--sam", 0.05, "--mixup", 0.2, "--average", "ema", "--schedule", "constant"),
    ),
    "adversarial_training": (
        *("--batch_size", 8, "--attack_steps", 2, "--val_attack_steps", 2, "--schedule", "constant"),
        *("--test_attack_steps", 2, "--test_restarts", 1, "--test_queries", 0),
    ),
    "maml": (
        *("--meta_batch_size", 5, "--shots", 3, "--val_tasks", 4, "--test_tasks", 4, "--learn_inner_lr", "true"),
        *("--inner_optimizer", "momentum", "--inner_steps", 2),
    ),
    "maml_plus_plus": (
        *("--meta_batch_size", 5, "--shots", 3, "--val_tasks", 4, "--test_tasks", 4),
        *("--inner_steps", 2, "--first_order_share", 0.3, "--multi_step_share", 0.5),
    ),
    "dqn": (
        *("--num_envs", 2, "--train_every", 8, "--updates", 1, "--learning_starts", 7, "--capacity", 300),
        *("--batch_size", 8, "--n_step", 3, "--prioritised", "true", "--val_episodes", 2, "--test_episodes", 2),
    ),
    "sac": (
        *("--num_envs", 2, "--train_every", 2, "--updates", 1, "--learning_starts", 7, "--capacity", 300),
        *("--batch_size", 8, "--n_step", 3, "--val_episodes", 2, "--test_episodes", 2),
    ),
    "ppo": (
        *("--num_envs", 4, "--rollout_steps", 8, "--epochs", 1, "--minibatches", 2, "--val_episodes", 2),
        *("--test_episodes", 2, "--anneal_lr", "false", "--anneal_clip", "false", "--normalise_observations", "true"),
    ),
    "recurrent_ppo": (
        *("--num_envs", 4, "--rollout_steps", 8, "--epochs", 1, "--minibatches", 2, "--val_episodes", 2),
        *("--test_episodes", 2, "--anneal_lr", "false", "--cell", "lstm"),
    ),
    "reinforce": ("--env", "FrozenLake-v1", "--episodes", 2, "--val_episodes", 2, "--test_episodes", 2),
    "multitask": (
        *("--width", 2, "--batch_size", 8, "--method", "gradvac", "--schedule", "constant"),
        *("--baselines", "{left: 0.9, right: 0.9}"),
    ),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
MOST_SAVES = 8


def progress(run_dir):
    """The newest checkpoint's step, and whether another is being written."""
    names = [path.name for path in (run_dir / "checkpoints").glob("*")]
    steps = [int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit()]
    return max(steps, default=0), any(name.startswith(".tmp-step-") for name in names)


def wait_until(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.process.is_alive(), f"the run ended before it was killed: {process.text()}"
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.0005)


def wait_for_moment(process, run_dir, draw, aim):
    """Wait for the moment to kill: while the run restores, while it trains, or inside a save."""
    if aim == "restore":
        lock = run_dir / ".lock"
        wait_until(process, lambda: lock.exists() and lock.read_text().endswith(f" {process.pid}\n"))
        time.sleep(draw.uniform(0, 0.1))
        return
    begin, saves = progress(run_dir)[0], draw.randint(1, MOST_SAVES)
    wait_until(process, lambda: progress(run_dir)[0] >= begin + 6 * saves)
    if aim == "save":
        wait_until(process, lambda: progress(run_dir)[1])
        time.sleep(draw.choice([0, 0, 0.002, 0.005]))
    else:
        time.sleep(draw.uniform(0, 0.05))


def kill_repeatedly(recipe, run_dir, flags, aims):
    """Start, kill the whole process group at each aim's moment, start again; how many kills hit a save."""
    draw, inside_save = random.Random(0), 0
    for aim in aims:
        with fork(recipe, *flags, "--run_dir", run_dir, log=run_dir.with_suffix(".log")) as process:
            wait_for_moment(process, run_dir, draw, aim)
            os.killpg(process.pid, signal.SIGKILL)
            assert process.status() == -signal.SIGKILL
        inside_save += progress(run_dir)[1]
    return inside_save


def complete(recipe, run_dir, flags):
    with fork(recipe, *flags, "--run_dir", run_dir, log=run_dir.with_suffix(".log")) as process:
        assert process.status(240) == 0, process.text()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "complete"


def assert_same_run(straight, killed, steps):
    assert saved_steps(straight / "checkpoints") == saved_steps(killed / "checkpoints")
    folders = [step_folder(run_dir / "checkpoints", steps) for run_dir in (straight, killed)]
    for path in folders[0].glob("*.pt"):
        contents = [torch.load(folder / path.name, weights_only=True) for folder in folders]
        assert first_difference(*contents) is None
    assert_rows_equal(straight, killed)
    assert curves(straight) == curves(killed)
    assert not list(killed.rglob(".tmp-*"))
    assert not list(killed.rglob("*.bad*"))


def curves(run_dir):
    """Every curve that TensorBoard shows, its doubled points included."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/") and tag != "charts/SPS"]
    assert len(tags) > 3
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@every_recipe
def test_a_run_killed_again_and_again_equals_one_that_was_not(recipe, tmp_path):
    # 24 kills of one recipe, 8 of the others, which share its checkpoints.
    rounds, steps = (6, 1600) if recipe == "gan" else (2, 600)
    flags, aims = (*COMMON, *RECIPES[recipe], "--steps", steps), ["save", "training", "save", "restore"] * rounds
    assert kill_repeatedly(recipe, tmp_path / "killed", flags, aims) >= rounds
    for name in ("killed", "straight"):
        complete(recipe, tmp_path / name, flags)
    assert_same_run(tmp_path / "straight", tmp_path / "killed", steps)


# One for each way of holding state: batches, a meta-batch, environments, files beside the checkpoints.
@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["gan", "maml", "ppo", "dqn"])
def test_two_processes_killed_together_go_on_as_if_they_were_not(recipe, tmp_path):
    flags = (*COMMON, *RECIPES[recipe], "--steps", 300, "--devices", 2)
    assert kill_repeatedly(recipe, tmp_path / "killed", flags, ["save", "training", "restore", "save"]) >= 1
    for name in ("killed", "straight"):
        complete(recipe, tmp_path / name, flags)
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 300)
