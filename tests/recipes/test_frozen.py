"""A network of which nothing is to be trained is refused by its name, before torch says so in its way."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from lightning_custom.action_distributions import action_distribution
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.errors import ConfigError
from lightning_custom.recurrent import recurrent_actor_critic
from lightning_custom.tasks import Sinusoids
from lightning_custom.testing import single_process
from tests.recipes.cases import CASES

RECIPES = {case.name: (importlib.import_module(case.module), type(case.preset)) for case in CASES}
DATA = TensorDataset(torch.rand(8, 3), torch.arange(8) % 2)
CARTPOLE, PENDULUM = MakeEnvironment("CartPole-v1"), MakeEnvironment("Pendulum-v1")
CLASSES = {"num_classes": 2}


def frozen(network):
    return network.requires_grad_(False)


def linear():
    return frozen(nn.Linear(3, 2))


def waves():
    return {"model": frozen(nn.Sequential(nn.Linear(1, 1))), "tasks": Sinusoids(5, 5).__call__}


def agent_of(name, config):
    (recipe, _), env = RECIPES[name], CARTPOLE()
    return {
        "agent": frozen(recipe.networks(config, env.observation_space, action_distribution(env.action_space))),
        "make_env": CARTPOLE,
    }


def remembering():
    env = CARTPOLE()
    return frozen(recurrent_actor_critic(env.observation_space, action_distribution(env.action_space), width=4))


# The recipe, what is frozen, and what it is given.
REFUSED = [
    ("classification", "model", lambda _: {"model": linear(), "train_data": DATA, "val_data": DATA, **CLASSES}),
    ("classification", "model", lambda _: {"model": nn.Flatten(), "train_data": DATA, "val_data": DATA, **CLASSES}),
    ("adversarial_training", "model", lambda _: {"model": linear(), "dataset": DATA, **CLASSES}),
    ("diffusion", "denoiser", lambda _: {"denoiser": linear(), "dataset": DATA}),
    (
        "gan",
        "generator",
        lambda _: {"generator": linear(), "discriminator": nn.Linear(3, 1), "dataset": DATA},
    ),
    (
        "gan",
        "discriminator",
        lambda _: {"generator": nn.Linear(3, 1), "discriminator": linear(), "dataset": DATA},
    ),
    (
        "multitask",
        "trunk and heads",
        lambda _: {"trunk": linear(), "heads": {"one": linear()}, "data": DATA, "losses": {"one": mse_loss}},
    ),
    *((name, "model", lambda _: waves()) for name in ("maml", "imaml", "reptile", "maml_plus_plus")),
    ("ppo", "agent", lambda config: agent_of("ppo", config)),
    ("reinforce", "agent", lambda config: agent_of("reinforce", config)),
    ("recurrent_ppo", "agent", lambda _: {"agent": remembering(), "make_env": CARTPOLE}),
    ("dqn", "q_network", lambda _: {"q_network": linear(), "make_env": CARTPOLE}),
    ("sac", "actor", lambda _: {"actor": linear(), "make_env": PENDULUM}),
    ("sac", "critics", lambda _: {"critics": linear(), "make_env": PENDULUM}),
]


def test_every_recipe_is_here():
    assert {name for name, _, _ in REFUSED} == set(RECIPES)


@pytest.mark.parametrize("name, field, given", REFUSED)
def test_a_network_without_anything_to_train_is_refused(name, field, given, tmp_path):
    recipe, kind = RECIPES[name]
    config = kind(run_dir=str(tmp_path), accelerator="cpu")
    with pytest.raises(ConfigError, match=f"^{field}: no parameter to train; give a network with some whose requires_"):
        recipe.train(single_process(), config, **given(config))
