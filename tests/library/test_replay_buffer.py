"""Transitions are those that were played, drawn as often as they should be, and the same after any interruption."""

import dataclasses
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from lightning_custom import storage
from lightning_custom.checkpoint import Checkpointer
from lightning_custom.config import RunConfig, with_run_dir
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.loop import seed_step
from lightning_custom.replay import replay_folder
from lightning_custom.replay_buffer import SMALLEST_PRIORITY, ReplayBuffer
from lightning_custom.testing import first_difference, in_processes, single_process
from tests.library.tiny_environments import Countdown, Drift, OutsideNoise, Pays

CHECKPOINTS = "checkpoints"


class Resumable(Countdown):
    """Tells its own state."""

    def get_state(self):
        return {"episode": self.episode, "count": self.count}

    def set_state(self, state):
        self.episode, self.count = state["episode"], state["count"]


def make_countdown(index=0):
    """Episodes of different lengths in different environments, terminated and truncated by turns."""
    return Resumable(index, length=3 + index, end="terminated" if index % 2 == 0 else "truncated")


def buffer_for(envs, fabric, run_dir, **options):
    return ReplayBuffer(
        fabric, run_dir, num_envs=envs.num_envs, observation_space=envs.observation_space,
        action_space=envs.action_space, **{"capacity": 1000, "segment_size": 2, **options},
    )  # fmt: skip


def played(run_dir, steps, make_env=make_countdown, num_envs=2, **options):
    """A buffer, and by environment everything that was played as (observation, action, reward, next, end)."""
    fabric = single_process()
    envs = EnvironmentVector(fabric, make_env, num_envs, seed=0)
    buffer = buffer_for(envs, fabric, run_dir, **options)
    buffer.begin(envs.observations)
    history = [[] for _ in range(num_envs)]
    for t in range(steps):
        before, actions = envs.observations.copy(), np.arange(num_envs) + t % 2
        envs.step(actions)
        buffer.add(actions, envs)
        ended = envs.terminated | envs.truncated
        following = np.where(ended[:, None], envs.final_observations, envs.observations)
        for i in range(num_envs):
            end = "terminated" if envs.terminated[i] else "truncated" if envs.truncated[i] else ""
            history[i].append((tuple(before[i]), int(actions[i]), float(envs.rewards[i]), tuple(following[i]), end))
    return buffer, history


