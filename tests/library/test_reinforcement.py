"""Advantages and returns against sums written out, and against the identities that the theory has for them."""

import numpy as np
import pytest
from sklearn.metrics import explained_variance_score

from lightning_custom.reinforcement import (
    discounted_returns,
    explained_variance,
    following_values,
    generalised_advantages,
)

T, N = 12, 5


@pytest.fixture
def rollout():
    draw = np.random.default_rng(0)
    terminated = draw.random((T, N)) < 0.15
    truncated = ~terminated & (draw.random((T, N)) < 0.15)
    ended = terminated | truncated
    values, last, final = draw.normal(size=(T, N)), draw.normal(size=N), draw.normal(size=ended.sum())
    return draw.normal(size=(T, N)), values, following_values(values, last, ended, final), terminated, ended


def written_out(rewards, values, following, terminated, ended, discount, decay):
    """Equation 16: the sum over the rest of the episode of what each step brought more than was expected."""
    advantages = np.zeros((T, N))
    for n in range(N):
        for start in range(T):
            weight = 1.0
            for t in range(start, T):
                worth = 0.0 if terminated[t, n] else following[t, n]
                advantages[start, n] += weight * (rewards[t, n] + discount * worth - values[t, n])
                weight *= discount * decay
                if ended[t, n]:
                    break
    return advantages


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_advantages_are_the_sum_of_equation_16(rollout, decay):
    found = generalised_advantages(*rollout, discount=0.9, decay=decay)
    np.testing.assert_allclose(found, written_out(*rollout, 0.9, decay), rtol=1e-12, atol=1e-12)


def test_without_decay_an_advantage_is_the_return_less_the_value(rollout):
    rewards, values, _, _, _ = rollout
    no, last = np.zeros((T, N), bool), np.full(N, 2.0)
    following = following_values(values, last, no, np.zeros(0))
    found = generalised_advantages(rewards, values, following, no, no, discount=0.9, decay=1.0)
    for n in range(N):
        returns = discounted_returns(rewards[:, n], discount=0.9, last=2.0)
        np.testing.assert_allclose(found[:, n] + values[:, n], returns, rtol=1e-12)


def test_what_follows_an_end_is_the_value_of_its_last_observation():
    values = np.arange(6.0).reshape(3, 2)
    ended = np.array([[False, True], [False, False], [True, True]])
    found = following_values(values, np.array([10.0, 11.0]), ended, np.array([-1.0, -2.0, -3.0]))
    assert found.tolist() == [[2.0, -1.0], [4.0, 5.0], [-2.0, -3.0]]
    assert values[1, 1] == 3.0  # the given values are not written to


def test_a_truncated_episode_is_worth_what_follows_and_a_terminated_one_is_not():
    one, ended = np.ones((1, 1)), np.array([[True]])
    settings = {"discount": 0.5, "decay": 0.9}
    assert generalised_advantages(one, 0 * one, 8 * one, ended, ended, **settings).item() == 1.0
    assert generalised_advantages(one, 0 * one, 8 * one, ~ended, ended, **settings).item() == 5.0


def test_explained_variance_is_that_of_scikit_learn():
    draw = np.random.default_rng(1)
    returns = draw.normal(size=100)
    values = 0.6 * returns + draw.normal(size=100)
    assert explained_variance(values, returns) == pytest.approx(explained_variance_score(returns, values), rel=1e-12)
    for given in (values, np.full(100, 3.0)):
        assert explained_variance(given, np.ones(100)) == explained_variance_score(np.ones(100), given)
