"""What a validation and a test are made of."""

import gymnasium as gym
import numpy as np
import pytest

from lightning_custom.environments.evaluation import episodic_returns
from lightning_custom.environments.scores import return_scores
from lightning_custom.testing import single_process
from tests.library.tiny_environments import Drift


def stay(observations):
    return np.zeros_like(observations)


class Noted(gym.Wrapper):
    """Writes down the seeds of its episodes."""

    def __init__(self, env, seeds):
        super().__init__(env)
        self.seeds = seeds

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)


def test_no_episode_of_the_test_is_one_of_the_validation():
    seeds = {}
    for name in ("val", "again", "test"):
        noted = seeds[name] = []
        return_scores(single_process(), lambda index, noted=noted: Noted(Drift(), noted), stay, 80, seed=3, name=name)
    assert seeds["val"] == seeds["again"]
    assert len(set(seeds["val"]) | set(seeds["test"])) == 160


def test_scores_are_the_mean_of_the_episodes_and_half_its_interval():
    returns = episodic_returns(single_process(), lambda index: Drift(), stay, 9, seed=3).numpy()
    found = return_scores(single_process(), lambda index: Drift(), stay, 9, seed=3, name="val")
    assert found["val/episodic_return"] == pytest.approx(returns.mean())
    assert found["val/episodic_return_interval"] == pytest.approx(1.96 * returns.std(ddof=1) / 3)
