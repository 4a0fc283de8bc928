"""Episodes as an animated picture: what ``enjoy`` writes."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gymnasium import error

from lightning_custom.environments.arrays import Array, each_action
from lightning_custom.environments.evaluation import LONGEST, Actor, as_act
from lightning_custom.environments.layers import Environment
from lightning_custom.errors import ConfigError
from lightning_custom.output_file import require_ending, write_file

ONE_PROCESS: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
"""Settings of a run that ``enjoy`` replaces, however it was trained."""


@dataclass(frozen=True, kw_only=True)
class EnjoyConfig:
    """Play episodes with a run's best or last checkpoint, and write them as an animated picture."""

    run_dir: str
    """Directory of the run."""
    episodes: int = 1
    """Number of episodes."""
    out: str = "agent.gif"
    """GIF file to write."""
    which: Literal["best", "last"] = "best"
    """Checkpoint to take."""
    seed: int = 0
    """Seed of the episodes."""
    max_frames: int = 500
    """Frames after which the picture ends."""

    def __post_init__(self) -> None:
        for name in ("episodes", "max_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; it must be at least 1")
        require_ending(Path(self.out), (".gif",))


def show_episodes(request: EnjoyConfig, env: Environment, act: Actor) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):  # no window: without one SDL prints an error of its own
        os.environ.setdefault(name, "dummy")
    returns = write_animation(env, act, request.out, request.episodes, seed=request.seed, most=request.max_frames)
    print(f"returns {', '.join(f'{value:.1f}' for value in returns)}: {request.out}")


def write_animation(env: Environment, act: Actor, path: str, episodes: int, *, seed: int, most: int) -> list[float]:
    """Play ``episodes`` in ``env``, which renders to arrays, and write at most ``most`` frames to the GIF ``path``.

    Returns the return of each episode. :class:`ConfigError` where nothing can be rendered or written.
    """
    from PIL import Image

    frames: list[Any] = []
    act_on, returns = as_act(act), []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, steps, ended = 0.0, 0, False
        while not ended and steps < LONGEST:
            if len(frames) < most:
                frames.append(Image.fromarray(_frame(env)))
            batch = (
                {key: np.asarray(part)[None] for key, part in observation.items()}
                if isinstance(observation, dict)
                else None
            )
            actions = act_on(batch if batch is not None else np.asarray(observation)[None], [0], steps)
            observation, reward, terminated, truncated, _ = env.step(each_action(actions)[0])
            total, steps, ended = total + float(reward), steps + 1, terminated or truncated
        returns.append(total)
    rate = env.metadata.get("render_fps") or 30
    buffer = io.BytesIO()
    # 20 ms is the shortest that viewers show.
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=frames[1:], duration=max(1000 // rate, 20), loop=0
    )
    write_file(Path(path), buffer.getvalue())
    return returns


def _frame(env: Environment) -> Array:
    if env.render_mode != "rgb_array":
        raise ConfigError(f"env: its render mode is {env.render_mode}; make it with render_mode='rgb_array'")
    try:
        frame: Any = env.render()
    except error.DependencyNotInstalled as problem:
        raise ConfigError(f"env: it cannot be rendered ({problem})") from problem
    return np.asarray(frame)
