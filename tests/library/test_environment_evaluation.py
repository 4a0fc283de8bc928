"""Episodes that are a function of their seed."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_custom.animation import write_animation
from lightning_custom.environments import evaluation
from lightning_custom.environments.evaluation import EpisodePlayer, episodic_returns, mean_and_interval
from lightning_custom.environments.makers import MakeEnvironment, MakeVector
from lightning_custom.errors import ConfigError
from lightning_custom.testing import single_process
from tests.library.tiny_environments import Countdown, Drift, process


def zeros(observations):
    return np.zeros(len(observations), dtype=np.int64)


def test_every_episode_counts_once_however_long_it_is():
    lengths = [7, 1, 3, 2]
    found = episodic_returns(single_process(), lambda index: Countdown(index, lengths[index]), zeros, 4, seed=0)
    assert found.tolist() == [10 * sum(range(1, length + 1)) for length in lengths]


def test_episodes_are_the_same_at_every_call_and_others_with_another_seed():
    def act(observations):
        return np.zeros_like(observations)

    runs = [episodic_returns(single_process(), lambda index: Drift(), act, 5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


class Noted:
    """Notes which episodes it is asked to act in, and how long they have gone on."""

    def __init__(self):
        self.calls = []

    def in_episodes(self, observations, episodes, steps):
        self.calls.append((observations[:, 0].tolist(), list(episodes), steps))
        return zeros(observations)


def test_what_acts_in_episodes_is_told_which_go_on_and_when_new_ones_begin(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "_AT_ONCE", 3)
    noted, lengths = Noted(), [2, 1, 3]
    found = episodic_returns(single_process(), lambda index: Countdown(index, lengths[index]), noted, 5, seed=0)
    assert found.tolist() == [30, 10, 60, 30, 10]
    assert noted.calls == [
        ([0, 1, 2], [0, 1, 2], 0), ([0, 2], [0, 2], 1), ([2], [2], 2), ([0, 1], [0, 1], 0), ([0], [0], 1),
    ]  # fmt: skip
    noted.calls.clear()
    env = gym.wrappers.TimeLimit(MakeEnvironment("CartPole-v1", render_mode="rgb_array")(), 2)
    write_animation(env, noted, str(tmp_path / "a.gif"), 2, seed=0, most=1)
    assert [call[1:] for call in noted.calls] == [([0], 0), ([0], 1)] * 2


def test_a_time_limit_truncates():
    player = EpisodePlayer(lambda index: gym.wrappers.TimeLimit(Countdown(index, 50), 4))
    steps = list(player.play(lambda observations, *_: zeros(observations), [0, 1]))
    assert len(steps) == 4
    assert steps[-1].truncated.tolist() == [True, True]
    assert not steps[-1].terminated.any()


def test_an_episode_without_an_end_is_cut_with_one_warning_and_one_with_a_limit_of_its_own_is_not(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluation, "LONGEST", 5)
    endless = EpisodePlayer(lambda index: Countdown(index, 100))
    with pytest.warns(UserWarning, match=r"had not ended after 5 steps and was cut; give .*TimeLimit") as caught:
        found = [endless.played(lambda seen, *_: zeros(seen), [0, 1], lambda actions: actions) for _ in range(2)]
    assert len(caught) == 1
    for played in found:
        assert [episode.length for episode in played.episodes] == [5, 5]
        assert played.truncated.tolist() == [True, True]
    limited = EpisodePlayer(lambda index: gym.wrappers.TimeLimit(Countdown(index, 100), 7))
    assert len(list(limited.play(lambda observations, *_: zeros(observations), [0]))) == 7


def test_an_animation_ends_though_the_episode_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_custom.animation.LONGEST", 6)
    env = gym.make("CliffWalking-v1", render_mode="rgb_array")
    pytest.importorskip("pygame")
    assert write_animation(env, zeros, str(tmp_path / "a.gif"), 1, seed=0, most=3) == [-6.0]


def test_an_episode_is_played_in_the_environment_of_its_number_whatever_process_plays_it(monkeypatch):
    monkeypatch.setattr(evaluation, "gather_shares", lambda values, fabric: values)
    monkeypatch.setattr(evaluation, "_AT_ONCE", 3)

    def returns(rank, processes):
        make_env = lambda index: Countdown(index, 1 + index)  # noqa: E731
        return episodic_returns(process(rank, processes), make_env, zeros, 7, seed=0).tolist()

    assert returns(0, 1) == [10.0, 30.0, 60.0] * 2 + [10.0]
    assert returns(0, 2) + returns(1, 2) == returns(0, 1)


def test_an_episode_in_a_box2d_world_does_not_depend_on_those_before(monkeypatch):
    pytest.importorskip("Box2D")

    def rewards(*seeds):
        player = EpisodePlayer(lambda index: gym.make("BipedalWalker-v3", max_episode_steps=60))
        for seed in seeds:
            draw = np.random.default_rng(seed)
            found = [step.rewards[0] for step in player.play(lambda *_: draw.uniform(-1, 1, (1, 4)), [seed])]  # noqa: B023
        return found

    assert rewards(1, 2, 5) == rewards(5)
    monkeypatch.setattr(evaluation, "renew_world_", lambda env: None)
    assert rewards(1, 2, 5) != rewards(5)


def test_what_was_played_is_in_one_piece_with_the_episode_of_each_step():
    lengths = [3, 1, 2]
    player = EpisodePlayer(lambda index: Countdown(index, lengths[index], "truncated" if index else "terminated"))
    played = player.played(lambda observations, *_: zeros(observations), [0, 0, 0], lambda actions: actions)
    assert played.episode_of.tolist() == [0, 1, 2, 0, 2, 0]
    assert played.rewards.tolist() == [10, 10, 10, 20, 20, 30]
    assert played.observations[:, 2].tolist() == [0, 0, 0, 1, 1, 2]
    assert played.final_observations[:, 2].tolist() == lengths
    assert played.truncated.tolist() == [False, True, True]
    assert [episode[1:3] for episode in played.episodes] == [(60, 3), (10, 1), (30, 2)]


def test_the_interval_is_that_of_the_normal_distribution():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    mean, interval = mean_and_interval(returns)
    assert mean == 2.5
    assert interval == pytest.approx(1.96 * np.std([1, 2, 3, 4], ddof=1) / 2)


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MakeEnvironment("CartPol-v1")(), "env: CartPol-v1 cannot be made"),
        (lambda: MakeEnvironment("no/such-v0")(), "env: no/such-v0 cannot be made"),
        (lambda: MakeEnvironment("nosuch:Env-v0")(), "env: nosuch:Env-v0 cannot be made"),
        (lambda: MakeEnvironment("HalfCheetah-v3")(), "env: HalfCheetah-v3 cannot be made"),
        (lambda: MakeVector("Pendulum-v1")(2), "vectorised: Pendulum-v1 has no vector entry point"),
    ],
)
def test_an_environment_that_is_not_there_is_one_clear_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_animation_has_a_frame_a_step_up_to_the_most(tmp_path):
    env = MakeEnvironment("CartPole-v1", render_mode="rgb_array")()
    returns = write_animation(env, zeros, str(tmp_path / "a.gif"), 2, seed=0, most=12)
    assert len(returns) == 2
    assert sum(returns) > 12
    with Image.open(tmp_path / "a.gif") as picture:
        assert 8 <= picture.n_frames <= 12  # equal neighbours become one


def test_an_animation_that_cannot_be_made_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"render_mode=.rgb_array"):
        write_animation(gym.make("CartPole-v1").unwrapped, zeros, str(tmp_path / "a.gif"), 1, seed=0, most=5)
    env = MakeEnvironment("CartPole-v1", render_mode="rgb_array")()
    with pytest.raises(ConfigError, match=r"out: cannot write .*choose another"):
        write_animation(env, zeros, str(tmp_path / "no" / "a.gif"), 1, seed=0, most=5)
