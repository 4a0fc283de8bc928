"""Networks of policies and values: how they begin, and what they take."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lightning_custom.action_distributions import action_distribution
from lightning_custom.errors import ConfigError
from lightning_custom.policies import Features, PictureTrunk, actor_critic, mlp


def test_weights_are_orthogonal_with_their_gain_and_biases_zero():
    torch.manual_seed(0)
    layers = [layer for layer in mlp(8, 3, width=16, gain=0.01) if isinstance(layer, torch.nn.Linear)]
    for layer, gain in zip(layers, [math.sqrt(2), math.sqrt(2), 0.01], strict=True):
        weight = layer.weight.detach()
        product = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), rtol=0, atol=1e-5)
        assert layer.bias.abs().max() == 0


MIXED = spaces.Dict(
    choice=spaces.Discrete(3, start=-1),
    choices=spaces.MultiDiscrete([2, 4]),
    bits=spaces.MultiBinary(3),
    numbers=spaces.Box(-1, 1, (2, 2), np.float32),
)


def test_features_are_those_of_gymnasiums_flatten():
    MIXED.seed(0)
    samples = [MIXED.sample() for _ in range(20)]
    batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in MIXED.spaces}
    found = Features(MIXED)(batch)
    expected = np.stack([spaces.flatten(MIXED, sample) for sample in samples])
    assert Features(MIXED).size == expected.shape[1]
    np.testing.assert_allclose(found.numpy(), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("actions", [spaces.Discrete(4), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize(
    "observations", [spaces.Box(-1, 1, (5,)), spaces.Discrete(7), MIXED], ids=["box", "one", "dict"]
)
def test_the_usual_networks_begin_nearly_indifferent(observations, actions, shared):
    torch.manual_seed(0)
    distribution = action_distribution(actions)
    agent = actor_critic(observations, distribution, width=32, shared=shared, log_std=-0.5)
    observations.seed(0)
    samples = [observations.sample() for _ in range(6)]
    batch = (
        {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in observations.spaces}
        if isinstance(observations, spaces.Dict)
        else torch.from_numpy(np.stack(samples))
    )
    parameters, values = agent(batch)
    assert (parameters.shape, values.shape) == ((6, distribution.size), (6,))
    torch.testing.assert_close(agent.actor(batch), parameters)
    mean = parameters if isinstance(actions, spaces.Discrete) else parameters[:, :2]
    assert mean.detach().abs().max() < 0.05
    if isinstance(actions, spaces.Box):
        assert torch.equal(parameters[:, 2:], torch.full((6, 2), -0.5))


def test_frames_go_through_one_trunk_in_shares_of_255():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    agent = actor_critic(space, action_distribution(spaces.Discrete(6)))
    assert isinstance(agent.trunk, PictureTrunk)
    frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    parameters, values = agent(frames)
    assert (parameters.shape, values.shape) == ((2, 6), (2,))
    expected = torch.nn.Sequential.forward(agent.trunk, frames / 255)
    torch.testing.assert_close(agent.trunk(frames), expected)


def test_frames_go_through_the_trunk_channels_last():
    trunk, seen = PictureTrunk(), []
    for layer in list(trunk)[:6]:
        layer.register_forward_hook(lambda _, inputs, features: seen.extend([inputs[0], features]))
    trunk(torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8))
    assert len(seen) == 12
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in seen)


def test_pictures_of_another_size_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match=r"\(3, 64, 64\).*AtariPreprocessing"):
        actor_critic(spaces.Box(0, 255, (3, 64, 64), np.uint8), action_distribution(spaces.Discrete(2)))
