"""The exact state of an Atari emulator, sticky actions included.

With ``repeat_action_probability`` the emulator may repeat the action in effect instead of taking the next one. Which
one is in effect is neither in the state that the Arcade Learning Environment serialises nor to be read: it is found
here by trying. Machado et al. 2018, section 5.2, for sticky actions.
"""

from importlib import import_module
from typing import Any

from lightning_custom.environments.plain import from_stored, to_stored

# An action fails to come into effect within this many frames once in 10^38 times at the usual probability of 1/4.
_FRAMES_TO_TAKE_EFFECT = 64
_FRAMES_COMPARED = 24


def atari_state(env: Any) -> dict[str, Any]:
    """The emulator's state and generator, and the action in effect; costs up to 0.2 s where actions are sticky.

    ``TypeError`` for continuous actions that are sticky.
    """
    emulator = env.ale.cloneState(include_rng=True)
    return {"emulator": to_stored(emulator.serialize(), "emulator"), "in_effect": _action_in_effect(env, emulator)}


def restore_atari_(env: Any, stored: dict[str, Any]) -> None:
    """Give the emulator a state, and put the action that was in effect into effect."""
    emulator = import_module("ale_py").ALEState(from_stored(stored["emulator"]))
    if stored["in_effect"] is None:
        env.ale.restoreState(emulator)
    else:
        _put_into_effect_(env.ale, stored["in_effect"], emulator)


def _action_in_effect(env: Any, emulator: Any) -> int | None:
    """The action that the emulator may repeat next; afterwards it is as it was."""
    ale = env.ale
    if ale.getFloat("repeat_action_probability") == 0:
        return None
    if env.continuous:
        raise TypeError("the strength of a sticky continuous action cannot be found out")
    expected = _next_frames(ale)
    actions: dict[int, None] = dict.fromkeys([0, *(action.value for action in env._action_set)])
    for action in actions:
        _put_into_effect_(ale, action, emulator)
        # Equal after every frame, until a draw takes a new action: from there on the old one does not matter.
        if _next_frames(ale) == expected:
            _put_into_effect_(ale, action, emulator)
            return action
    raise TypeError("the emulator does not repeat its frames")


def _next_frames(ale: Any) -> list[bytes]:
    frames = []
    for _ in range(_FRAMES_COMPARED):
        ale.act(0)
        frames.append(ale.cloneState(include_rng=True).serialize())
    return frames


def _put_into_effect_(ale: Any, action: int, emulator: Any) -> None:
    ale.reset_game()  # a game that is over takes no action
    for _ in range(_FRAMES_TO_TAKE_EFFECT):
        ale.act(action)
    ale.restoreState(emulator)
