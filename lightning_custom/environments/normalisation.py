"""Running statistics of observations and returns, over all environments of all processes.

As in gymnasium's ``NormalizeObservation`` and ``NormalizeReward`` and stable-baselines3's ``VecNormalize``: the
statistics are those of everything seen, with a first count of 1e-4 of mean 0 and variance 1. Updates are in float64,
explicit, and take whole rollouts: what acts and what learns then see the same normalisation, evaluation changes
nothing, and several processes reduce once a rollout.
"""

from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from lightning_custom.distributed import share, sum_over_processes
from lightning_custom.environments.arrays import Array
from lightning_custom.environments.vector import check_number, environment_item
from lightning_custom.errors import ConfigError


class RunningMoments:
    """Mean and variance ``[...]`` of all samples so far, float64."""

    def __init__(self, fabric: Fabric, shape: tuple[int, ...] = ()) -> None:
        self._fabric = fabric
        self.mean, self.variance, self.count = np.zeros(shape), np.ones(shape), 1e-4

    def update_(self, samples: Array) -> None:
        """Take in the ``samples`` ``[..., *shape]`` of every process, which all call this together.

        Chan et al. 1979, eq. 2.1; the batch's own moments in two passes, for which two reductions are needed.
        """
        samples = samples.reshape(-1, *self.mean.shape).astype(np.float64)
        total, count = self._sum(samples.sum(axis=0), len(samples))
        mean = total / count
        squares, _ = self._sum(np.square(samples - mean).sum(axis=0), 0)
        delta, before, self.count = mean - self.mean, self.count, self.count + count
        self.mean = np.asarray(self.mean + delta * count / self.count)
        squares = self.variance * before + squares + np.square(delta) * before * count / self.count
        self.variance = np.asarray(squares / self.count)

    def _sum(self, part: Array, count: int) -> tuple[Array, int]:
        if self._fabric.world_size == 1:
            return part, count
        packed = torch.from_numpy(np.append(part.ravel(), count)).to(self._fabric.device)
        *numbers, everywhere = sum_over_processes(self._fabric, packed).tolist()
        return np.array(numbers).reshape(part.shape), int(everywhere)

    def state_dict(self) -> dict[str, Any]:
        """The moments and the count."""
        return {"mean": self.mean, "variance": self.variance, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments."""
        self.mean, self.variance = (torch.as_tensor(state_dict[key]).numpy().copy() for key in ("mean", "variance"))
        self.count = float(state_dict["count"])


class ObservationNormaliser(RunningMoments):
    """Observations less their mean, over their standard deviation, cut to ``[-clip, clip]``.

        normaliser = ObservationNormaliser(fabric, envs.observation_space.shape)      # a field of the state
        ...
        actions = policy(normaliser(envs.observations))
        ...
        normaliser.update_(rollout.raw_observations)                                  # once a rollout

    For dict observations have a dict of these, one for each part that is not a picture.
    """

    def __init__(self, fabric: Fabric, shape: tuple[int, ...], *, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__(fabric, shape)
        if not clip > 0:
            raise ConfigError(f"clip: {clip}; give a number above 0")
        self.clip, self.epsilon = clip, epsilon

    def __call__(self, observations: Array) -> Array:
        """``observations`` ``[..., *shape]`` normalised, float32."""
        scaled = (observations - self.mean) / np.sqrt(self.variance + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)


class RewardScaler:
    """Rewards over the standard deviation of the discounted return, cut to ``[-clip, clip]``; the mean is kept.

    Engstrom et al. 2020, section 3 (reward scaling). ``num_envs`` is global; each process holds the running returns of
    its contiguous share, which are stored by environment.
    """

    def __init__(
        self, fabric: Fabric, num_envs: int, *, discount: float, clip: float = 10.0, epsilon: float = 1e-8
    ) -> None:
        if not 0 <= discount <= 1:
            raise ConfigError(f"discount: {discount}; give a number from 0 to 1")
        if not clip > 0:
            raise ConfigError(f"clip: {clip}; give a number above 0")
        count = share(num_envs, fabric, "num_envs")
        self.num_envs, self.discount, self.clip, self.epsilon = num_envs, discount, clip, epsilon
        self.indices = range(fabric.global_rank * count, (fabric.global_rank + 1) * count)
        self.moments = RunningMoments(fabric)
        """Of the discounted return of every environment after every step."""
        self.returns = np.zeros(count)

    def update_(self, rewards: Array, ended: Array) -> None:
        """Take in the ``rewards`` ``[T, E]`` of a rollout; ``ended`` is bool ``[T, E]``, all processes together."""
        seen = np.empty(rewards.shape)
        for t, reward in enumerate(rewards):
            self.returns = self.returns * self.discount + reward
            seen[t] = self.returns
            self.returns = np.where(ended[t], 0.0, self.returns)
        self.moments.update_(seen)

    def __call__(self, rewards: Array) -> Array:
        """``rewards`` scaled, float32."""
        scaled = rewards / np.sqrt(self.moments.variance + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The moments of the returns."""
        return self.moments.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments."""
        self.moments.load_state_dict(state_dict)

    def item_state_dict(self) -> dict[str, Any]:
        """The running return of each environment of this process."""
        return {environment_item(index): float(value) for index, value in zip(self.indices, self.returns, strict=True)}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over those of this process's environments."""
        check_number(items, self.num_envs)
        self.returns = np.array([items[environment_item(index)] for index in self.indices])
