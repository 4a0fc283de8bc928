"""Squashed normal numbers against torch's own distributions."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from lightning_custom.errors import ConfigError
from lightning_custom.squashed_gaussian import require_bounds, squashed_action, squashed_sample, to_bounds

DRAW = torch.Generator().manual_seed(0)
PARAMETERS = torch.randn(50, 6, generator=DRAW, dtype=torch.float64).clamp(-1.9, 1.9)
NOISE = torch.randn(50, 3, generator=DRAW, dtype=torch.float64)


def test_log_probabilities_are_torchs():
    mean, log_std = PARAMETERS.chunk(2, 1)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    actions, logs = squashed_sample(PARAMETERS, NOISE)
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * NOISE))
    torch.testing.assert_close(logs, Independent(squashed, 1).log_prob(actions), rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_torchs_reparametrised_samples():
    parameters = PARAMETERS.clone().requires_grad_()
    actions, logs = squashed_sample(parameters, NOISE)
    (found,) = torch.autograd.grad((actions.sum(1) - 0.3 * logs).sum(), parameters)

    mean, log_std = parameters.chunk(2, 1)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    unbounded = mean + log_std.exp() * NOISE
    actions = squashed.transforms[0](unbounded)
    (expected,) = torch.autograd.grad((actions - 0.3 * squashed.log_prob(actions)).sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_log_probabilities_far_out_are_finite_in_float32_and_right():
    parameters, noise = torch.tensor([[15.0, 0.0], [-40.0, -1.0]]), torch.zeros(2, 1)
    _, logs = squashed_sample(parameters, noise)
    # log(1 - tanh(u)^2) = log 4 - 2 |u| there.
    expected = [-0.5 * np.log(2 * np.pi) - (np.log(4) - 30), 1 - 0.5 * np.log(2 * np.pi) - (np.log(4) - 80)]
    assert logs.tolist() == pytest.approx(expected, rel=1e-6)


def test_standard_deviations_are_cut():
    low, high = (squashed_sample(torch.tensor([[0.0, log]]), torch.ones(1, 1))[0] for log in (-99.0, 99.0))
    assert low.item() == pytest.approx(np.exp(-20), rel=1e-5)
    assert high.item() == pytest.approx(np.tanh(np.exp(2)), rel=1e-6)


def test_numpys_actions_are_torchs():
    parameters, noise = 9 * PARAMETERS.numpy(), NOISE.numpy()
    sampled, _ = squashed_sample(9 * PARAMETERS, NOISE)
    np.testing.assert_allclose(squashed_action(parameters, noise), sampled.numpy(), rtol=1e-12)
    np.testing.assert_allclose(squashed_action(parameters), np.tanh(parameters[:, :3]), rtol=1e-12)


def test_actions_are_stretched_to_the_bounds():
    low, high = np.array([[-1, 0]], np.float32), np.array([[3, 10]], np.float32)
    space = spaces.Box(low, high)
    stretched = to_bounds(np.array([[-1.0, 1.0], [0.0, -0.5]]), space)
    assert stretched.tolist() == [[[-1.0, 10.0]], [[1.0, 2.5]]]
    assert stretched.dtype == np.float32


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-np.inf, 1, (2,))])
def test_other_spaces_are_refused(space):
    with pytest.raises(ConfigError, match="needs a Box with finite bounds"):
        require_bounds(space)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturated_actions_stay_within_the_bounds(dtype):
    draw, outside = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = np.sort(draw.normal(size=(2, 1)), axis=0).astype(np.float32)
        space = spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype)
        for action, bound in ((-1, space.low), (1, space.high)):
            found = to_bounds(np.full((1, 1), action, np.float32), space)
            assert space.contains(found[0])
            assert found[0] == pytest.approx(bound, abs=1e-6)
        outside += int((low + (high - low) > high).sum())
    assert outside > 0, "no draw would have left the bounds"
