"""Values that are learned are those of the environment; targets and schedules are as written down."""

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.errors import ConfigError
from lightning_custom.testing import single_process
from recipes import dqn, sac
from tests.library.tiny_environments import Pays

# For a discount of a half: for ever 1 + 1/2 + 1/4 + ..., or two rewards and one.
KNOWN = pytest.mark.parametrize("end, expected", [("truncated", [2.0, 2.0]), ("terminated", [1.5, 1.0])])
COMMON: dict[str, Any] = {
    "num_envs": 2, "batch_size": 32, "learning_starts": 16, "capacity": 200, "discount": 0.5, "val_episodes": 2,
    "log_every": 0, "validate_every": 0, "checkpoint_every": 0, "accelerator": "cpu",
}  # fmt: skip


@KNOWN
@pytest.mark.parametrize("n_step", [1, 3])
def test_dqn_learns_what_the_end_of_an_episode_is_worth(end, expected, n_step, tmp_path):
    config = dqn.DQNConfig(
        **COMMON, steps=120, train_every=8, updates=8, lr=0.05, n_step=n_step, double=True, prioritised=n_step > 1,
        run_dir=str(tmp_path),
    )  # fmt: skip
    state = dqn.train(
        single_process(),
        config,
        make_env=lambda index: Pays(end, spaces.Discrete(2, start=5)),
        q_network=nn.Linear(2, 2, bias=False),
    )
    with torch.no_grad():
        values = state.target.module(torch.eye(2)).mean(1)
    assert values.tolist() == pytest.approx(expected, abs=0.02)


@KNOWN
def test_sac_learns_what_the_end_of_an_episode_is_worth(end, expected, tmp_path):
    config = sac.SACConfig(
        **COMMON, steps=150, train_every=2, updates=2, critic_lr=0.02, target_share=0.1, temperature=1e-6, width=16,
        run_dir=str(tmp_path),
    )  # fmt: skip
    bounds = np.array([7, 7, 7], np.float32)
    state = sac.train(single_process(), config, make_env=lambda index: Pays(end, spaces.Box(-bounds, bounds)))
    actions = 2 * torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        values = [state.critics(torch.eye(2)[[i] * 50], actions[i]).mean().item() for i in (0, 1)]
    assert values == pytest.approx(expected, abs=0.1)


# A fresh policy's entropy is near that of the uniform one, 2 log 2 nats in two dimensions.
@pytest.mark.parametrize("target_entropy, moves", [(-2.0, -1), (3.0, 1)])
def test_the_temperature_falls_above_the_target_entropy_and_rises_below(target_entropy, moves, tmp_path):
    config = sac.SACConfig(
        **COMMON | {"learning_starts": 1}, steps=1, temperature_lr=0.01, target_entropy=target_entropy, width=16,
        run_dir=str(tmp_path),
    )  # fmt: skip
    bounds = np.ones(2, np.float32)
    state = sac.train(single_process(), config, make_env=lambda index: Pays("truncated", spaces.Box(-bounds, bounds)))
    # Adam's first step is of the length of the rate.
    assert state.temperature().item() == pytest.approx(np.exp(0.01 * moves), rel=1e-6)
    assert 0 < state.metrics.latest["losses/entropy"] < 2 * np.log(2)


def tabular(values):
    """A network whose values of two actions in three states are the rows of ``values``."""
    return lambda observations: observations @ torch.tensor(values)


@pytest.mark.parametrize("double, following", [(False, [9.0, 6.0]), (True, [8.0, 5.0])])
def test_targets_are_those_of_q_learning_and_of_double_q_learning(double, following):
    eye = torch.eye(3)
    batch = SimpleNamespace(
        observations=eye[[0, 1]], actions=torch.tensor([4, 3]), rewards=torch.tensor([0.5, 2.0]),
        discounts=torch.tensor([0.25, 0.0]), next_observations=eye[[1, 2]],
    )  # fmt: skip
    values = tabular([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0]])
    target_values = tabular([[0.0, 0.0], [8.0, 9.0], [6.0, 5.0]])
    predicted, targets = dqn.predictions_and_targets(
        dqn.DQNConfig(double=double), values, target_values, actions_from=3, batch=batch
    )
    assert predicted.tolist() == [2.0, 3.0]
    assert targets.tolist() == [0.5 + 0.25 * following[0], 2.0]


def test_epsilon_falls_in_a_straight_line_after_the_random_steps():
    config = dqn.DQNConfig(learning_starts=10, epsilon=0.1, epsilon_steps=100)
    found = [dqn.epsilon(config, env_steps) for env_steps in (0, 9, 10, 50, 100, 10**6)]
    assert found == pytest.approx([1.0, 1.0, 0.91, 0.55, 0.1, 0.1])


def test_actions_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Q-learning needs Discrete"):
        dqn.train(single_process(), dqn.DQNConfig(run_dir=str(tmp_path / "a")), make_env=MakeEnvironment("Pendulum-v1"))
    with pytest.raises(ConfigError, match="needs a Box with finite bounds"):
        sac.train(single_process(), sac.SACConfig(run_dir=str(tmp_path / "b")), make_env=MakeEnvironment("CartPole-v1"))


@pytest.mark.parametrize(
    "config, fields, message",
    [
        (dqn.DQNConfig, {"epsilon": 1.5}, "epsilon: 1.5; give a number from 0 to 1"),
        (dqn.DQNConfig, {"n_step": 0}, "n_step: 0; it must be at least 1"),
        (sac.SACConfig, {"temperature": 0.0}, "temperature: 0.0; give a number above 0"),
        (sac.SACConfig, {"target_share": -0.1}, "target_share: -0.1"),
        (sac.SACConfig, {"target_share": 0.0}, "target_share: 0.0; give a number above 0"),
        (
            sac.SACConfig,
            {"temperature": 0.2, "target_entropy": -1.0},
            "target_entropy: -1.0, but the temperature is 0.2",
        ),
        (sac.SACConfig, {"steps": 100}, "learning_starts: 100, but the run has 100 environment steps"),
        (dqn.DQNConfig, {"steps": 3}, "learning_starts: 1000, but the run has 768 environment steps .* no update"),
    ],
)
def test_wrong_settings_are_refused(config, fields, message):
    with pytest.raises(ConfigError, match=message):
        config(**fields)


@pytest.mark.parametrize("recipe", [dqn, sac])
def test_every_preset_is_a_config(recipe):
    kind = dqn.DQNConfig if recipe is dqn else sac.SACConfig
    assert next(kind(**fields) for fields in recipe.PRESETS.values()) == kind()
    assert all(kind(**fields).env in gym.registry for fields in recipe.PRESETS.values())
