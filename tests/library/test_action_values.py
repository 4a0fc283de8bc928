import numpy as np
import pytest
import torch
from gymnasium import spaces

from lightning_custom.action_values import TwinCritics, q_network, squashed_gaussian_policy

NUMBERS = spaces.Box(-1, 1, (3,), np.float32)
MIXED = spaces.Dict(place=NUMBERS, kind=spaces.Discrete(4))
FRAMES = spaces.Box(0, 255, (4, 84, 84), np.uint8)
OBSERVATIONS = {
    "numbers": (NUMBERS, torch.randn(5, 3)),
    "mixed": (MIXED, {"place": torch.randn(5, 3), "kind": torch.tensor([0, 1, 2, 3, 0])}),
    "frames": (FRAMES, torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
@pytest.mark.parametrize("dueling", [False, True])
def test_every_action_gets_a_value_that_every_parameter_matters_for(name, dueling):
    space, observations = OBSERVATIONS[name]
    torch.manual_seed(0)
    network = q_network(space, 2, width=8, dueling=dueling)
    values = network(observations)
    assert values.shape == (5, 2)
    (values[:, 0] ** 2).sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters() if parameter.dim() > 1)


def test_dueling_values_are_those_of_the_state_and_centred_advantages():
    torch.manual_seed(0)
    network = q_network(NUMBERS, 4, width=8, dueling=True)
    observations = torch.randn(6, 3)
    head = network[-1]
    features = network[:-1](observations)
    values, advantages = head.value(features), head.advantages(features)
    torch.testing.assert_close(network(observations), values + advantages - advantages.mean(1, keepdim=True))
    torch.testing.assert_close(network(observations).mean(1, keepdim=True), values)


def test_critics_are_apart_and_see_the_action():
    torch.manual_seed(0)
    critics = TwinCritics(MIXED, 2, width=8)
    observations, actions = OBSERVATIONS["mixed"][1], torch.randn(5, 2, requires_grad=True)
    estimates = critics(observations, actions)
    assert estimates.shape == (2, 5)
    estimates[0].sum().backward()
    assert actions.grad.any(0).all()
    grads = [[parameter.grad for parameter in critic.parameters()] for critic in critics.critics]
    assert all(grad.any() for grad in grads[0])
    assert not any(grad.any() for grad in grads[1])


def test_a_policy_gives_means_and_deviations():
    assert squashed_gaussian_policy(NUMBERS, 2, width=8)(OBSERVATIONS["numbers"][1]).shape == (5, 4)
