"""The exact state of one environment, layer by layer: its wrappers, and the simulation inside them.

A layer is known by its exact class, for a subclass may hold more than its parent: gymnasium's own wrappers, classic
control, toy text, MuJoCo, Atari, and the vector that steps its environments in turn. A layer with ``get_state() ->
plain containers`` and ``set_state(state)`` of its own speaks for itself. For anything else there is
:mod:`lightning_custom.environments.replay`.
"""

from collections import deque
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import wrappers
from gymnasium.envs import classic_control, toy_text
from gymnasium.envs.classic_control import cartpole
from gymnasium.vector import SyncVectorEnv

from lightning_custom.environments.atari import atari_state, restore_atari_
from lightning_custom.environments.plain import from_stored, to_stored
from lightning_custom.errors import CheckpointError

Environment = gym.Env[Any, Any]

_WRAPPERS: dict[str, tuple[str, ...]] = {
    "AddRenderObservation": (),
    # The last frames are part of the next observation where an episode ends within the skipped ones.
    "AtariPreprocessing": ("obs_buffer", "lives", "game_over"),
    "Autoreset": ("autoreset",),
    "ClipAction": (),
    "ClipReward": (),
    "DelayObservation": ("observation_queue",),
    "DiscretizeAction": (),
    "DiscretizeObservation": (),
    "DtypeObservation": (),
    "FilterObservation": (),
    "FlattenObservation": (),
    "FrameStackObservation": ("obs_queue", "padding_value"),
    "GrayscaleObservation": (),
    "MaxAndSkipObservation": ("_obs_buffer",),
    "NormalizeObservation": ("obs_rms.mean", "obs_rms.var", "obs_rms.count", "_update_running_mean"),
    "NormalizeReward": (
        "return_rms.mean", "return_rms.var", "return_rms.count", "discounted_reward", "_update_running_mean"
    ),
    "OrderEnforcing": ("_has_reset",),
    # It checks the first steps and then lets everything through.
    "PassiveEnvChecker": (),
    # Without the times, which are of the process that measured them.
    "RecordEpisodeStatistics": (
        "episode_count", "episode_returns", "episode_lengths", "return_queue", "length_queue"
    ),
    "RepeatAction": (),
    "RescaleAction": (),
    "RescaleObservation": (),
    "ReshapeObservation": (),
    "ResizeObservation": (),
    "StickyAction": ("last_action", "is_sticky_actions", "num_repeats", "repeats_taken"),
    "TimeAwareObservation": ("timesteps",),
    "TimeLimit": ("_elapsed_steps",),
    "TransformAction": (),
    "TransformObservation": (),
    "TransformReward": (),
}  # fmt: skip

FIELDS: dict[type[Any], tuple[str, ...]] = {
    cartpole.CartPoleVectorEnv: ("state", "steps", "prev_done", "low", "high", "steps_beyond_terminated"),
    classic_control.AcrobotEnv: ("state",),
    classic_control.CartPoleEnv: ("state", "steps_beyond_terminated"),
    classic_control.Continuous_MountainCarEnv: ("state",),
    classic_control.MountainCarEnv: ("state",),
    classic_control.PendulumEnv: ("state", "last_u"),
    toy_text.BlackjackEnv: ("dealer", "player", "dealer_top_card_suit", "dealer_top_card_value_str"),
    toy_text.CliffWalkingEnv: ("s", "lastaction"),
    toy_text.FrozenLakeEnv: ("s", "lastaction"),
    toy_text.TaxiEnv: ("s", "lastaction", "fickle_step", "taxi_orientation"),
    # By name, for some are newer than the oldest gymnasium that serves.
    **{getattr(wrappers, name): fields for name, fields in _WRAPPERS.items() if hasattr(wrappers, name)},
}
"""What changes in each class, by the path of its attribute."""

# Beside its environments. In the mode without resets those that did not end show the observation from here.
_SYNC_VECTOR = ("_env_obs", "_terminations", "_truncations", "_autoreset_envs")

# What mj_step leaves behind is of the substep before the last, and not in MuJoCo's state. Ant and Humanoid read it
# before they step: without it the first reward after a restore is wrong.
_LAGGING = ("xpos", "xipos")


def layers(env: Environment) -> Iterator[Environment]:
    """The layers of ``env`` from the outermost wrapper to the base; one that speaks for all below it is the last."""
    yield env
    while isinstance(env, gym.Wrapper) and not getattr(env, "holds_all_below", False):
        env = env.env
        yield env


def unknown_layer(env: Environment) -> str | None:
    """The class of the first layer whose state cannot be taken by name; None where all can."""
    layer: Any
    for layer in layers(env):
        if _kind(layer) == "unknown":
            return type(layer).__name__
        if _kind(layer) == "vector":
            return next(filter(None, map(unknown_layer, layer.envs)), None)
    return None


