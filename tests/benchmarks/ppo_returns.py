"""Returns of recipes.ppo and of stable-baselines3's PPO while they train, with the settings of a preset.

    python -m tests.benchmarks.ppo_returns halfcheetah --env_steps 200704 --seeds 0 --out curves.jsonl
    python -m tests.benchmarks.ppo_returns speed --env_steps 100352 --seeds 0 1 2 --out curves.jsonl

Both are scored on the same episodes after the same environment steps, by the most probable actions and with frozen
statistics. ``speed`` is not a preset, but the settings of :mod:`tests.benchmarks.ppo_speed` with 4 environments. One
line a run is added to the file, which ``docs/figures/ppo_curves.py`` draws.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_custom.environments.evaluation import episodic_returns, mean_and_interval
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.launch import launch
from lightning_custom.metrics import read_rows
from lightning_custom.testing import single_process
from recipes import ppo
from tests.benchmarks import ppo_speed

SPEED = "speed"
Curve = dict[str, list[float]]


def config(preset: str, env_steps: int, seed: int, scores: int, episodes: int) -> ppo.PPOConfig:
    """The preset's settings, for so many environment steps, and about so many scores in equal distances."""
    settings = ppo_speed.config(4, 1) if preset == SPEED else ppo.PPOConfig(**ppo.PRESETS[preset])
    steps = env_steps // (settings.num_envs * settings.rollout_steps)
    return replace(
        settings, steps=steps, seed=seed, validate_every=max(steps // scores, 1), val_episodes=episodes,
        checkpoint_every=0, accelerator="cpu",
    )  # fmt: skip


def ours(settings: ppo.PPOConfig) -> Curve:
    """The curve of this package's loop."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        state = ppo.train(
            launch(settings),
            replace(settings, run_dir=folder),
            make_env=MakeEnvironment(settings.env),
            val_env=MakeEnvironment(settings.env, evaluation=True),
        )
        rows = [row for row in read_rows(folder) if "val/episodic_return" in row]
    if state.step < settings.steps:
        raise SystemExit(f"stopped by a signal after {state.step} of {settings.steps} steps")
    return {
        "env_steps": [row["step"] * settings.rollout_steps * settings.num_envs for row in rows],
        "returns": [row["val/episodic_return"] for row in rows],
        "intervals": [row["val/episodic_return_interval"] for row in rows],
    }


def with_stable_baselines3(settings: ppo.PPOConfig) -> Curve:
    """The same by stable-baselines3."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    def falling(value: float, anneals: bool) -> float | Callable[[float], float]:
        return (lambda left: value * left) if anneals else value

    envs: Any = make_vec_env(settings.env, settings.num_envs, seed=settings.seed)
    normalises = settings.normalise_observations or settings.normalise_rewards
    if normalises:
        envs = VecNormalize(
            envs,
            norm_obs=settings.normalise_observations,
            norm_reward=settings.normalise_rewards,
            gamma=settings.discount,
        )
    clip = falling(settings.clip, settings.anneal_clip)
    model = PPO(
        "MlpPolicy", envs, n_steps=settings.rollout_steps,
        batch_size=settings.rollout_steps * settings.num_envs // settings.minibatches, n_epochs=settings.epochs,
        learning_rate=falling(settings.lr, settings.anneal_lr), gamma=settings.discount, gae_lambda=settings.gae_decay,
        clip_range=clip, clip_range_vf=clip if settings.clip_value else None, ent_coef=settings.entropy_coefficient,
        vf_coef=settings.value_coefficient, max_grad_norm=settings.max_grad_norm, seed=settings.seed, device="cpu",
        policy_kwargs={"net_arch": [settings.width] * 2, "log_std_init": settings.log_std},
    )  # fmt: skip
    found: Curve = {"env_steps": [], "returns": [], "intervals": []}

    def act(observations: Any) -> Any:
        seen = envs.normalize_obs(observations) if normalises else observations
        return model.predict(seen, deterministic=True)[0]

    def score() -> None:
        make_env = MakeEnvironment(settings.env, evaluation=True)
        returns = episodic_returns(single_process(), make_env, act, settings.val_episodes, seed=settings.seed)
        mean, interval = mean_and_interval(returns)
        found["env_steps"].append(model.num_timesteps)
        found["returns"].append(mean)
        found["intervals"].append(interval)

    class Scores(BaseCallback):
        """Scores before the rollout that follows the updates."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            done = self.num_timesteps // (settings.rollout_steps * settings.num_envs)
            if done and done % settings.validate_every == 0:
                score()

    model.learn(settings.steps * settings.rollout_steps * settings.num_envs, callback=Scores())
    score()
    return found


CONTENDERS: dict[str, Callable[[ppo.PPOConfig], Curve]] = {
    "recipes.ppo": ours,
    "stable-baselines3": with_stable_baselines3,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=[*ppo.PRESETS, SPEED])
    parser.add_argument("--env_steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scores", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--only", choices=CONTENDERS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        settings = config(arguments.preset, arguments.env_steps, seed, arguments.scores, arguments.episodes)
        for name in CONTENDERS if arguments.only is None else [arguments.only]:
            started = time.perf_counter()
            line = {"who": name, "preset": arguments.preset, "seed": seed, **CONTENDERS[name](settings)}
            line["seconds"] = round(time.perf_counter() - started, 1)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(name, arguments.preset, seed, [round(value, 1) for value in line["returns"]], line["seconds"])
