from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gymnasium.wrappers.utils import RunningMeanStd

from lightning_custom.environments.normalisation import ObservationNormaliser, RewardScaler, RunningMoments
from lightning_custom.errors import ConfigError
from lightning_custom.state import capture, capture_items, mismatches, restore_
from lightning_custom.testing import first_difference, in_processes
from tests.library.tiny_environments import process, stored


def batches(count=5, shape=(16, 4, 3)):
    rng = np.random.default_rng(0)
    return [rng.normal(loc=7.0, scale=np.array([0.1, 1.0, 30.0]), size=shape).astype(np.float32) for _ in range(count)]


def test_moments_are_those_of_gymnasium():
    moments, peer = RunningMoments(process(), (3,)), RunningMeanStd(shape=(3,))
    for batch in batches():
        moments.update_(batch)
        peer.update(batch.reshape(-1, 3).astype(np.float64))
        np.testing.assert_allclose(moments.mean, peer.mean, rtol=1e-13)
        np.testing.assert_allclose(moments.variance, peer.var, rtol=1e-12)
        assert moments.count == peer.count


def test_moments_are_those_of_everything_seen():
    moments = RunningMoments(process(), (3,))
    for batch in batches():
        moments.update_(batch)
    everything = np.concatenate(batches()).reshape(-1, 3).astype(np.float64)
    # The first count of 1e-4 is of mean 0 and variance 1.
    weight = 1e-4 / (1e-4 + len(everything))
    mean = everything.mean(axis=0) * (1 - weight)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    square = np.square(everything).mean(axis=0) * (1 - weight) + weight
    np.testing.assert_allclose(moments.variance, square - mean**2, rtol=1e-9)


def test_a_large_offset_does_not_cancel():
    samples = 1e8 + np.array([[0.0], [1.0], [2.0]])
    moments = RunningMoments(process(), (1,))
    moments.count = 0.0
    moments.update_(samples)
    assert moments.variance.item() == pytest.approx(2 / 3, rel=1e-12)


def test_observations_have_mean_zero_and_variance_one_and_looking_changes_nothing():
    normaliser = ObservationNormaliser(process(), (3,), clip=2.0)
    samples = batches(1)[0]
    normaliser.update_(samples)
    before = stored(normaliser.state_dict())
    normalised = normaliser(samples)
    assert normalised.dtype == np.float32
    free = np.abs(normalised) < 2.0
    expected = (samples - normaliser.mean) / np.sqrt(normaliser.variance + 1e-8)
    np.testing.assert_allclose(normalised[free], expected[free], rtol=1e-6)
    assert np.abs(normalised).max() == 2.0
    np.testing.assert_allclose(expected.reshape(-1, 3).mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(expected.reshape(-1, 3).std(axis=0), 1, atol=5e-3)
    assert first_difference(before, stored(normaliser.state_dict())) is None


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return():
    """The rule of VecNormalize, written out for one reward after another."""
    rng = np.random.default_rng(1)
    rewards, ended = rng.normal(size=(3, 8, 4)), rng.random((3, 8, 4)) < 0.2
    scaler, peer, returns = RewardScaler(process(), 4, discount=0.9, clip=1.5), RunningMeanStd(), np.zeros(4)
    for rollout, ends in zip(rewards, ended, strict=True):
        scaler.update_(rollout, ends)
        seen = []
        for t in range(8):
            returns = returns * 0.9 + rollout[t]
            seen.extend(returns)
            returns[ends[t]] = 0.0
        peer.update(np.array(seen))
        expected = np.clip(rollout / np.sqrt(peer.var + 1e-8), -1.5, 1.5)
        np.testing.assert_allclose(scaler(rollout), expected, rtol=1e-6)
        np.testing.assert_allclose(scaler.returns, returns, rtol=1e-14)
    assert scaler(np.array([0.0])).item() == 0.0, "the mean is kept"


@dataclass
class State:
    observations: ObservationNormaliser
    rewards: RewardScaler


def state(rank=0, processes=1):
    fabric = process(rank, processes)
    return State(ObservationNormaliser(fabric, (3,)), RewardScaler(fabric, 4, discount=0.9))


def test_a_restored_state_equals_the_stored_one_and_running_returns_are_divided_anew():
    source, target = state(), state()
    source.observations.update_(batches(1)[0])
    source.rewards.update_(np.arange(8.0).reshape(2, 4), np.zeros((2, 4), bool))
    shared, items = stored(capture(source)), stored(capture_items(source))
    assert mismatches(target, shared, items) == []
    restore_(target, shared, items)
    assert first_difference(shared, stored(capture(target))) is None
    assert first_difference(items, stored(capture_items(target))) is None
    target.observations.update_(batches(1)[0])
    assert mismatches(target, shared, items) == [], "updates keep shapes and dtypes"
    second = state(1, 2)
    restore_(second, shared, items)
    assert second.rewards.returns.tolist() == source.rewards.returns[2:].tolist()
    del items["rewards"]["environment-00003"]
    with pytest.raises(ConfigError, match="num_envs: 4, but the checkpoint holds 3 environments; use 3"):
        target.rewards.load_item_state_dict(items["rewards"])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ObservationNormaliser(process(), (3,), clip=0), "clip: 0; give"),
        (lambda: RewardScaler(process(), 4, discount=1.1), "discount: 1.1; give a number from 0 to 1"),
        (lambda: RewardScaler(process(), 3, discount=0.9).load_item_state_dict({}), "num_envs: 3, but"),
        (lambda: RewardScaler(process(0, 2), 3, discount=0.9), "num_envs: 3 does not divide among 2 processes"),
    ],
)
def test_values_that_cannot_be_used_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def work(fabric):
    """Statistics of four environments, of which this process has its share."""
    share = 4 // fabric.world_size
    own = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    normaliser, scaler = ObservationNormaliser(fabric, (3,)), RewardScaler(fabric, 4, discount=0.9)
    alone = RunningMoments(process(), (3,))
    for batch in batches():
        normaliser.update_(batch[:, own])
        alone.update_(batch[:, own])
        scaler.update_(batch[:, own, 2], batch[:, own, 1] > 8)
    return {"normaliser": normaliser.state_dict(), "scaler": scaler.state_dict(), "alone": alone.state_dict()}


@pytest.mark.distributed
def test_several_processes_have_the_statistics_of_one():
    (one,), two = in_processes(work, 1), in_processes(work, 2)
    for part in ("normaliser", "scaler"):
        assert first_difference(two[0][part], two[1][part]) is None
        for name in ("mean", "variance"):
            torch.testing.assert_close(two[0][part][name], one[part][name], rtol=1e-13, atol=0)
        assert two[0][part]["count"] == one[part]["count"]
    assert first_difference(two[0]["alone"], two[1]["alone"]) is not None
