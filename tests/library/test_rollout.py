"""A rollout is what happened, step by step, and stays so when the environments go on."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

from lightning_custom.environments.batched import BatchedEnvironments
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.rollout import Rollout, flatten_steps, gather_environments, take_environments, take_rows
from lightning_custom.testing import single_process
from tests.library.tiny_environments import Countdown, process


def played(steps, normalise=None, end="truncated"):
    envs = EnvironmentVector(process(), lambda index: Countdown(index, 2 + index, end), 2, seed=0)
    rollout = Rollout(steps, normalise)
    rollout.begin()
    for t in range(steps):
        rollout.observe(envs)
        actions = np.array([t % 4, (t + 1) % 4])
        envs.step(actions)
        rollout.record(actions, envs)
    return rollout, envs


def test_a_rollout_is_what_happened():
    rollout, _ = played(4)
    # Countdown shows [environment, episode, step]; its reward is 10 times the step, and the action.
    assert rollout.observations[:, 0].tolist() == [[0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1]]
    assert rollout.observations[:, 1].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 2], [1, 2, 0]]
    assert rollout.actions.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]
    assert rollout.rewards.tolist() == [[10, 11], [21, 22], [12, 33], [23, 10]]
    assert rollout.truncated.tolist() == [[False, False], [True, False], [False, True], [True, False]]
    assert not rollout.terminated.any()
    assert rollout.valid.all()
    assert [(episode.environment, episode.length) for episode in rollout.episodes] == [(0, 2), (1, 3), (0, 2)]


def test_all_observations_end_with_the_last_ones_of_the_episodes_in_the_order_of_ended():
    rollout, envs = played(4)
    everything = rollout.all_observations(envs.observations)
    assert everything[:8].tolist() == rollout.observations.reshape(8, 3).tolist()
    assert everything[8:10].tolist() == [[0, 3, 0], [1, 2, 1]]
    assert everything[10:].tolist() == [[0, 1, 2], [1, 1, 3], [0, 2, 2]]
    assert len(everything) - 10 == rollout.ended.sum()


def test_sequences_go_on_to_the_observations_after_the_rollout_and_the_last_ones_are_beside_them():
    rollout, envs = played(4)
    seen, finals = rollout.sequences(envs.observations)
    assert seen[:4].tolist() == rollout.observations.tolist()
    assert seen[4].tolist() == [[0, 3, 0], [1, 2, 1]]
    assert finals.tolist() == [[[0, 1, 2], [1, 1, 3], [0, 2, 2]]]
    rollout, envs = played(1)
    assert rollout.sequences(envs.observations)[1].shape == (1, 0, 3)
    half, envs = played(4, lambda observations: observations / 2)
    for part, whole in zip(half.sequences(envs.observations), (seen, finals), strict=True):
        assert np.array_equal(2 * part, whole)


def test_everything_is_normalised_but_the_raw_observations():
    rollout, envs = played(4, lambda observations: observations / 2)
    raw, _ = played(4)
    assert np.array_equal(2 * rollout.observations, raw.observations)
    assert np.array_equal(rollout.raw_observations, raw.observations)
    everything = raw.all_observations(envs.observations)
    assert np.array_equal(2 * rollout.all_observations(envs.observations), everything)


def test_an_action_that_was_ignored_is_not_valid():
    def make_vector(number):
        return gym.make_vec("CartPole-v1", number, vectorization_mode="vector_entry_point")

    envs, rollout = BatchedEnvironments(process(), make_vector, 3, seed=0), Rollout(60)
    for _ in range(60):
        rollout.observe(envs)
        actions = np.ones(3, dtype=np.int64)
        envs.step(actions)
        rollout.record(actions, envs)
    ended_before = np.concatenate([np.zeros((1, 3), bool), rollout.ended[:-1]])
    assert rollout.ended.sum() > 3
    assert np.array_equal(~rollout.valid, ended_before)


def test_rows_and_steps_of_dicts_are_those_of_their_parts():
    values = {"a": torch.arange(6).view(3, 2), "b": {"c": torch.arange(6.0).view(3, 2)}}
    flat = flatten_steps(values)
    assert flat["b"]["c"].tolist() == [0, 1, 2, 3, 4, 5]
    assert take_rows(flat, torch.tensor([4, 0]))["a"].tolist() == [4, 0]
    assert take_environments(values, torch.tensor([1]))["b"]["c"].tolist() == [[1], [3], [5]]
    assert gather_environments(single_process(), values)["a"] is values["a"]


def test_real_numbers_are_kept_in_single_precision_and_anything_else_as_it_is():
    kept = {}
    for dtype in (np.float64, np.uint8, np.int64):
        envs = SimpleNamespace(observations={"part": np.ones((2, 3), dtype)})
        rollout = Rollout(1)
        rollout.observe(envs)
        kept[dtype] = rollout.observations["part"].dtype
    assert kept == {np.float64: np.float32, np.uint8: np.uint8, np.int64: np.int64}
