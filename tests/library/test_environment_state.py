from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.envs import toy_text
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv

from lightning_custom.environments.layers import FIELDS, environment_state, layers, restore_environment_
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.environments.plain import from_stored, to_stored
from lightning_custom.environments.replay import Replayed
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.environments.verified import StateMethod, as_bytes, find_method
from lightning_custom.errors import CheckpointError
from lightning_custom.testing import first_difference
from tests.library.tiny_environments import (
    Drift,
    Level,
    LevelWithObject,
    LevelWithState,
    OutsideNoise,
    play,
    process,
    random_actions,
    stored,
)


def flat_blackjack(index):
    return wrappers.FlattenObservation(gym.make("Blackjack-v1"))


def stacked_cartpole(index):
    env = wrappers.FrameStackObservation(gym.make("CartPole-v1", max_episode_steps=30), 3)
    env = wrappers.TimeAwareObservation(wrappers.StickyAction(env, 0.4, (1, 3)))
    env = wrappers.NormalizeReward(wrappers.DelayObservation(env, 2))
    return wrappers.RecordEpisodeStatistics(wrappers.NormalizeObservation(wrappers.FlattenObservation(env)))


def taxi(index):
    return wrappers.TimeLimit(toy_text.TaxiEnv(), 90)


def cliff(index):
    return wrappers.TimeLimit(toy_text.CliffWalkingEnv(is_slippery=True), 90)


def skipping_pendulum(index):
    return wrappers.MaxAndSkipObservation(gym.make("Pendulum-v1", max_episode_steps=91), 2)


def walker(index):
    pytest.importorskip("Box2D")
    return gym.make("BipedalWalker-v3", max_episode_steps=90)


def box2d(name, index, **kwargs):
    pytest.importorskip("Box2D")
    return gym.make(name, **kwargs)


def mujoco(name, index):
    pytest.importorskip("mujoco")
    return gym.make(name, max_episode_steps=60)


def atari(name, index, **kwargs):
    gym.register_envs(pytest.importorskip("ale_py"))
    return gym.make(name, **kwargs)


def atari_by_lives(index):
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    return MakeEnvironment("ALE/Breakout-v5")(index)


def atari_as_trained_on(index):
    pytest.importorskip("cv2")
    env = atari("ALE/Breakout-v5", index, frameskip=1, repeat_action_probability=0.25)
    env = wrappers.AtariPreprocessing(env, noop_max=5, terminal_on_life_loss=True)
    return wrappers.FrameStackObservation(wrappers.RecordEpisodeStatistics(env), 4)


def make(name, index, **kwargs):
    return gym.make(name, **kwargs)


def drift(index):
    return Drift()


def level_with_state(index):
    return wrappers.TimeLimit(LevelWithState(), 7)


# Maker, and how its state is taken; within 200 steps each ends an episode.
FAMILIES = {
    "cartpole": (partial(make, "CartPole-v1"), "layers"),
    "acrobot": (partial(make, "Acrobot-v1", max_episode_steps=70), "layers"),
    "mountain car": (partial(make, "MountainCar-v0"), "layers"),
    "continuous mountain car": (partial(make, "MountainCarContinuous-v0", max_episode_steps=90), "layers"),
    "pendulum": (skipping_pendulum, "layers"),
    "frozen lake": (partial(make, "FrozenLake-v1"), "layers"),
    "taxi": (taxi, "layers"),
    "cliff": (cliff, "layers"),
    "blackjack": (flat_blackjack, "layers"),
    "wrappers": (stacked_cartpole, "layers"),
    "own state": (level_with_state, "layers"),
    "unknown": (drift, "replay"),
    "lander": (partial(box2d, "LunarLander-v3", enable_wind=True), "replay"),
    "walker": (walker, "replay"),
    "halfcheetah": (partial(mujoco, "HalfCheetah-v5"), "layers"),
    "hopper": (partial(mujoco, "Hopper-v5"), "layers"),
    "ant": (partial(mujoco, "Ant-v5"), "layers"),
    "humanoid": (partial(mujoco, "Humanoid-v5"), "layers"),
    "pong": (partial(atari, "ALE/Pong-v5", max_episode_steps=90, obs_type="ram"), "layers"),
    "breakout": (atari_as_trained_on, "layers"),
    "breakout by lives": (atari_by_lives, "layers"),
}
HISTORY, FUTURE = 137, 200


