"""How the state of an environment is taken, found by trying it: taken in mid-episode, restored, compared to the bit."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_custom.environments.layers import (
    Environment,
    environment_state,
    restore_environment_,
    unknown_layer,
)
from lightning_custom.environments.replay import Replayed


@dataclass(frozen=True)
class StateMethod:
    """How an environment's state is taken."""

    name: Literal["layers", "replay", "reset"]
    """By named fields, by playing the episode again, or not at all: then a resumed run starts a new episode."""
    reason: str = ""
    """Why none of the ways before it would do."""


def prepared(env: Environment, method: StateMethod) -> Environment:
    """``env`` as ``method`` needs it, to be reset after."""
    return Replayed(env) if method.name == "replay" else env


def find_method(make: Callable[[], Environment], *, steps: int = 16) -> StateMethod:
    """The first way that is exact for the environments of ``make``.

    Two of them play for at most ``8 * steps`` random actions each, with resets in between. That an environment
    passes is no proof: a counter that matters after a thousand steps is not seen.
    """
    reasons: list[str] = []
    for method in (StateMethod("layers"), StateMethod("replay")):
        reason = _why_inexact(make, method, steps)
        if reason is None:
            return StateMethod(method.name, "; ".join(reasons))
        reasons.append(f"{'by fields' if method.name == 'layers' else 'by replay'}: {reason}")
    return StateMethod("reset", "; ".join(reasons))


def _why_inexact(make: Callable[[], Environment], method: StateMethod, steps: int) -> str | None:
    one, other = prepared(make(), method), prepared(make(), method)
    try:
        unknown = unknown_layer(one)
        if unknown is not None:
            return f"the state of {unknown} is not known"
        one.reset(seed=1)
        # Another past, for a restore must not depend on it.
        other.reset(seed=2)
        actions = _random_actions(one)
        _play(one, actions, episodes=3, steps=steps)
        _play(other, actions, episodes=1, steps=steps)
        for action in itertools.islice(actions, steps // 2):
            if _has_ended(one.step(action)):
                one.reset()
        restore_environment_(other, environment_state(one))
        to_come = list(itertools.islice(actions, 3 * steps))
        expected, actual = (_play(env, iter(to_come), episodes=3, steps=steps) for env in (one, other))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        one.close()
        other.close()
    for i, (first, second) in enumerate(zip(expected, actual, strict=False)):
        if first != second:
            return f"{type(one.unwrapped).__name__} differs {i + 1} steps and resets after a restore"
    return None


def _random_actions(env: Environment) -> Iterator[Any]:
    space = env.action_space
    space.seed(0)
    while True:
        action = space.sample()
        yield int(action) if isinstance(action, np.integer) else action


def _play(env: Environment, actions: Iterator[Any], *, episodes: int, steps: int) -> list[Any]:
    played: list[Any] = []
    for _ in range(episodes):
        for action in itertools.islice(actions, steps):
            observation, reward, terminated, truncated, _ = env.step(action)
            played.append((as_bytes(observation), float(reward), terminated, truncated))
            if terminated or truncated:
                break
        played.append(as_bytes(env.reset()[0]))
    return played


def _has_ended(result: tuple[Any, ...]) -> bool:
    return bool(result[2] or result[3])


def as_bytes(observation: Any) -> Any:
    """The bits of an observation, by key where it is a dict; comparable by ``==``."""
    if isinstance(observation, dict):
        return {key: as_bytes(value) for key, value in observation.items()}
    if isinstance(observation, (tuple, list)):
        return [as_bytes(value) for value in observation]
    return np.asarray(observation).tobytes()
