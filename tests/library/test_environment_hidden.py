"""Components that are not seen: what is left, whose state is still exact, and what cannot be hidden."""

import gymnasium as gym
import numpy as np
import pytest

from lightning_custom.environments.hidden import HiddenComponents
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.environments.verified import find_method
from lightning_custom.errors import ConfigError
from lightning_custom.testing import first_difference
from tests.library.tiny_environments import play, process, random_actions, stored


def test_what_is_left_is_the_rest_of_the_observation_in_its_space():
    whole, hidden = gym.make("CartPole-v1"), MakeEnvironment("CartPole-v1", hide=(1, 3))()
    assert hidden.observation_space.shape == (2,)
    assert hidden.observation_space.high.tolist() == whole.observation_space.high[[0, 2]].tolist()
    expected, (found, _) = whole.reset(seed=3)[0], hidden.reset(seed=3)
    for _ in range(8):
        assert found.tolist() == expected[[0, 2]].tolist()
        assert found in hidden.observation_space
        expected, found = whole.step(1)[0], hidden.step(1)[0]


def test_an_episode_of_hidden_observations_has_its_time_limit_and_ends_as_ever():
    env = MakeEnvironment("Pendulum-v1", hide=(2,))()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[3] for _ in range(200)]
    assert ends == [False] * 199 + [True]


@pytest.mark.parametrize("name, hide", [("CartPole-v1", (1, 3)), ("Pendulum-v1", (2,))])
def test_the_state_is_exact_in_mid_episode(name, hide):
    make_env = MakeEnvironment(name, hide=hide)
    assert find_method(make_env).name == "layers"
    one, other = (EnvironmentVector(process(), make_env, 3, seed=seed) for seed in (0, 1))
    actions = random_actions(one, 60)
    play(one, actions[:30])
    other.load_item_state_dict(stored(one.item_state_dict()))
    expected, found = play(one, actions[30:]), play(other, actions[30:])
    assert first_difference(expected, found) is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MakeEnvironment("CartPole-v1", hide=(1, 4))(), r"hide: \[1, 4\], of components 0 to 3; name some"),
        (lambda: MakeEnvironment("CartPole-v1", hide=(-1,))(), r"hide: \[-1\], of components 0 to 3; name some"),
        (lambda: MakeEnvironment("CartPole-v1", hide=(0, 1, 2, 3))(), "name some of them, not all"),
        (lambda: HiddenComponents(gym.make("FrozenLake-v1"), [0]), r"observations are in Discrete.*only a vector"),
    ],
)
def test_what_cannot_be_hidden_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
