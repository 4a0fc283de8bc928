"""What policy updates are made of: advantages, returns, and how well a value function explains them.

Shapes: T steps of a rollout, N environments. Arrays are NumPy's, since rewards come from there and a loop over T is
faster than on a device.
"""

import numpy as np

from lightning_custom.environments.arrays import Array


def generalised_advantages(
    rewards: Array,
    values: Array,
    next_values: Array,
    terminated: Array,
    ended: Array,
    *,
    discount: float,
    decay: float,
) -> Array:
    """Generalised advantage estimates ``[T, N]`` (Schulman et al. 2016, eq. 16); ``decay`` is the paper's lambda.

    ``next_values[t]`` is the value of the observation that follows step t: where an episode ended, of its last. An
    episode that was terminated is worth nothing afterwards; one that was truncated by a time limit is, so there
    ``next_values`` counts. ``ended`` is terminated or truncated: past it nothing is summed.

    >>> one, no = np.ones((2, 1)), np.zeros((2, 1), bool)
    >>> generalised_advantages(one, 0 * one, 0 * one, no, no, discount=0.5, decay=1.0).ravel().tolist()
    [1.5, 1.0]
    """
    deltas = rewards + discount * np.where(terminated, 0.0, next_values) - values
    factors = discount * decay * ~ended
    advantages = np.empty(deltas.shape, deltas.dtype)
    running = np.zeros(deltas.shape[1:], deltas.dtype)
    for t in range(len(deltas) - 1, -1, -1):
        running = deltas[t] + factors[t] * running
        advantages[t] = running
    return advantages


def following_values(values: Array, last: Array, ended: Array, final: Array) -> Array:
    """The value ``[T, N]`` of what follows each step, out of those of the observations that were acted on.

    ``values`` is ``[T, N]``, ``last`` is ``[N]``, of the observations after the rollout. ``final`` are the values of
    the last observations of the episodes that ended, in the order of ``ended``'s true entries.
    """
    following = np.concatenate([values[1:], last[None]])
    following[ended] = final
    return following


def discounted_returns(rewards: Array, *, discount: float, last: float = 0.0) -> Array:
    """The sum of the discounted rewards from each step of one episode on, ``[T]``; ``last`` is worth what follows it.

    >>> discounted_returns(np.array([1.0, 2.0, 4.0]), discount=0.5).tolist()
    [3.0, 4.0, 4.0]
    """
    returns = np.empty(len(rewards))
    for t in range(len(rewards) - 1, -1, -1):
        last = returns[t] = rewards[t] + discount * last
    return returns


def explained_variance(values: Array, returns: Array) -> float:
    """The share of the returns' variance that ``values`` explain: 1 is all, 0 no more than a constant would.

    Of returns that do not vary, 1 where the errors do not either and 0 elsewhere.

    >>> explained_variance(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    1.0
    """
    variance, left = float(np.var(returns)), float(np.var(returns - values))
    return 1 - left / variance if variance else float(not left)