def environment_state(env: Environment) -> dict[str, Any]:
    """The state of ``env`` as tensors and plain containers, to the last bit and with its random generator.

    ``TypeError`` where a layer is unknown or holds what is not plain.
    """
    stack = list(layers(env))
    return {
        "layers": [{"class": type(layer).__name__, "state": _layer_state(layer)} for layer in stack],
        "np_random": to_stored(stack[-1].unwrapped._np_random, "np_random"),
        "np_random_seed": stack[-1].unwrapped._np_random_seed,
    }


def restore_environment_(env: Environment, stored: dict[str, Any]) -> None:
    """Give ``env``, made by the same maker and reset at least once, the state of another.

    :class:`CheckpointError` where the two do not have the same layers.
    """
    stack = list(layers(env))
    names, live = [layer["class"] for layer in stored["layers"]], [type(layer).__name__ for layer in stack]
    if names != live:
        raise CheckpointError(
            f"the stored environment has the layers {', '.join(names)}, this one has {', '.join(live)}; make the same"
        )
    for layer, content in zip(stack, stored["layers"], strict=True):
        _restore_layer_(layer, content["state"])
    # After the layers: a replay draws from it.
    _restore_generator_(stack[-1].unwrapped, from_stored(stored["np_random"]))
    stack[-1].unwrapped._np_random_seed = stored["np_random_seed"]


def _restore_generator_(base: Environment, generator: np.random.Generator | None) -> None:
    live = base._np_random
    if live is None or generator is None or type(live.bit_generator) is not type(generator.bit_generator):
        base._np_random = generator
    else:  # in place, for the environment may have handed it on
        live.bit_generator.state = generator.bit_generator.state


def _kind(layer: Any) -> str:
    if type(layer) in FIELDS:
        return "fields"
    if type(layer) is SyncVectorEnv:
        return "vector"
    origin = type(layer).__module__
    if origin.startswith("gymnasium.envs.mujoco."):
        return "mujoco"
    if origin == "ale_py.env":
        return "atari"
    if callable(getattr(type(layer), "get_state", None)) and callable(getattr(type(layer), "set_state", None)):
        return "own"
    return "unknown"


def _layer_state(layer: Any) -> Any:
    kind, name = _kind(layer), type(layer).__name__
    if kind == "fields":
        return {path: to_stored(_attribute(layer, path), f"{name}.{path}") for path in FIELDS[type(layer)]}
    if kind == "vector":
        fields = {field: to_stored(getattr(layer, field), f"{name}.{field}") for field in _SYNC_VECTOR}
        return {"environments": [environment_state(env) for env in layer.envs], "fields": fields}
    if kind == "mujoco":
        return _mujoco_state(layer)
    if kind == "atari":
        return atari_state(layer)
    if kind == "own":
        return to_stored(layer.get_state(), f"{name}.get_state()")
    raise TypeError(f"the state of {name} is not known; give it get_state() and set_state(state)")


def _restore_layer_(layer: Any, stored: Any) -> None:
    kind = _kind(layer)
    if kind == "fields":
        for path, value in stored.items():
            _set_attribute_(layer, path, from_stored(value))
    elif kind == "vector":
        for env, state in zip(layer.envs, stored["environments"], strict=True):
            restore_environment_(env, state)
        for field, value in stored["fields"].items():
            setattr(layer, field, from_stored(value))
    elif kind == "mujoco":
        _restore_mujoco_(layer, stored)
    elif kind == "atari":
        restore_atari_(layer, stored)
    else:
        layer.set_state(from_stored(stored))


def _attribute(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(layer, name)
    return layer


def _set_attribute_(layer: Any, path: str, value: Any) -> None:
    *holders, name = path.split(".")
    for holder in holders:
        layer = getattr(layer, holder)
    live = getattr(layer, name)
    if isinstance(live, deque):  # filled, for its length limit is its own
        live.clear()
        live.extend(value)
    else:
        setattr(layer, name, value)


def _mujoco_state(env: Any) -> dict[str, Any]:
    mujoco = import_module("mujoco")
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return {name: to_stored(getattr(env.data, name), name) for name in _LAGGING} | {"state": to_stored(state, "state")}


def _restore_mujoco_(env: Any, stored: dict[str, Any]) -> None:
    mujoco = import_module("mujoco")
    state = from_stored(stored["state"])
    size = mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_INTEGRATION)
    if len(state) != size:
        raise CheckpointError(
            f"the stored MuJoCo state has {len(state)} numbers, this model's {size}; use the same model and MuJoCo"
        )
    mujoco.mj_setState(env.model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    for name in _LAGGING:
        getattr(env.data, name)[:] = from_stored(stored[name])
