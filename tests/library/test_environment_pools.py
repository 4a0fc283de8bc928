from importlib.util import find_spec

import numpy as np
import pytest

from lightning_custom.environments.batched import BatchedEnvironments
from lightning_custom.environments.pools import MakePool
from lightning_custom.errors import ConfigError
from lightning_custom.testing import first_difference
from tests.library.tiny_environments import play, process, random_actions, stored

needs_envpool = pytest.mark.skipif(find_spec("envpool") is None, reason="envpool is not installed")
# gymnasium's, of the spaces that envpool declares.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")


def pool(rank=0, processes=1, seed=0):
    return BatchedEnvironments(process(rank, processes), MakePool("CartPole-v1", threads=1), 4, seed=seed)


@needs_envpool
def test_a_pool_plays_the_episodes_of_its_seed_and_each_process_its_own():
    one, again, other, second = pool(), pool(), pool(seed=1), pool(1, 2)
    actions = random_actions(one, 60)
    shown = play(one, actions)
    assert sum(len(step["episodes"]) for step in shown) > 8
    assert first_difference(shown, play(again, actions)) is None
    for vector in (other, second):
        assert not np.intersect1d(one.observations, vector.observations).size


@needs_envpool
def test_the_step_in_which_a_pool_resets_is_marked_and_the_rewards_are_those_of_the_episode():
    envs = pool()
    ended = np.zeros(4, dtype=bool)
    for step in play(envs, random_actions(envs, 60)):
        assert np.array_equal(step["ignored"], ended)
        assert np.array_equal(step["rewards"], ~ended)  # CartPole pays 1 a step
        for episode in step["episodes"]:
            assert episode[1] == episode[2]
        ended = step["terminated"] | step["truncated"]
    assert ended.shape == (4,)


@needs_envpool
def test_a_pool_shows_no_state_says_so_and_resumes_from_a_reset():
    straight = pool()
    assert straight.inexact == "the state of Pool is not known; train with EnvironmentVector"
    play(straight, random_actions(straight, 30))
    resumed = pool(seed=0)
    first = resumed.observations.copy()
    resumed.load_item_state_dict(stored(straight.item_state_dict()))
    assert resumed.starts.all()
    assert not np.intersect1d(resumed.observations, first).size, "not the episodes of the run's beginning again"


@needs_envpool
def test_a_name_that_envpool_does_not_know_is_one_line():
    with pytest.raises(ConfigError, match=r"make_vector: envpool has no CartPol-v1; see envpool\.list_all_envs"):
        MakePool("CartPol-v1")(2)


def test_without_envpool_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("lightning_custom.environments.pools.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="CartPole-v1 of envpool needs envpool; pip install envpool"):
        MakePool("CartPole-v1")(2)
