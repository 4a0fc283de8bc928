import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from lightning_custom.environments.batched import BatchedEnvironments
from lightning_custom.environments.plain import to_stored
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.errors import ConfigError
from lightning_custom.stopping import STOP_SIGNALS
from lightning_custom.testing import first_difference
from tests.library.tiny_environments import Countdown, Drift, Mixed, play, process, random_actions, stored


def cartpoles(num_envs):
    return gym.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point", max_episode_steps=30)


def batched(make_vector, num_envs, rank=0, processes=1, seed=0):
    return BatchedEnvironments(process(rank, processes), make_vector, num_envs, seed=seed)


def countdowns(mode):
    ends = ("terminated", "truncated", "both")
    makers = [lambda index=index: Countdown(index, 2 + index, ends[index]) for index in range(3)]
    return lambda num_envs: SyncVectorEnv(makers, autoreset_mode=mode)


def straight_and_resumed(change=None):
    straight = batched(cartpoles, 4)
    assert straight.inexact is None
    play(straight, random_actions(straight, 47))
    items = stored(straight.item_state_dict())
    if change is not None:
        change(items["process-00000"])
    resumed = batched(cartpoles, 4, seed=99)
    resumed.load_item_state_dict(items)
    if change is None:
        assert np.array_equal(straight.observations, resumed.observations)
    actions = random_actions(straight, 200, seed=1)
    return play(straight, actions), play(resumed, actions)


def test_the_entry_point_goes_on_to_the_bit():
    straight, resumed = straight_and_resumed()
    assert sum(len(step["episodes"]) for step in straight) > 20
    assert any(step["ignored"].any() for step in straight)
    assert first_difference(straight, resumed) is None


@pytest.mark.parametrize("field", ["steps", "prev_done", "np_random"])
def test_each_part_of_the_state_is_needed(field):
    def change(item):
        if field == "np_random":
            item["vector"]["np_random"] = to_stored(np.random.default_rng(8), field)
        else:
            layer = item["vector"]["layers"][0]["state"]
            layer[field] = torch.ones_like(layer[field])

    assert first_difference(*straight_and_resumed(change)) is not None


def test_where_the_vector_resets_in_the_same_step_it_is_the_environment_vector():
    makers = countdowns(AutoresetMode.SAME_STEP)(3).env_fns
    expected = EnvironmentVector(process(), lambda index: makers[index](), 3, seed=0)
    actions = random_actions(expected, 12)
    shown = play(expected, actions)
    assert sum(len(step["episodes"]) for step in shown) == 6 + 4 + 3
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        assert first_difference(shown, play(batched(countdowns(mode), 3), actions)) is None


def test_where_it_resets_in_the_next_step_that_step_is_marked_and_counts_for_nothing():
    envs = batched(countdowns(AutoresetMode.NEXT_STEP), 3)
    rows = []
    for _ in range(4):
        envs.step(np.zeros(3, dtype=np.int64))
        rows.append((envs.observations[0].tolist(), envs.rewards[0], envs.terminated[0], envs.ignored[0]))
        rows[-1] += ([tuple(episode)[:3] for episode in envs.episodes if episode.environment == 0],)
    assert rows == [
        ([0, 1, 1], 10, False, False, []),
        ([0, 1, 2], 20, True, False, [(0, 30.0, 2)]),
        ([0, 2, 0], 0, False, True, []),
        ([0, 2, 1], 10, False, False, []),
    ]
    assert envs.final_observations[0].tolist() == [0, 1, 2]
    envs.step(np.zeros(3, dtype=np.int64))
    assert [tuple(episode)[:3] for episode in envs.episodes] == [(0, 30.0, 2)], "the ignored step is no step"


def test_dict_observations_keep_their_last():
    envs = batched(lambda num_envs: SyncVectorEnv([Mixed] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP), 2)
    play(envs, [np.array([[1, 2], [3, 1]])] * 4)
    assert envs.truncated.all()
    assert envs.final_observations["count"].tolist() == [4, 4]
    assert envs.observations["count"].tolist() == [0, 0]


