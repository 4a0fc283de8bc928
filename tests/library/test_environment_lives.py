import gymnasium as gym
import pytest

from lightning_custom.environments.lives import LifeEpisodes
from lightning_custom.environments.makers import MakeEnvironment


class Emulator:
    """What is asked of the emulator."""

    def __init__(self, game):
        self.game = game

    def lives(self):
        return self.game.lives[self.game.steps]


class Game(gym.Env):
    """Observes how often it was stepped and begun; ``lives`` are those after each step."""

    def __init__(self, lives):
        self.lives, self.steps, self.games, self.ale = lives, 0, 0, Emulator(self)
        self.actions, self.seeds = [], []

    def step(self, action):
        self.steps += 1
        self.actions.append(action)
        return (self.games, self.steps), 1.0, self.steps == len(self.lives) - 1, False, {}

    def reset(self, *, seed=None, options=None):
        self.steps, self.games = 0, self.games + 1
        self.seeds.append(seed)
        return (self.games, 0), {}


def test_a_lost_life_ends_the_episode_and_the_next_goes_on_with_the_game():
    game = Game([3, 3, 2, 2, 2, 1, 1, 1])
    env = LifeEpisodes(game)
    assert env.reset(seed=7)[0] == (1, 0)
    assert [env.step(5)[2] for _ in range(2)] == [False, True]
    assert env.reset(seed=8)[0] == (1, 3)  # a step without an action
    assert [env.step(5)[2] for _ in range(2)] == [False, True]
    assert env.reset()[0] == (1, 6)
    assert env.step(5)[2]
    assert env.reset(seed=9)[0] == (2, 0)
    assert game.actions == [5, 5, 0, 5, 5, 0, 5]
    assert game.seeds == [7, 9]
    assert not env.step(5)[2], "the lives of the last game were taken for those of the new one"


def test_a_game_that_goes_on_without_a_life_ends_where_it_is_over():
    env = LifeEpisodes(Game([1, 1, 0, 0, 0]))
    env.reset()
    assert [env.step(5)[2] for _ in range(4)] == [False, False, False, True]


def test_a_game_that_is_over_in_the_step_between_two_lives_begins_anew():
    env = LifeEpisodes(Game([2, 1, 1]))
    env.reset()
    assert env.step(5)[2]
    assert env.reset()[0] == (2, 0)


def test_breakout_is_trained_by_lives_and_scored_by_games():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    for evaluation in (False, True):
        env = MakeEnvironment("ALE/Breakout-v5", evaluation=evaluation)()
        env.reset(seed=0)
        emulator = env.unwrapped.ale
        while emulator.lives() == 5:
            _, _, ended, _, _ = env.step(1)  # launches the ball, and leaves it alone
        assert ended is not evaluation
        env.reset()
        assert emulator.lives() == (5 if evaluation else 4)
        env.close()
