"""A network of which nothing is to be trained is refused by its name, before torch says so in its way."""

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
from recipes import (
    adversarial_training,
    classification,
    diffusion,
    dqn,
    gan,
    imaml,
    maml,
    maml_plus_plus,
    multitask,
    ppo,
    recurrent_ppo,
    reinforce,
    reptile,
    sac,
)

DATA = TensorDataset(torch.rand(8, 3), torch.arange(8) % 2)
CARTPOLE, PENDULUM = MakeEnvironment("CartPole-v1"), MakeEnvironment("Pendulum-v1")
CLASSES = {"num_classes": 2}


def frozen(network):
    return network.requires_grad_(False)


def linear():
    return frozen(nn.Linear(3, 2))


def waves():
    return {"model": frozen(nn.Sequential(nn.Linear(1, 1))), "tasks": Sinusoids(5, 5).__call__}


def agent_of(recipe, config):
    env = CARTPOLE()
    return {
        "agent": frozen(recipe.networks(config, env.observation_space, action_distribution(env.action_space))),
        "make_env": CARTPOLE,
    }


def remembering():
    env = CARTPOLE()
    return frozen(recurrent_actor_critic(env.observation_space, action_distribution(env.action_space), width=4))


REFUSED = {
    "classification": (
        "model",
        classification,
        classification.ClassificationConfig,
        lambda _: {"model": linear(), "train_data": DATA, "val_data": DATA, **CLASSES},
    ),
    "without-any": (
        "model",
        classification,
        classification.ClassificationConfig,
        lambda _: {"model": nn.Flatten(), "train_data": DATA, "val_data": DATA, "num_classes": 3},
    ),
    "adversarial_training": (
        "model",
        adversarial_training,
        adversarial_training.AdversarialTrainingConfig,
        lambda _: {"model": linear(), "dataset": DATA, **CLASSES},
    ),
    "diffusion": (
        "denoiser",
        diffusion,
        diffusion.DiffusionConfig,
        lambda _: {"denoiser": linear(), "dataset": DATA},
    ),
    "generator": (
        "generator",
        gan,
        gan.GANConfig,
        lambda _: {"generator": linear(), "discriminator": nn.Linear(3, 1), "dataset": DATA},
    ),
    "discriminator": (
        "discriminator",
        gan,
        gan.GANConfig,
        lambda _: {"generator": nn.Linear(3, 1), "discriminator": linear(), "dataset": DATA},
    ),
    "multitask": (
        "trunk and heads",
        multitask,
        multitask.MultitaskConfig,
        lambda _: {"trunk": linear(), "heads": {"one": linear()}, "data": DATA, "losses": {"one": mse_loss}},
    ),
    "maml": ("model", maml, maml.MAMLConfig, lambda _: waves()),
    "imaml": ("model", imaml, imaml.IMAMLConfig, lambda _: waves()),
    "reptile": ("model", reptile, reptile.ReptileConfig, lambda _: waves()),
    "maml_plus_plus": ("model", maml_plus_plus, maml_plus_plus.MAMLPlusPlusConfig, lambda _: waves()),
    "ppo": ("agent", ppo, ppo.PPOConfig, lambda config: agent_of(ppo, config)),
    "reinforce": ("agent", reinforce, reinforce.ReinforceConfig, lambda config: agent_of(reinforce, config)),
    "recurrent_ppo": (
        "agent",
        recurrent_ppo,
        recurrent_ppo.RecurrentPPOConfig,
        lambda _: {"agent": remembering(), "make_env": CARTPOLE},
    ),
    "dqn": ("q_network", dqn, dqn.DQNConfig, lambda _: {"q_network": linear(), "make_env": CARTPOLE}),
    "sac": ("actor", sac, sac.SACConfig, lambda _: {"actor": linear(), "make_env": PENDULUM}),
    "critics": ("critics", sac, sac.SACConfig, lambda _: {"critics": linear(), "make_env": PENDULUM}),
}


@pytest.mark.parametrize("field, recipe, kind, given", REFUSED.values(), ids=REFUSED)
def test_a_network_without_anything_to_train_is_refused(field, recipe, kind, given, tmp_path):
    config = kind(run_dir=str(tmp_path), accelerator="cpu")
    with pytest.raises(ConfigError, match=f"^{field}: no parameter to train; give a network with some whose requires_"):
        recipe.train(single_process(), config, **given(config))
