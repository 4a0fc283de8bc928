"""Distributions over actions against torch's, and samples against the probabilities they are to have."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from lightning_custom.action_distributions import action_distribution
from lightning_custom.errors import ConfigError

SPACES = {
    "discrete": spaces.Discrete(5),
    "discrete-from-3": spaces.Discrete(4, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(4),
    "multi-binary-2d": spaces.MultiBinary([2, 3]),
    "box": spaces.Box(-2, 2, (3,), np.float32),
    "box-2d": spaces.Box(-0.5, 0.5, (2, 2), np.float32),
}
every_space = pytest.mark.parametrize("name", SPACES)


def of_torch(space, parameters):
    """Torch's distribution, or several of them that are independent."""
    if isinstance(space, spaces.Discrete):
        return [Categorical(logits=parameters)]
    if isinstance(space, spaces.MultiDiscrete):
        return [Categorical(logits=part) for part in parameters.split(space.nvec.tolist(), 1)]
    if isinstance(space, spaces.MultiBinary):
        return [Independent(Bernoulli(logits=parameters), 1)]
    mean, log_std = parameters.chunk(2, 1)
    return [Independent(Normal(mean, log_std.exp()), 1)]


def drawn(distribution, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = torch.randn(number, distribution.size, generator=generator, dtype=torch.float64)
    return parameters, distribution.sample(parameters.numpy(), distribution.noise((number,), generator))


@every_space
def test_log_probability_and_entropy_are_those_of_torch(name):
    distribution = action_distribution(SPACES[name])
    parameters, actions = drawn(distribution, 50)
    tensor = torch.from_numpy(actions)
    found, entropy = distribution.log_probability_and_entropy(parameters, tensor)
    parts = of_torch(SPACES[name], parameters)
    columns = tensor.unbind(1) if len(parts) > 1 else [tensor.double() if tensor.dtype is torch.int8 else tensor]
    expected = sum(part.log_prob(column) for part, column in zip(parts, columns, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts), rtol=1e-12, atol=1e-12)


@every_space
def test_what_the_environment_is_given_is_in_its_space(name):
    space = SPACES[name]
    distribution = action_distribution(space)
    parameters, actions = drawn(distribution, 100)
    for given in (actions, distribution.mode(parameters.numpy())):
        for action in distribution.to_environment(given):
            assert space.contains(np.asarray(action, dtype=space.dtype))


@pytest.mark.parametrize("shift", [0.0, 500.0])
def test_choices_are_made_as_often_as_their_probability(shift):
    distribution, expected, number = action_distribution(spaces.Discrete(4)), np.array([0.1, 0.2, 0.3, 0.4]), 40_000
    noise = distribution.noise((number,), torch.Generator().manual_seed(0))
    chosen = distribution.sample(np.tile(np.log(expected) + shift, (number, 1)), noise)
    found = np.bincount(chosen, minlength=4) / number
    deviations = np.sqrt(expected * (1 - expected) / number)
    assert (np.abs(found - expected) < 4 * deviations).all()


def test_several_choices_are_independent_and_each_as_likely_as_by_itself():
    distribution, number = action_distribution(spaces.MultiDiscrete([2, 3])), 40_000
    noise = distribution.noise((number,), torch.Generator().manual_seed(0))
    logits = np.log([0.3, 0.7, 0.5, 0.1, 0.4])
    chosen = distribution.sample(np.tile(logits, (number, 1)), noise)
    joint = np.outer([0.3, 0.7], [0.5, 0.1, 0.4]).ravel()
    found = np.bincount(3 * chosen[:, 0] + chosen[:, 1], minlength=6) / number
    assert (np.abs(found - joint) < 4 * np.sqrt(joint * (1 - joint) / number)).all()


def test_bits_are_set_as_often_as_their_probability():
    distribution = action_distribution(spaces.MultiBinary(2))
    logits = np.tile(np.log([0.25 / 0.75, 0.9 / 0.1]), (1000, 1))
    even = np.repeat((np.arange(1000)[:, None] + 0.5) / 1000, 2, 1)
    assert distribution.sample(logits, even).sum(0).tolist() == [250, 900]


def test_numbers_have_the_mean_and_deviation_of_the_policy():
    distribution = action_distribution(spaces.Box(-1, 1, (2,)))
    parameters = np.tile([0.5, -2.0, np.log(0.1), np.log(3.0)], (20000, 1))
    noise = distribution.noise((20000,), torch.Generator().manual_seed(0))
    actions = distribution.sample(parameters, noise)
    assert actions.mean(0) == pytest.approx([0.5, -2.0], abs=0.07)
    assert actions.std(0) == pytest.approx([0.1, 3.0], rel=0.02)


def test_an_action_whose_noise_or_logit_is_infinitely_low_is_not_chosen():
    distribution = action_distribution(spaces.Discrete(3))
    assert distribution.sample(np.zeros((1, 3)), np.array([[-np.inf, -5.0, -np.inf]])).tolist() == [1]
    noise = distribution.noise((1000,), torch.Generator().manual_seed(0))
    assert set(distribution.sample(np.tile([-np.inf, 0.0, 0.0], (1000, 1)), noise).tolist()) == {1, 2}


def test_noise_of_some_environments_is_a_part_of_that_of_all():
    distribution = action_distribution(spaces.MultiDiscrete([3, 2]))
    whole = distribution.noise((5, 8), torch.Generator().manual_seed(0))
    assert whole.shape == (5, 8, 5)
    assert np.array_equal(whole, distribution.noise((5, 8), torch.Generator().manual_seed(0)))


def test_actions_that_are_not_arrays_are_refused():
    with pytest.raises(ConfigError, match="make_env: actions are in Tuple"):
        action_distribution(spaces.Tuple([spaces.Discrete(2)]))