def straight_and_resumed(family, change=None):
    """What a vector shows after it was stored in mid-episode, and what a fresh one shows that was restored."""
    maker, _ = FAMILIES[family]
    num_envs = (
        1 if family in ("car", "ant", "humanoid", "pong", "breakout", "breakout by lives") else 2
    )  # the slow ones
    straight = EnvironmentVector(process(), maker, num_envs, seed=0)
    play(straight, random_actions(straight, HISTORY))
    items = stored(straight.item_state_dict())
    if change is not None:
        change(items["environment-00000"])
    resumed = EnvironmentVector(process(), maker, num_envs, seed=99)
    resumed.load_item_state_dict(items)
    assert as_bytes(resumed.observations) == as_bytes(straight.observations) or change is not None
    actions = random_actions(straight, FUTURE, seed=1)
    shown = play(straight, actions), play(resumed, actions)
    straight.close()
    resumed.close()
    return *shown, straight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_restored_in_mid_episode_goes_on_to_the_bit(family):
    straight, resumed, vector = straight_and_resumed(family)
    assert vector.inexact is None
    assert {method.name for method in vector._methods} == {FAMILIES[family][1]}
    assert any(step["episodes"] for step in straight), "no episode ended: nothing is shown of resets"
    assert first_difference(straight, resumed) is None


def test_in_one_box2d_world_for_all_episodes_a_replay_is_wrong(monkeypatch):
    """Why the world is renewed."""
    monkeypatch.setattr("lightning_custom.environments.replay.renew_world_", lambda env: None)
    monkeypatch.setattr("lightning_custom.environments.vector.find_method", lambda make: StateMethod("replay"))
    straight, resumed, _ = straight_and_resumed("walker")
    assert first_difference(straight, resumed) is not None


@pytest.mark.slow
def test_car_racing_goes_on_to_the_bit(monkeypatch):
    monkeypatch.setattr(f"{__name__}.HISTORY", 80)
    monkeypatch.setattr(f"{__name__}.FUTURE", 80)
    monkeypatch.setitem(FAMILIES, "car", (partial(box2d, "CarRacing-v3", max_episode_steps=50), "replay"))
    straight, resumed, vector = straight_and_resumed("car")
    assert {method.name for method in vector._methods} == {"replay"}
    assert first_difference(straight, resumed) is None


def drop(path, value=None):
    """Forget one part of what was stored: layers by position, then names."""

    def change(item):
        part = item["environment"]
        for key in path[:-1]:
            part = part[key]
        assert path[-1] in part
        part[path[-1]] = torch.zeros_like(part[path[-1]]) if value is None else value

    return change


def change_last_action(item):
    layer = item["environment"]["layers"][0]
    record = from_stored(layer["state"])
    record["actions"][-1] += 0.5
    layer["state"] = to_stored(record, "record")


@pytest.mark.parametrize(
    "family, change",
    [
        ("cartpole", drop(["np_random"], to_stored(np.random.default_rng(5), "np_random"))),
        ("cartpole", lambda item: item.update(length=0)),
        ("cartpole", lambda item: item.update({"return": 0.0})),
        ("cartpole", drop(["layers", 0, "state", "state"])),
        ("wrappers", drop(["layers", 1, "state", "obs_rms.mean"])),
        ("wrappers", drop(["layers", 3, "state", "discounted_reward"])),
        ("own state", drop(["layers", 0, "state"], to_stored({"place": np.zeros(2), "count": 0, "level": 1}, "state"))),
        ("unknown", change_last_action),
        ("ant", drop(["layers", 0, "state", "xpos"])),
        ("humanoid", drop(["layers", 0, "state", "xipos"])),
    ],
)
def test_each_part_of_the_state_is_needed(family, change):
    straight, resumed, _ = straight_and_resumed(family, change)
    assert first_difference(straight, resumed) is not None


def pong_captures(restore):
    """How many of 20 restores in mid-episode go on to the bit; taking the states must leave the game alone."""
    name, kwargs = "ALE/Pong-v5", {"frameskip": 1, "obs_type": "ram", "repeat_action_probability": 0.25}
    straight, untouched, resumed = (atari(name, 0, **kwargs) for _ in range(3))
    for env in (straight, untouched, resumed):
        env.reset(seed=1)
    straight.action_space.seed(0)
    exact = 0
    for _ in range(20):
        for action in [straight.action_space.sample() for _ in range(5)]:
            straight.step(action)
            untouched.step(action)
        restore(resumed, environment_state(straight))
        actions = [straight.action_space.sample() for _ in range(12)]
        expected, without, actual = (
            [as_bytes(env.step(a)[0]) for a in actions] for env in (straight, untouched, resumed)
        )
        assert expected == without
        exact += expected == actual
    return exact


