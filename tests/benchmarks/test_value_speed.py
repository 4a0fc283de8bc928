"""The contenders do the same work: otherwise their times say nothing."""

from dataclasses import replace
from unittest.mock import patch

import pytest

from lightning_custom.replay_buffer import ReplayBuffer
from recipes import dqn, sac
from tests.benchmarks.value_speed import DQN, SAC, recipe, stable_baselines3

CASES = {
    "DQN": (dqn.train, replace(DQN, steps=8, log_every=2, train_every=16, updates=4, learning_starts=40), 6 * 4),
    "SAC": (sac.train, replace(SAC, steps=60, log_every=20, learning_starts=50, batch_size=8), 10),
}


def counted(owner, run):
    """How often ``owner.sample`` was called, an update each."""
    calls, sample = [], owner.sample

    def counting(*args, **kwargs):
        calls.append(1)
        return sample(*args, **kwargs)

    with patch.object(owner, "sample", counting):
        assert run() > 0
    return len(calls)


@pytest.mark.parametrize("name", CASES)
def test_the_recipe_makes_the_updates_of_its_config(name):
    train, config, updates = CASES[name]
    assert counted(ReplayBuffer, recipe(train, config)) == updates


@pytest.mark.parametrize("name", CASES)
def test_stable_baselines3_makes_as_many(name):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    _, config, updates = CASES[name]
    assert counted(buffers.ReplayBuffer, stable_baselines3(config, name)) == updates