def test_what_was_stepped_as_a_whole_is_not_divided():
    items = stored({**batched(cartpoles, 4, 0, 2).item_state_dict(), **batched(cartpoles, 4, 1, 2).item_state_dict()})
    assert items.keys() == {"process-00000", "process-00001"}
    with pytest.raises(ConfigError, match=r"devices: 1 processes, but those stored .* by 2, .*resume on 2, or"):
        batched(cartpoles, 4).load_item_state_dict(items)


def test_the_processes_play_different_episodes():
    first, second = (batched(cartpoles, 4, rank, 2) for rank in range(2))
    assert not np.intersect1d(first.observations, second.observations).size


def short_cartpole():
    return wrappers.RecordEpisodeStatistics(gym.make("CartPole-v1", max_episode_steps=9))


def in_turn(mode):
    return lambda num_envs: SyncVectorEnv([short_cartpole] * num_envs, autoreset_mode=mode)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_vector_that_steps_in_turn_goes_on_to_the_bit_however_it_resets(mode):
    straight = batched(in_turn(mode), 3)
    assert straight.inexact is None
    # Some in mid-episode and, where a reset takes a step, some before theirs.
    rounds = [play(straight, random_actions(straight, 1, seed=i))[0] for i in range(33)]
    items = stored(straight.item_state_dict())
    resumed = batched(in_turn(mode), 3, seed=99)
    resumed.load_item_state_dict(items)
    actions = random_actions(straight, 40, seed=50)
    shown = play(straight, actions)
    assert sum(len(step["episodes"]) for step in rounds + shown) > 15
    assert first_difference(shown, play(resumed, actions)) is None

    items["process-00000"]["vector"]["layers"][0]["state"]["environments"].reverse()
    changed = batched(in_turn(mode), 3, seed=99)
    changed.load_item_state_dict(items)
    assert first_difference(shown, play(changed, actions)) is not None


def in_other_processes(num_envs):
    return AsyncVectorEnv([short_cartpole] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def of_what_only_a_replay_restores(num_envs):
    return SyncVectorEnv([Drift] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python 3.12 and up
@pytest.mark.parametrize(
    "make_vector, unknown", [(in_other_processes, "AsyncVectorEnv"), (of_what_only_a_replay_restores, "Drift")]
)
def test_a_vector_of_unknown_state_says_so_and_resumes_from_a_reset(make_vector, unknown):
    straight = batched(make_vector, 3)
    assert straight.inexact == f"the state of {unknown} is not known; train with EnvironmentVector"
    assert any(step["episodes"] for step in play(straight, random_actions(straight, 30)))
    items = stored(straight.item_state_dict())
    resumed = [batched(make_vector, 3), batched(make_vector, 3)]
    for each in resumed:
        each.load_item_state_dict(items)
        assert each.starts.all()
    assert np.array_equal(resumed[0].observations, resumed[1].observations)
    fresh = batched(make_vector, 3)
    assert not np.array_equal(resumed[0].observations, fresh.observations)
    for each in (straight, *resumed, fresh):
        each.close()


def test_a_vector_that_does_not_say_when_it_resets_or_is_of_another_size_is_refused():
    def silent(num_envs):
        vector = cartpoles(num_envs)
        vector.metadata = {}
        return vector

    with pytest.raises(ConfigError, match=r"make_vector: .*does not say when it resets; set metadata"):
        batched(silent, 2)
    with pytest.raises(ConfigError, match="make_vector: made 3 environments, asked for 2; make as many"):
        batched(lambda num_envs: cartpoles(3), 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_environments_in_other_processes_outlive_stop_signals_and_this_process_still_hears_them():
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    envs = batched(in_other_processes, 2)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    for worker in envs._vector.processes:
        for number in STOP_SIGNALS:
            os.kill(worker.pid, number)
    time.sleep(0.2)
    play(envs, random_actions(envs, 20))
    assert all(worker.is_alive() for worker in envs._vector.processes)
    envs.close()


NEVER_CLOSED = """
from tests.library.test_environment_batched import batched, in_other_processes

if __name__ == "__main__":
    envs = batched(in_other_processes, 2)
    print("made", flush=True)
"""


@pytest.mark.slow
def test_a_program_that_closes_nothing_ends_all_the_same():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "made\n"
