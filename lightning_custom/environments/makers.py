"""Environments by name, made alike in every process, with the wrappers that their field expects."""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from gymnasium import error, wrappers
from lightning.fabric import Fabric

from lightning_custom.environments.hidden import HiddenComponents
from lightning_custom.environments.layers import Environment
from lightning_custom.environments.lives import LifeEpisodes
from lightning_custom.errors import ConfigError


@dataclass(frozen=True)
class MakeEnvironment:
    """``make_env`` for an environment of gymnasium's registry; it can be sent to other processes.

    Atari games (``ALE/...``) get the wrappers of Mnih et al. 2015: up to 30 steps of nothing at the start, 4 frames a
    step, 84x84 in grey, 4 frames stacked; while training, the end of a life ends the episode and rewards are cut to
    their sign.
    """

    env: str
    evaluation: bool = False
    """Without what is for training only."""
    render_mode: str | None = None
    hide: tuple[int, ...] = ()
    """Components of the observation that are left out."""

    def __call__(self, index: int = 0) -> Environment:
        """A new environment; :class:`ConfigError` for a name or a dependency that is not there."""
        env = self._atari() if self.env.startswith("ALE/") else self._made()
        return HiddenComponents(env, self.hide) if self.hide else env

    def _made(self, **arguments: Any) -> Environment:
        try:
            return gym.make(self.env, render_mode=self.render_mode, **arguments)
        except error.DependencyNotInstalled as problem:
            raise ConfigError(f"env: {self.env} needs what is not installed ({problem})") from problem
        except (error.Error, ImportError) as problem:
            # The first line: gymnasium's suggestion of a name. ImportError: of MODULE:NAME, or of a version long gone.
            reason = str(problem).strip().splitlines()[0]
            raise ConfigError(f"env: {self.env} cannot be made ({reason}); see gymnasium.envs.registry") from problem

    def _atari(self) -> Environment:
        if importlib.util.find_spec("ale_py") is None:
            raise ConfigError(f"env: {self.env} needs ale-py; pip install ale-py opencv-python-headless")
        import ale_py

        gym.register_envs(ale_py)
        env: Any = self._made(frameskip=1, repeat_action_probability=0.0)
        env = wrappers.AtariPreprocessing(env)
        if not self.evaluation:
            env = wrappers.ClipReward(LifeEpisodes(env), -1.0, 1.0)
        return wrappers.FrameStackObservation(env, 4)


@dataclass(frozen=True)
class MakeVector:
    """``make_vector`` for an environment that gymnasium steps all at once."""

    env: str

    def __call__(self, num_envs: int) -> Any:
        """A vector of ``num_envs``; :class:`ConfigError` where the environment has none."""
        spec = gym.registry.get(self.env)
        if spec is None or spec.vector_entry_point is None:
            raise ConfigError(f"vectorised: {self.env} has no vector entry point in gymnasium; leave --vectorised out")
        return gym.make_vec(self.env, num_envs, vectorization_mode="vector_entry_point")


def warn_if_inexact(fabric: Fabric, envs: Any) -> None:
    """Say at the start that a resumed run would begin new episodes, and why."""
    if envs.inexact is not None and fabric.global_rank == 0:
        warnings.warn(
            f"the state of this environment cannot be stored ({envs.inexact}): a resumed run begins new episodes",
            stacklevel=3,
        )
