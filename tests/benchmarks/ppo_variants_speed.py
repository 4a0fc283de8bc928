"""Environment steps a second of recipes.ppo on Atari's pictures and of recipes.recurrent_ppo, beside their peers.

    python -m tests.benchmarks.ppo_variants_speed

Pong with the preset's settings, against stable-baselines3's PPO with its own Atari wrappers. CartPole without its
velocities with the default's settings and an LSTM that policy and value share, against sb3-contrib's RecurrentPPO.
Each contender trains from nothing and is timed after its first rollouts, evaluation left out.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import torch

from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.launch import launch
from lightning_custom.policies import PictureTrunk
from recipes import ppo, recurrent_ppo
from tests.benchmarks.interleave import interleave, machine, stopwatch, table
from tests.benchmarks.ppo_speed import rate_in, rate_of
from tests.benchmarks.ppo_speed import report as compared

ROUNDS = 5
SHELL: dict[str, Any] = {
    "validate_every": 0, "checkpoint_every": 0, "val_episodes": 2, "accelerator": "cpu", "threads": 1,
}  # fmt: skip
PONG = ppo.PPOConfig(**(ppo.PRESETS["pong"] | SHELL | {"steps": 4, "log_every": 1}))
RECURRENT = recurrent_ppo.RecurrentPPOConfig(**SHELL, cell="lstm", steps=30, log_every=5)


def recipe(train: Callable[..., Any], config: Any, make_env: MakeEnvironment) -> float:
    """A run of a recipe, whose score at the end is of ten steps."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = replace(config, run_dir=folder)
        ends_soon = lambda index: gym.wrappers.TimeLimit(make_env(index), 10)  # noqa: E731
        train(launch(settings), settings, make_env=make_env, val_env=ends_soon)
        return rate_in(folder)


def pong_by_stable_baselines3(config: ppo.PPOConfig) -> float:
    """The same wrappers, network and number of updates."""
    import ale_py
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gym.register_envs(ale_py)
    torch.set_num_threads(1)
    plain = {"frameskip": 1, "repeat_action_probability": 0.0}
    model = PPO(
        "CnnPolicy", VecFrameStack(make_atari_env(config.env, config.num_envs, env_kwargs=plain), 4),
        n_steps=config.rollout_steps, batch_size=config.num_envs * config.rollout_steps // config.minibatches,
        n_epochs=config.epochs, learning_rate=config.lr, gamma=config.discount, gae_lambda=config.gae_decay,
        clip_range=config.clip, clip_range_vf=config.clip, ent_coef=config.entropy_coefficient, device="cpu",
    )  # fmt: skip
    return rate_of(model, config.steps, warm=config.log_every)


def memory_by_sb3_contrib(config: recurrent_ppo.RecurrentPPOConfig) -> float:
    """One LSTM and a layer for each of policy and value, and the same number of updates."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    hidden = MakeEnvironment(config.env, hide=config.hide)
    model = RecurrentPPO(
        "MlpLstmPolicy", make_vec_env(hidden, config.num_envs),
        n_steps=config.rollout_steps, batch_size=config.num_envs * config.rollout_steps // config.minibatches,
        n_epochs=config.epochs, learning_rate=config.lr, gamma=config.discount, gae_lambda=config.gae_decay,
        clip_range=config.clip, ent_coef=config.entropy_coefficient, device="cpu",
        policy_kwargs={
            "net_arch": [config.width], "lstm_hidden_size": config.width, "shared_lstm": True,
            "enable_critic_lstm": False,
        },
    )  # fmt: skip
    return rate_of(model, config.steps, warm=config.log_every)


def trunk_passes() -> dict[str, Callable[[], float]]:
    """Seconds of a forward and a backward pass of 256 frames through the trunk, and through its layers as they come."""
    trunk = PictureTrunk()
    frames = torch.randint(0, 256, (256, 4, 84, 84), dtype=torch.uint8)
    passes = {
        "its layers, frames as they come": lambda: torch.nn.Sequential.forward(trunk, frames / 255),
        "PictureTrunk, channels last": lambda: trunk(frames),
    }
    return {
        name: stopwatch(lambda one=one: one().sum().backward(), 1, time.perf_counter) for name, one in passes.items()
    }


def report(rounds: int = ROUNDS) -> Iterator[str]:
    """A table for each kind, and one for the layout of pictures."""
    yield compared(
        "Pong, 8 x 128, 1 thread",
        rounds,
        {
            "recipes.ppo": partial(recipe, ppo.train, PONG, MakeEnvironment(PONG.env)),
            "stable-baselines3": partial(pong_by_stable_baselines3, PONG),
        },
    )
    yield compared(
        "CartPole without velocities, 16 x 32",
        rounds,
        {
            "recipes.recurrent_ppo": partial(
                recipe, recurrent_ppo.train, RECURRENT, MakeEnvironment(RECURRENT.env, hide=RECURRENT.hide)
            ),
            "sb3-contrib": partial(memory_by_sb3_contrib, RECURRENT),
        },
        over="sb3-contrib",
    )
    yield table("trunk for pictures, 256 frames", interleave(trunk_passes(), 4 * rounds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in report():
        print(part, flush=True)
    print(machine())
