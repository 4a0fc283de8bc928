"""envpool's environments, which threads step together, as a vector of gymnasium's."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from gymnasium.vector import VectorEnv

from lightning_custom.errors import ConfigError


@dataclass(frozen=True)
class MakePool:
    """``make_vector`` for an environment of envpool's registry (Weng et al. 2022); it can be sent to other processes.

    envpool shows no state: a resumed run begins new episodes, and says so at its start. ``threads`` step the
    environments; 0: as many as envpool takes.
    """

    env: str
    threads: int = 0

    def __call__(self, num_envs: int) -> "Pool":
        """A vector of ``num_envs``; :class:`ConfigError` where envpool or the environment is not there."""
        if find_spec("envpool") is None:
            raise ConfigError(f"make_vector: {self.env} of envpool needs envpool; pip install envpool")
        known = import_module("envpool").list_all_envs()
        if self.env not in known:
            raise ConfigError(f"make_vector: envpool has no {self.env}; see envpool.list_all_envs()")
        return Pool(self, num_envs)


class Pool(VectorEnv[Any, Any, Any]):
    """A pool that is made anew where a reset gives a seed: envpool takes one only then, and ignores later ones."""

    def __init__(self, maker: MakePool, num_envs: int) -> None:
        self._maker, self.num_envs = maker, num_envs
        self._make(seed=0)
        self.metadata = dict(self._pool.metadata)
        self.single_observation_space, self.observation_space = (
            self._pool.single_observation_space,
            self._pool.observation_space,
        )
        self.single_action_space, self.action_space = self._pool.single_action_space, self._pool.action_space

    def _make(self, seed: int) -> None:
        envpool = import_module("envpool")
        self._pool: Any = envpool.make_gymnasium(
            self._maker.env, num_envs=self.num_envs, num_threads=self._maker.threads, seed=seed
        )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """First observations; with a ``seed``, of a new pool."""
        if seed is not None:
            self._pool.close()
            self._make(int(seed) % 2**31)
        found: tuple[Any, dict[str, Any]] = self._pool.reset(options=options)
        return found

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """A step of every environment; one whose episode ended is reset instead (``AutoresetMode.NEXT_STEP``)."""
        found: tuple[Any, Any, Any, Any, dict[str, Any]] = self._pool.step(actions)
        return found

    def close_extras(self, **kwargs: Any) -> None:
        """Close the pool."""
        self._pool.close()
