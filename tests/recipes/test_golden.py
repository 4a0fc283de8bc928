"""The first losses of each default preset, at full precision: no change of numbers goes unseen.

They are equal to the bit on the machine that made them and close elsewhere. A change that is meant is made known by
``pytest tests/recipes/test_golden.py --renew-golden``.
"""

import json
import platform
from pathlib import Path

import pytest
import torch

from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.machine import machine_facts
from lightning_custom.metrics import read_rows
from lightning_custom.networks import ConvClassifier
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

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 20


def train_gan(fabric, run_dir):
    config = gan.GANConfig(**gan.PRESETS["digits"], run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    data = gan.load_data(config)
    generator, discriminator = gan.networks(config, data)
    gan.train(fabric, config, generator=generator, discriminator=discriminator, dataset=data.dataset())
    return config


def train_diffusion(fabric, run_dir):
    config = diffusion.DiffusionConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    data = diffusion.load_data(config)
    diffusion.train(fabric, config, denoiser=diffusion.network(config, data.images.shape[1:]), dataset=data.dataset())
    return config


def train_classification(fabric, run_dir):
    config = classification.ClassificationConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    data, val, _ = classification.load_data(config)
    torch.manual_seed(config.seed)
    model = ConvClassifier(1, 8, data.num_classes, config.width)
    classification.train(
        fabric, config, model=model, train_data=data.dataset(), val_data=val.dataset(), num_classes=data.num_classes
    )
    return config


def train_adversarial_training(fabric, run_dir):
    config = adversarial_training.AdversarialTrainingConfig(
        run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu"
    )
    data, val, _ = adversarial_training.load_data(config)
    model, num_classes = adversarial_training.network(config, data), data.num_classes
    adversarial_training.train(
        fabric, config, model=model, dataset=data.dataset(), num_classes=num_classes, val_data=val.dataset()
    )
    return config


def train_maml(fabric, run_dir):
    config = maml.MAMLConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    maml.train(fabric, config, model=maml.network(config), tasks=Sinusoids(config.shots, config.query_shots))
    return config


def train_maml_plus_plus(fabric, run_dir):
    config = maml_plus_plus.MAMLPlusPlusConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    waves = Sinusoids(config.shots, config.query_shots)
    maml_plus_plus.train(fabric, config, model=maml_plus_plus.network(config), tasks=waves)
    return config


def train_reptile(fabric, run_dir):
    config = reptile.ReptileConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    waves = Sinusoids(1, config.train_shots - 1)
    reptile.train(fabric, config, model=reptile.network(config), tasks=waves)
    return config


def train_imaml(fabric, run_dir):
    config = imaml.IMAMLConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    imaml.train(fabric, config, model=imaml.network(config), tasks=Sinusoids(config.shots, config.query_shots))
    return config


def train_multitask(fabric, run_dir):
    config = multitask.MultitaskConfig(
        **multitask.PRESETS["digits"], run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu"
    )
    data, _, _ = multitask.load_data(config)
    trunk, heads = multitask.networks(config, data)
    losses = dict.fromkeys(heads, multitask.sample_entropies)
    multitask.train(fabric, config, trunk=trunk, heads=heads, data=multitask.dataset(config, data), losses=losses)
    return config


def train_dqn(fabric, run_dir):
    config = dqn.DQNConfig(
        run_dir=str(run_dir), stop_at=STEPS, log_every=1, validate_every=0, accelerator="cpu",
        train_every=16, updates=2, learning_starts=0,
    )  # fmt: skip
    dqn.train(fabric, config, make_env=MakeEnvironment(config.env))
    return config


def train_sac(fabric, run_dir):
    config = sac.SACConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu", learning_starts=0)
    sac.train(fabric, config, make_env=MakeEnvironment(config.env))
    return config


def train_ppo(fabric, run_dir):
    config = ppo.PPOConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    ppo.train(fabric, config, make_env=MakeEnvironment(config.env))
    return config


def train_recurrent_ppo(fabric, run_dir):
    config = recurrent_ppo.RecurrentPPOConfig(
        run_dir=str(run_dir), stop_at=STEPS, log_every=1, validate_every=0, accelerator="cpu"
    )
    recurrent_ppo.train(fabric, config, make_env=MakeEnvironment(config.env, hide=recurrent_ppo.hidden(config)))
    return config


def train_reinforce(fabric, run_dir):
    config = reinforce.ReinforceConfig(run_dir=str(run_dir), stop_at=STEPS, log_every=1, accelerator="cpu")
    reinforce.train(fabric, config, make_env=MakeEnvironment(config.env))
    return config


RECIPES = {
    "gan": train_gan,
    "diffusion": train_diffusion,
    "classification": train_classification,
    "adversarial_training": train_adversarial_training,
    "maml": train_maml,
    "maml_plus_plus": train_maml_plus_plus,
    "reptile": train_reptile,
    "imaml": train_imaml,
    "multitask": train_multitask,
    "ppo": train_ppo,
    "recurrent_ppo": train_recurrent_ppo,
    "reinforce": train_reinforce,
    "dqn": train_dqn,
    "sac": train_sac,
}


def processor():
    """The model of the CPU: libraries choose their kernels by it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_losses_of_the_default_preset_are_those_on_record(recipe, tmp_path, request):
    torch.set_num_threads(1)
    fabric = single_process()
    config = RECIPES[recipe](fabric, tmp_path)
    rows = [{tag: value for tag, value in row.items() if "loss" in tag} for row in read_rows(tmp_path)]
    rows = [row for row in rows if row]
    found = {"machine": {**machine_facts(fabric, config), "processor": processor()}, "losses": rows}
    path = GOLDEN / f"{recipe}.json"
    if request.config.getoption("--renew-golden", default=False):
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert len(rows) == STEPS
    if golden["machine"] == found["machine"]:
        assert rows == golden["losses"]
    else:
        assert rows == [pytest.approx(row, rel=1e-5) for row in golden["losses"]]