def expected_transition(history, start, n_step, discount):
    """An n-step transition, written out: (rewards, next observation, factor of its value)."""
    total, factor = 0.0, 1.0
    for _, _, reward, seen, ending in history[start : start + n_step]:
        total, factor, following, end = total + factor * reward, factor * discount, seen, ending
        if end:
            break
    return total, following, 0.0 if end == "terminated" else factor


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("capacity", [1000, 20])
def test_every_drawn_transition_is_the_n_step_one_that_was_played(n_step, capacity, tmp_path):
    buffer, history = played(tmp_path, 33, capacity=capacity)
    batch = buffer.sample(600, torch.Generator().manual_seed(0), n_step=n_step, discount=0.9)
    seen, ends = set(), set()
    for k, (env, number) in enumerate(zip(*batch.places, strict=True)):
        seen.add((env, number))
        observation, action, *_ = history[env][number]
        total, following, factor = expected_transition(history[env], number, n_step, 0.9)
        ends.add(history[env][min(number + n_step, 33) - 1][4])
        assert tuple(batch.observations[k].tolist()) == observation
        assert batch.actions[k] == action
        assert tuple(batch.next_observations[k].tolist()) == following
        assert [batch.rewards[k].item(), batch.discounts[k].item()] == pytest.approx([total, factor])
    first = max(0, 33 - capacity // 2)
    assert seen == {(env, number) for env in (0, 1) for number in range(first, 33)}
    assert ends == {"", "terminated", "truncated"}


@pytest.mark.parametrize("n_step", [1, 2, 3])
@pytest.mark.parametrize("end, expected", [("truncated", [2.0, 2.0]), ("terminated", [1.5, 1.0])])
def test_values_learned_from_the_buffer_are_those_of_the_environment(end, expected, n_step, tmp_path):
    """The fixed point of the targets, for a reward of 1 and a discount of a half: 2 for ever, 1.5 and 1 if it ends."""
    buffer, _ = played(tmp_path, 20, lambda index: Pays(end, spaces.Discrete(1)), num_envs=1)
    values, generator = torch.zeros(2), torch.Generator().manual_seed(0)
    for _ in range(40):
        batch = buffer.sample(64, generator, n_step=n_step, discount=0.5)
        targets = batch.rewards + batch.discounts * (batch.next_observations @ values)
        values = torch.stack([targets[batch.observations[:, state] == 1].mean() for state in (0, 1)])
    assert values.tolist() == pytest.approx(expected, abs=1e-4)


def test_all_kept_transitions_are_drawn_alike_without_priorities(tmp_path):
    buffer, _ = played(tmp_path, 25, capacity=20)
    draws = 20000
    envs, numbers = buffer.sample(draws, torch.Generator().manual_seed(0)).places
    counts = np.bincount(envs * 10 + numbers - 15, minlength=20)
    assert ((counts - draws / 20) ** 2 / (draws / 20)).sum() < 43.8  # chi-squared, 19 degrees, 1 in 1000


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_transitions_are_drawn_in_proportion_to_their_priorities(exponent, tmp_path):
    buffer, _ = played(tmp_path, 25, capacity=20, prioritised=True, exponent=exponent)
    envs, numbers = np.repeat([0, 1], 10), np.tile(np.arange(15, 25), 2)
    errors = torch.linspace(-1, 3, 20, dtype=torch.float64)
    buffer.update_priorities_((envs, numbers), errors)
    shares = (errors.abs().numpy() + SMALLEST_PRIORITY) ** exponent
    shares /= shares.sum()

    batch = buffer.sample(20000, torch.Generator().manual_seed(0), beta=0.7)
    drawn = batch.places[0] * 10 + batch.places[1] - 15
    # One draw from each of 20,000 equal parts: no count is further than 2 from what is expected.
    assert np.abs(np.bincount(drawn, minlength=20) - 20000 * shares).max() <= 2
    weights = (20 * shares[drawn]) ** -0.7
    np.testing.assert_allclose(batch.weights.numpy(), weights / weights.max(), rtol=1e-5)


def test_new_transitions_have_the_largest_priority_so_far(tmp_path):
    fabric = single_process()
    envs = EnvironmentVector(fabric, make_countdown, 1, seed=0)
    buffer = buffer_for(envs, fabric, tmp_path, capacity=4, prioritised=True, exponent=1.0)
    buffer.begin(envs.observations)
    for errors in ([1.0], [9.0, 1.0], [0.0, 0.0, 0.0]):
        envs.step(np.zeros(1, np.int64))
        buffer.add(np.zeros(1, np.int64), envs)
        numbers = np.arange(len(errors))
        buffer.update_priorities_((numbers * 0, numbers), torch.tensor(errors))
    envs.step(np.zeros(1, np.int64))
    buffer.add(np.zeros(1, np.int64), envs)
    drawn = buffer.sample(1000, torch.Generator().manual_seed(0)).places[1]
    assert (drawn == 3).all()  # 9 against three times 1e-6


class Shown(gym.Env[Any, Any]):
    """Dict observations of bytes and numbers, and two numbers an action."""

    def __init__(self):
        self.observation_space = spaces.Dict(
            picture=spaces.Box(0, 255, (1, 2, 2), np.uint8), place=spaces.Box(-1, 1, (1,), np.float64)
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observation(), {}

    def step(self, action):
        self.count += 1
        return self._observation(), 0.5, False, self.count == 3, {}

    def _observation(self):
        return {"picture": np.full((1, 2, 2), self.count, np.uint8), "place": np.array([self.count / 10])}


def test_dict_observations_come_back_in_their_types(tmp_path):
    fabric = single_process()
    envs = EnvironmentVector(fabric, lambda index: Shown(), 2, seed=0)
    buffer = buffer_for(envs, fabric, tmp_path)
    buffer.begin(envs.observations)
    for t in range(7):
        actions = np.full((2, 2), t / 10, np.float32)
        envs.step(actions)
        buffer.add(actions, envs)
    batch = buffer.sample(100, torch.Generator().manual_seed(0))
    counts = torch.from_numpy(batch.places[1] % 3)
    for observations, expected in ((batch.observations, counts), (batch.next_observations, counts + 1)):
        assert observations["picture"].dtype == torch.uint8
        assert torch.equal(observations["picture"], expected.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))
        assert torch.equal(observations["place"], (expected / 10).float().unsqueeze(1))
    np.testing.assert_allclose(batch.actions[:, 1].numpy(), batch.places[1] / 10, rtol=1e-6)


def test_a_batch_of_one_is_the_first_draw_of_its_generator(tmp_path):
    buffer, history = played(tmp_path, 12)
    batch = buffer.sample(1, torch.Generator().manual_seed(3))
    first = float(torch.rand(1, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    env, number = divmod(int(24 * first), 12)
    assert [part.tolist() for part in batch.places] == [[env], [number]]
    assert batch.actions.tolist() == [history[env][number][1]]


# With a checkpointer


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(RunConfig):
    steps: int = 40
    checkpoint_every: int = 5
    keep: int = 1
    num_envs: int = 2
    capacity: int = 24
    segment_size: int = 2
    prioritised: bool = False
    env: str = "countdown"


@dataclass
class ReplayState:
    value: torch.Tensor
    """A sum over all that was drawn."""
    envs: EnvironmentVector
    replay: ReplayBuffer
    step: int = 0


MAKERS = {
    "countdown": make_countdown,
    "drift": lambda index: Drift(),
    "outside-noise": lambda index: OutsideNoise(),
}


def loop(fabric, config):
    config = with_run_dir(fabric, config)
    envs = EnvironmentVector(fabric, MAKERS[config.env], config.num_envs, seed=config.seed)
    options = {name: getattr(config, name) for name in ("capacity", "prioritised", "segment_size")}
    buffer = buffer_for(envs, fabric, config.run_dir, **options)
    state = ReplayState(torch.zeros(3, dtype=torch.float64), envs, buffer)
    own = slice(envs.indices.start, envs.indices.stop)
    with Checkpointer(fabric, config) as checkpointer:
        checkpointer.restore(state)
        buffer.begin(envs.observations)
        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            if isinstance(envs.action_space, spaces.Discrete):
                actions = torch.randint(4, (config.num_envs,), generator=rng.shared).numpy()[own]
            else:
                actions = torch.randn(config.num_envs, 2, generator=rng.shared).numpy()[own]
            envs.step(actions)
            buffer.add(actions, envs)
            batch = buffer.sample(8, rng.shared, n_step=2, beta=0.5)
            values = torch.stack([batch.rewards, batch.discounts, batch.weights]).double()
            state.value += fabric.all_reduce(values.sum(1), reduce_op="sum")
            buffer.update_priorities_(batch.places, batch.rewards / 10)
            state.step += 1
            if checkpointer.due(state.step):
                checkpointer.save(state)
            if checkpointer.stop_requested:
                break
    return state


def run(folder, **fields):
    return loop(single_process(), ReplayConfig(run_dir=str(folder), **fields))


def shown(state):
    return {"value": state.value, "items": state.replay.item_state_dict()}


def assert_same(one, other):
    first, second = (json.loads(json.dumps(shown(state), default=lambda part: part.tolist())) for state in (one, other))
    assert first_difference(first, second) is None


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("stop_at", [1, 17, 33])
def test_a_resumed_buffer_draws_the_same_bits(stop_at, prioritised, tmp_path):
    straight = run(tmp_path / "straight", prioritised=prioritised)
    run(tmp_path / "resumed", prioritised=prioritised, stop_at=stop_at)
    resumed = run(tmp_path / "resumed", prioritised=prioritised)
    assert_same(straight, resumed)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("replay/*/*")} for name in MODES]
    assert files[0] == files[1]


MODES = ("straight", "resumed")


def segments_of(folder, step):
    manifest = storage.read_manifest(storage.step_folder(folder / CHECKPOINTS, step))
    return {folder / name: facts["size"] for name, facts in manifest["segments"].items()}


def leave_as_after_a_kill(folder, damage):
    """Files as at a later moment than the checkpoint that a run stopped at, 20: more, or half a record, written."""
    sizes = segments_of(folder, 20)
    last = [path for path in sizes if path == max(path.parent.glob(f"{path.name[:12]}*"))]
    for path in last:
        if damage == "appended":
            with path.open("r+b") as file:
                file.seek(sizes[path])
                file.write(b"x" * 13)
        elif damage == "file not yet at its length":
            os.truncate(path, sizes[path])
        number = int(path.stem[-8:])
        (path.parent / f"{path.stem[:-8]}{number + 1:08d}.bin").write_bytes(b"begun")
    (folder / CHECKPOINTS / ".tmp-step-00000025").mkdir()


@pytest.mark.parametrize("damage", ["appended", "file not yet at its length"])
def test_what_was_written_after_the_checkpoint_is_cut(damage, tmp_path):
    straight = run(tmp_path / "straight")
    run(tmp_path / "killed", stop_at=20)
    leave_as_after_a_kill(tmp_path / "killed", damage)
    assert_same(straight, run(tmp_path / "killed"))


def test_files_that_were_left_before_the_first_checkpoint_are_removed(tmp_path):
    straight = run(tmp_path / "straight")
    left = tmp_path / "killed" / "replay" / "environment-00001" / "transitions-00000000.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 100)
    assert_same(straight, run(tmp_path / "killed"))


@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_a_damaged_segment_is_named_and_the_checkpoint_before_is_used(how, tmp_path):
    straight = run(tmp_path / "straight")
    run(tmp_path / "damaged", stop_at=22, keep=2)
    older, newer = segments_of(tmp_path / "damaged", 20), segments_of(tmp_path / "damaged", 22)
    path = next(path for path in newer if newer[path] > older.get(path, 0) > 0)
    if how == "flipped":
        content = bytearray(path.read_bytes())
        content[newer[path] - 1] ^= 1
        path.write_bytes(content)
    else:
        os.truncate(path, older[path])
    if how == "missing":
        path.unlink()
        with (
            pytest.warns(UserWarning, match="not usable"),
            pytest.raises(CheckpointError, match=f"no usable checkpoint.*{path.name}"),
        ):
            run(tmp_path / "damaged", keep=2)
        return
    with pytest.warns(UserWarning, match=path.name):
        assert_same(straight, run(tmp_path / "damaged", keep=2))


@pytest.mark.parametrize("space_left", [0, 1, 40])
def test_a_full_disk_ends_the_run_with_an_error_and_leaves_the_checkpoint_good(space_left, tmp_path, monkeypatch):
    straight = run(tmp_path / "straight")
    run(tmp_path / "full", stop_at=20)
    write, left = os.write, [space_left]

    def write_until_full(file, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: left[0]]  # as a disk does whose last block this is
        left[0] -= len(part)
        return write(file, part)

    with monkeypatch.context() as patch:
        patch.setattr("lightning_custom.segments.os.write", write_until_full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "full")
    assert_same(straight, run(tmp_path / "full"))


def used_bytes(folder):
    return {path: path.read_bytes() for path in folder.glob("replay/*/*")}


def test_a_save_changes_nothing_that_was_written_and_adds_only_what_was_appended(tmp_path):
    run(tmp_path, stop_at=10, capacity=2000, segment_size=250)
    before, sizes = used_bytes(tmp_path), segments_of(tmp_path, 10)
    record = 8 + 8 + 1 + 8, 3 * 4
    run(tmp_path, stop_at=20, capacity=2000, segment_size=250)
    after, grown = used_bytes(tmp_path), segments_of(tmp_path, 20)
    assert before.keys() == after.keys() == sizes.keys()
    for path, size in sizes.items():
        assert after[path][:size] == before[path][:size]
    transitions = sum(grown[path] - sizes[path] for path in sizes if "transitions" in path.name)
    observations = sum(grown[path] - sizes[path] for path in sizes if "observations" in path.name)
    assert transitions == 20 * record[0]
    assert 20 * record[1] < observations < 30 * record[1]  # and the last of each episode
    checkpoints = [storage.step_folder(tmp_path / CHECKPOINTS, 20) / name for name in ("state.pt", "rank-00000.pt")]
    assert sum(path.stat().st_size for path in checkpoints) < 15000


def test_files_past_the_capacity_stay_while_a_kept_checkpoint_needs_them(tmp_path):
    run(tmp_path, stop_at=10)
    needed = segments_of(tmp_path, 10)
    contents = {path: path.read_bytes()[:size] for path, size in needed.items()}
    run(tmp_path, checkpoint_every=0, stop_at=39)
    # Only the newest is kept, and with it nothing that is older than the capacity.
    assert used_bytes(tmp_path).keys() == segments_of(tmp_path, 39).keys()
    assert not needed.keys() & segments_of(tmp_path, 39).keys()

    run(tmp_path / "two", stop_at=10, keep=2)
    run(tmp_path / "two", checkpoint_every=0, stop_at=39, keep=2)
    kept = {path.relative_to(tmp_path / "two"): path for path in used_bytes(tmp_path / "two")}
    for path, content in contents.items():
        assert kept[path.relative_to(tmp_path)].read_bytes()[: len(content)] == content


def test_a_replayed_step_has_files_of_its_own(tmp_path):
    run(tmp_path, stop_at=20)
    before = used_bytes(tmp_path)
    folder = replay_folder(tmp_path, 21)
    replayed = run(folder, stop_at=21)
    assert_same(replayed, run(tmp_path / "straight", stop_at=21))
    assert used_bytes(tmp_path) == before


def test_environments_that_begin_anew_on_resume_break_no_episode_in_two(tmp_path):
    """A transition before the interruption is followed by what was seen then, and no n-step return goes over it."""
    run(tmp_path, env="outside-noise", stop_at=20, capacity=2000, num_envs=1)
    state = run(tmp_path, env="outside-noise", stop_at=21, capacity=2000, num_envs=1)
    batch = state.replay.sample(400, torch.Generator().manual_seed(0), n_step=3, discount=0.5)
    before, after = (batch.places[1] == number for number in (19, 20))
    assert before.any()
    assert after.any()
    assert set(batch.discounts[before].tolist()) <= {0.5, 0.0}
    assert not torch.equal(batch.next_observations[before][0], batch.observations[after][0])


def test_the_state_of_a_fresh_buffer_loads(tmp_path):
    fabric = single_process()
    envs = EnvironmentVector(fabric, make_countdown, 2, seed=0)
    items = buffer_for(envs, fabric, tmp_path).item_state_dict()
    buffer = buffer_for(envs, fabric, tmp_path)
    buffer.load_item_state_dict(items)
    assert len(buffer) == 0
    with pytest.raises(ConfigError, match="replay: it is empty"):
        buffer.sample(4, torch.Generator())


@pytest.mark.parametrize("prioritised", [False, True])
def test_wrong_settings_are_refused(prioritised, tmp_path):
    envs = EnvironmentVector(single_process(), make_countdown, 2, seed=0)
    with pytest.raises(ConfigError, match="capacity: 1; 2 environments need at least as much"):
        buffer_for(envs, single_process(), tmp_path, capacity=1, prioritised=prioritised)
    with pytest.raises(ConfigError, match="run_dir: none"):
        buffer_for(envs, single_process(), None, prioritised=prioritised)


# Two processes


def run_on_several(fabric, folder):
    found = {}
    for name in ("even", "prioritised"):
        config = ReplayConfig(num_envs=4, env="drift", prioritised=name == "prioritised")
        straight = loop(fabric, dataclasses.replace(config, run_dir=f"{folder}/{name}"))
        own = [int(index) for index in straight.replay.indices]
        found[name] = {"value": straight.value, "own": own, "items": straight.replay.item_state_dict()}
        stop_at = 11 if fabric.world_size == 1 else 23
        loop(fabric, dataclasses.replace(config, run_dir=f"{folder}/{name}-divided", stop_at=stop_at))
    return found


@pytest.mark.distributed
def test_two_processes_draw_what_one_does_and_go_on_with_each_others_buffers(tmp_path):
    one = run_on_several(single_process(), str(tmp_path))
    for name in ("even", "prioritised"):
        (tmp_path / name).rename(tmp_path / f"{name}-one")
    two = in_processes(run_on_several, 2, str(tmp_path))
    assert [part["even"]["own"] for part in two] == [[0, 1], [2, 3]]
    for name in ("even", "prioritised"):
        items = {key: item for part in two for key, item in part[name]["items"].items()}
        assert first_difference(plain(one[name]["items"]), plain(items)) is None
        torch.testing.assert_close(two[0][name]["value"], one[name]["value"], rtol=1e-9, atol=1e-9)
        config = ReplayConfig(num_envs=4, env="drift", prioritised=name == "prioritised")
        with pytest.warns(UserWarning, match="processes: 2 -> 1"):
            divided = loop(single_process(), dataclasses.replace(config, run_dir=str(tmp_path / f"{name}-divided")))
        torch.testing.assert_close(divided.value, one[name]["value"], rtol=1e-9, atol=1e-9)
        assert first_difference(plain(one[name]["items"]), plain(divided.replay.item_state_dict())) is None


def plain(items):
    return json.loads(json.dumps(items, default=lambda part: part.tolist()))


def test_the_files_lie_beside_the_checkpoints(tmp_path):
    run(tmp_path, stop_at=5)
    assert {str(Path(name).parent) for name in relative(tmp_path)} == {
        "replay/environment-00000", "replay/environment-00001"
    }  # fmt: skip


def relative(folder):
    return [str(path.relative_to(folder)) for path in used_bytes(folder)]