def test_the_action_that_a_sticky_emulator_may_repeat_is_part_of_its_state():
    assert pong_captures(restore_environment_) == 20

    def without_it(env, state):
        *others, emulator = state["layers"]
        emulator = emulator | {"state": emulator["state"] | {"in_effect": None}}
        restore_environment_(env, state | {"layers": [*others, emulator]})

    assert pong_captures(without_it) < 20


def test_an_unknown_class_is_replayed_and_the_reason_says_so():
    method = find_method(Drift)
    assert (method.name, method.reason) == ("replay", "by fields: the state of Drift is not known")


@pytest.mark.parametrize("maker", [CartPoleEnv, PendulumEnv, lambda: wrappers.TimeLimit(PendulumEnv(), 10)])
def test_a_field_left_out_is_found_by_the_check(maker, monkeypatch):
    assert find_method(maker).name == "layers"
    outermost = type(next(layers(maker())))
    monkeypatch.setitem(FIELDS, outermost, FIELDS[outermost][1:])
    method = find_method(maker)
    assert method.name == "replay"
    assert "differs" in method.reason


def test_what_is_not_deterministic_or_remembers_episodes_is_found_by_the_check():
    for maker in (OutsideNoise, Level):
        method = find_method(maker)
        assert method.name == "reset"
        assert f"by replay: {maker.__name__} differs" in method.reason


def test_a_state_that_is_not_plain_is_reported_with_its_place():
    method = find_method(LevelWithObject)
    assert method.name == "reset"
    assert "TypeError: LevelWithObject.get_state()['all'] is a object, which is not plain" in method.reason


def test_an_environment_without_a_state_resumes_from_a_reset_that_the_checkpoint_decides():
    def vector(seed=0):
        return EnvironmentVector(process(), lambda index: Level(), 2, seed=seed)

    straight = vector()
    assert "Level differs" in straight.inexact
    play(straight, random_actions(straight, 31))
    items = stored(straight.item_state_dict())
    resumed = [vector(), vector()]
    for each in resumed:
        each.load_item_state_dict(items)
        assert each.starts.all()
    actions = random_actions(straight, 6)
    assert first_difference(*(play(each, actions) for each in resumed)) is None
    assert first_difference(play(vector(), actions), play(straight, actions)) is not None


def test_a_replay_that_ends_early_is_an_error():
    env = Replayed(Drift())
    env.reset(seed=1)
    for _ in range(5):
        env.step(np.zeros(2, np.float32))
    state = environment_state(env)
    other = Replayed(wrappers.TimeLimit(Drift(), 3))
    other.reset(seed=2)
    with pytest.raises(CheckpointError, match="of Drift that was stored after 5 actions ends after 3 when played"):
        restore_environment_(other, state)


def test_another_environment_is_refused_with_both_stacks():
    env, other = gym.make("CartPole-v1"), PendulumEnv()
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(CheckpointError, match=r"layers TimeLimit, OrderEnforcing, .* this one has PendulumEnv"):
        restore_environment_(other, environment_state(env))


VALUES = [
    None, True, 3, 2**127 + 1, -0.1, "text", b"\x00\xff", np.float32(0.1), np.int8(-3), np.bool_(True), np.str_("ace"),
    np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::2], np.array(2.5), np.zeros((0, 2)), np.arange(3, dtype=">i4"),
    (1, np.float64(2)), [np.float32(1), [None]], {"a": {1: np.ones(2)}, 2: ()},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_comes_back_with_its_type_and_its_bits(value):
    back = from_stored(stored({"value": to_stored(value, "value")})["value"])
    assert type(back) is type(value)
    if isinstance(value, np.ndarray):
        assert (back.shape, back.dtype) == (value.shape, value.dtype.newbyteorder("="))
        assert np.array_equal(back, value)
    elif isinstance(value, np.generic):
        assert (back.dtype, back) == (value.dtype, value)
    else:
        assert repr(back) == repr(value)


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_generator_comes_back_where_it_was(kind):
    generator = np.random.Generator(getattr(np.random, kind)(3))
    generator.integers(5, size=3, dtype=np.uint32)
    back = from_stored(stored({"value": to_stored(generator, "value")})["value"])
    assert np.array_equal(back.normal(size=9), generator.normal(size=9))


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), [np.array(["text"])], {"a": lambda: 0}])
def test_what_is_not_plain_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match=r"^state.* which is not plain$"):
        to_stored(value, "state")
