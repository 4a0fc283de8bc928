import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces, wrappers
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.loop import hash_seed
from lightning_custom.state import ItemState
from lightning_custom.testing import first_difference
from tests.library.tiny_environments import Countdown, Drift, Mixed, play, process, random_actions, stored


def countdown(index):
    """Environment 0 terminates after 2 steps, 1 is truncated after 3, 2 is both after 4."""
    return Countdown(index, 2 + index, ("terminated", "truncated", "both")[index])


def cartpole(index):
    return gym.make("CartPole-v1", max_episode_steps=25)


def vector(maker, num_envs, rank=0, processes=1, seed=0):
    return EnvironmentVector(process(rank, processes), maker, num_envs, seed=seed)


def test_the_bookkeeping_of_ends_is_that_written_down_by_hand():
    envs = vector(countdown, 3)
    assert envs.observations.tolist() == [[0, 1, 0], [1, 1, 0], [2, 1, 0]]
    assert envs.starts.all()
    rows = []
    for step in range(4):
        envs.step(np.array([0, 1, 3]))
        ended = envs.terminated | envs.truncated
        rows.append(
            (
                envs.observations.tolist(),
                envs.rewards.tolist(),
                envs.terminated.tolist(),
                envs.truncated.tolist(),
                envs.final_observations[ended].tolist(),
                [tuple(episode) for episode in envs.episodes],
            )
        )
        assert envs.starts.tolist() == ended.tolist(), step
    no, last = [False] * 3, {"last": True}
    assert rows == [
        ([[0, 1, 1], [1, 1, 1], [2, 1, 1]], [10, 11, 13], no, no, [], []),
        ([[0, 2, 0], [1, 1, 2], [2, 1, 2]], [20, 21, 23], [True, False, False], no, [[0, 1, 2]], [(0, 30.0, 2, last)]),
        ([[0, 2, 1], [1, 2, 0], [2, 1, 3]], [10, 31, 33], no, [False, True, False], [[1, 1, 3]], [(1, 63.0, 3, last)]),
        (
            [[0, 3, 0], [1, 2, 1], [2, 2, 0]], [20, 11, 43], [True, False, True], [False, False, True],
            [[0, 2, 2], [2, 1, 4]], [(0, 30.0, 2, last), (2, 112.0, 4, last)],
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("end, flags", [("terminated", (True, True)), ("truncated", (False, True))])
def test_a_time_limit_counts_as_gymnasiums_does(end, flags):
    def make(index):
        return wrappers.TimeLimit(Countdown(index, 3, end), 3)

    envs, env = vector(make, 1), make(0)
    env.reset()
    for _ in range(3):
        envs.step(np.array([0]))
        result = env.step(0)
    assert (envs.terminated.item(), envs.truncated.item()) == result[2:4] == flags


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_every_step_is_that_of_gymnasiums_own_vector(name):
    def make(index=0):
        return gym.make(name, max_episode_steps=25)

    envs = vector(make, 3)
    peer = SyncVectorEnv([lambda: wrappers.RecordEpisodeStatistics(make())] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    first, _ = peer.reset(seed=[hash_seed(0, "environment", index) for index in range(3)])
    assert np.array_equal(envs.observations, first)
    ends = 0
    for action in random_actions(envs, 120):
        envs.step(action)
        observations, rewards, terminated, truncated, info = peer.step(action)
        for mine, other in [
            (envs.observations, observations), (envs.rewards, rewards),
            (envs.terminated, terminated), (envs.truncated, truncated),
        ]:  # fmt: skip
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
        for episode in envs.episodes:
            i, ends = episode.environment, ends + 1
            assert np.array_equal(envs.final_observations[i], info["final_obs"][i])
            statistics = info["final_info"]["episode"]
            assert (episode.episodic_return, episode.length) == (statistics["r"][i], statistics["l"][i])
    assert ends >= 12


def global_play(processes, actions, start=None):
    """What several shares show together, an entry a step, and the items of all."""
    parts = [vector(cartpole, 4, rank, processes) for rank in range(processes)]
    if start is not None:
        for part in parts:
            part.load_item_state_dict(copy.deepcopy(start))
    share = 4 // processes
    shown = [play(part, [action[share * r : share * (r + 1)] for action in actions]) for r, part in enumerate(parts)]
    together = [
        {key: concatenate([each[key] for each in step]) for key in step[0]} for step in zip(*shown, strict=True)
    ]
    return together, {name: item for part in parts for name, item in stored(part.item_state_dict()).items()}


def concatenate(parts):
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [entry for part in parts for entry in part]


def test_several_processes_play_the_episodes_of_one_and_divide_its_state():
    actions = np.random.default_rng(0).integers(0, 2, (90, 4))
    one, items = global_play(1, actions[:50])
    assert len({float(value) for value in one[0]["observations"][:, 0]}) == 4, "the seeds are all different"
    assert sum(len(step["episodes"]) for step in one) > 4
    assert {episode[0] for step in one for episode in step["episodes"]} == {0, 1, 2, 3}
    for processes in (2, 4):
        several, their_items = global_play(processes, actions[:50])
        assert first_difference(one, several) is None
        assert first_difference(items, their_items) is None
    straight, _ = global_play(1, actions[50:], start=items)
    for processes in (2, 4):
        assert first_difference(straight, global_play(processes, actions[50:], start=items)[0]) is None
    assert first_difference(straight, global_play(1, actions[50:])[0]) is not None


def test_arrays_are_written_over_and_never_replaced():
    envs = vector(countdown, 3)
    names = ("observations", "final_observations", "rewards", "terminated", "truncated")
    arrays = [getattr(envs, name) for name in names]
    play(envs, random_actions(envs, 5))
    assert all(getattr(envs, name) is array for name, array in zip(names, arrays, strict=True))
    assert isinstance(envs, ItemState)


def test_dict_observations_are_a_dict_of_arrays_and_an_action_is_kept_by_value():
    envs = vector(lambda index: Mixed(), 2)
    assert {key: (part.shape, part.dtype.name) for key, part in envs.observations.items()} == {
        "action": ((2, 2), "int64"), "picture": ((2, 2, 2), "uint8"), "count": ((2,), "int64"),
    }  # fmt: skip
    actions = np.array([[1, 2], [3, 1]])
    envs.step(actions)
    actions[:] = 0
    envs.step(actions)
    assert envs.observations["action"].tolist() == [[1, 2], [3, 1]]
    assert envs.observations["picture"][0].tolist() == [[100, 100], [100, 100]]
    play(envs, [actions, actions])
    assert envs.truncated.all()
    assert envs.final_observations["count"].tolist() == [4, 4]
    assert envs.observations["count"].tolist() == [0, 0]
    resumed = vector(lambda index: Mixed(), 2, seed=5)
    resumed.load_item_state_dict(stored(envs.item_state_dict()))
    future = random_actions(envs, 9)
    assert first_difference(play(envs, future), play(resumed, future)) is None


class Typed(Drift):
    def __init__(self, space):
        super().__init__()
        self.action_space, self.types = space, []

    def step(self, action):
        self.types.append((type(action), getattr(action, "shape", None)))
        return self.place.astype(np.float32), 0.0, False, False, {}


@pytest.mark.parametrize(
    "space, expected",
    [
        (spaces.Discrete(3), (int, None)),
        (spaces.MultiDiscrete([2, 3]), (np.ndarray, (2,))),
        (spaces.MultiBinary(4), (np.ndarray, (4,))),
        (spaces.Box(-1, 1, (2, 2)), (np.ndarray, (2, 2))),
    ],
)
def test_an_action_reaches_the_environment_as_its_space_says(space, expected):
    envs = vector(lambda index: Typed(space), 1)
    envs.step(np.array([space.sample()]))
    assert envs._environments[0].unwrapped.types[-1] == expected


@pytest.mark.parametrize(
    "maker, words",
    [
        (lambda index: gym.make("Blackjack-v1"), "make_env: the observation is in Tuple.*flatten or leave it out"),
        (lambda index: Countdown() if index else Mixed(), "environment 1 has other spaces than environment 0"),
    ],
)
def test_spaces_that_are_not_arrays_or_not_alike_are_refused(maker, words):
    with pytest.raises(ConfigError, match=words):
        vector(maker, 2)


class TextInside(Mixed):
    def __init__(self):
        super().__init__()
        self.observation_space["mission"] = spaces.Text(5)


def test_a_part_of_the_observation_that_is_no_array_is_named():
    with pytest.raises(ConfigError, match="make_env: observation 'mission' is in Text"):
        vector(lambda index: TextInside(), 1)


def test_another_number_of_environments_or_another_way_of_storing_is_refused():
    items = stored(vector(cartpole, 4).item_state_dict())
    with pytest.raises(ConfigError, match="num_envs: 2, but the checkpoint holds 4 environments; use 4"):
        vector(cartpole, 2).load_item_state_dict(items)
    with pytest.raises(CheckpointError, match="environment 0: its state was stored by its fields and is now"):
        vector(lambda index: Drift(), 4).load_item_state_dict(items)
    with pytest.raises(ConfigError, match="num_envs: 3 does not divide among 2 processes; use 2 or 4"):
        vector(cartpole, 3, 0, 2)


class Broken(Drift):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def step(self, action):
        if self.index == 3:
            raise RuntimeError("no power")
        return super().step(action)


def test_too_few_actions_are_refused_before_any_is_taken():
    envs = vector(countdown, 3)
    with pytest.raises(ValueError, match="actions: 2, for 3 environments; give one for each"):
        envs.step(np.zeros(2, dtype=np.int64))
    assert envs.observations[:, 2].tolist() == [0, 0, 0]


def test_an_error_inside_an_environment_says_in_which():
    envs = vector(Broken, 4, 1, 2)
    with pytest.raises(RuntimeError, match="no power") as caught:
        envs.step(np.zeros((2, 2), np.float32))
    assert caught.value.__notes__ == ["in environment 3"]
