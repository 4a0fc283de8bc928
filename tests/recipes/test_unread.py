"""Settings that nothing reads are refused where they were changed, and only there."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import TensorDataset

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.aggregators import UPGrad
from lightning_custom.testing import single_process
from recipes import (
    adversarial_training,
    classification,
    diffusion,
    dqn,
    gan,
    maml_plus_plus,
    multitask,
    reinforce,
)

AdversarialTraining = adversarial_training.AdversarialTrainingConfig
Classification, Diffusion = classification.ClassificationConfig, diffusion.DiffusionConfig
DQN, GAN = dqn.DQNConfig, gan.GANConfig
MAMLPlusPlus, Multitask = maml_plus_plus.MAMLPlusPlusConfig, multitask.MultitaskConfig

# The config, a field and a value that nothing reads, what the message says, and the fields with which it is read.
UNREAD = [
    (AdversarialTraining, {"beta": 3.0}, "madry has no divergence to weigh; use loss trades or mart", {"loss": "mart"}),
    (AdversarialTraining, {"eps_warmup": 4, "attack_steps": 0}, "attack_steps is 0; use more", {"attack_steps": 1}),
    (Classification, {"average_decay": 0.9}, "average is none; use average ema", {"average": "ema"}),
    (Classification, {"average_decay": 0.9, "average": "swa"}, "average is swa; use average ema", {"average": "ema"}),
    (Classification, {"average_start": 9}, "nothing is averaged; set average", {"average": "swa"}),
    (Classification, {"decay_steps": 9, "schedule": "constant"}, "the schedule is constant", {"schedule": "cosine"}),
    (Classification, {"patience": 3, "validate_every": 0}, "the only validation is the last", {"validate_every": 5}),
    (Diffusion, {"decay_steps": 9, "schedule": "constant"}, "the schedule is constant", {"schedule": "cosine"}),
    (Diffusion, {"label_dropout": 0.3, "num_classes": 0}, "num_classes is 0, so that nothing", {"num_classes": 3}),
    (Diffusion, {"guidance": 0.3, "num_classes": 0}, "num_classes is 0, so that nothing", {"num_classes": 3}),
    (DQN, {"priority_exponent": 0.5}, "transitions are drawn alike; set prioritised", {"prioritised": True}),
    (DQN, {"importance_exponent": 0.5}, "transitions are drawn alike; set prioritised", {"prioritised": True}),
    (GAN, {"dragan_std": 0.5}, "dragan has no weight; set dragan", {"dragan": 10.0}),
    (GAN, {"penalty_every": 2, "r1": 0.0, "r2": 0.0}, "no penalty has a weight; set r1", {"r1": 1.0}),
    (GAN, {"ada_every": 2}, "nothing is augmented; set ada", {"ada": ("blit",), "loss": "hinge"}),
    (GAN, {"ada_images": 9.0}, "nothing is augmented; set ada", {"ada": ("blit",), "loss": "hinge"}),
    (
        GAN,
        {"ada_target": 0.5, "ada": ("blit",), "ada_images": 0.0},
        "ada_images is 0, and the probability stays; set that above 0",
        {"ada_images": 9.0, "loss": "hinge"},
    ),
    (GAN, {"conditioning": "projection", "num_classes": 0}, "num_classes is 0; set that", {"num_classes": 3}),
    (MAMLPlusPlus, {"min_lr": 1e-4, "schedule": "constant"}, "the schedule is constant", {"schedule": "cosine"}),
    (
        MAMLPlusPlus,
        {"anneal_steps": 9, "schedule": "constant", "multi_step_share": 0.0},
        "the schedule is constant; use cosine",
        {"first_order_share": 0.1},
    ),
    (
        Multitask,
        {"batched_backward": True, "gradients": "features"},
        "features need no such pass; use gradients exact",
        {"gradients": "exact"},
    ),
    (
        reinforce.ReinforceConfig,
        {"value_coefficient": 1.0, "baseline": False},
        "there is no baseline",
        {"baseline": True},
    ),
]


@pytest.mark.parametrize("kind, fields, reason, remedy", UNREAD)
def test_a_setting_that_nothing_reads_is_refused_with_what_would_read_it(kind, fields, reason, remedy):
    name, value = next(iter(fields.items()))
    with pytest.raises(ConfigError, match=f"^{name}: {value}, but {reason}"):
        kind(**fields)
    assert getattr(kind(**fields | remedy), name) == value
    assert kind(**fields | {name: kind.__dataclass_fields__[name].default}) is not None


@pytest.mark.parametrize(
    "kind, fields",
    [(AdversarialTraining, {"beta": 0.0}), (Diffusion, {"num_classes": 0, "guidance": 0.0, "label_dropout": 0.0})],
)
def test_what_is_switched_off_may_be_said_where_it_is_off_anyway(kind, fields):
    assert all(getattr(kind(**fields), name) == 0 for name in fields)


DATA = TensorDataset(torch.rand(8, 3), torch.arange(8) % 2)


@pytest.mark.parametrize(
    "fields, own, message",
    [
        ({"label_smoothing": 0.1}, {"loss": cross_entropy}, "label_smoothing: 0.1, but the loss is your own; smooth"),
        ({"optimizer": "sgd"}, {"optimizer": SGD}, "optimizer: sgd, but the optimizer is your own; set it there"),
        ({"weight_decay": 0.1}, {"optimizer": SGD}, "weight_decay: 0.1, but the optimizer is your own; set it there"),
    ],
)
def test_a_setting_of_what_classification_is_given_is_refused(tmp_path, fields, own, message):
    config = Classification(run_dir=str(tmp_path), **fields)
    data = {"model": nn.Linear(3, 2), "train_data": DATA, "val_data": DATA, "num_classes": 2}
    with pytest.raises(ConfigError, match=f"^{message}"):
        classification.train(single_process(), config, **data, **own)


def test_a_setting_of_what_adversarial_training_is_given_is_refused(tmp_path):
    config = AdversarialTraining(run_dir=str(tmp_path), weight_decay=0.1)
    data = {"model": nn.Linear(3, 2), "dataset": DATA, "num_classes": 2}
    with pytest.raises(ConfigError, match=r"^weight_decay: 0\.1, but the optimizer is your own; set it there"):
        adversarial_training.train(single_process(), config, **data, optimizer=SGD)


@pytest.mark.parametrize(
    "fields, own, message",
    [
        (
            {"method_options": {"c": 1}},
            {"method": UPGrad()},
            "method_options: .*, but the method is your own; set them",
        ),
        ({"weight_decay": 0.1}, {"optimizer": SGD}, "weight_decay: 0.1, but the optimizer is your own; set it there"),
    ],
)
def test_a_setting_of_what_multitask_is_given_is_refused(tmp_path, fields, own, message):
    config = Multitask(run_dir=str(tmp_path), **fields)
    parts = {"trunk": nn.Linear(3, 2), "heads": {"one": nn.Identity()}, "losses": {"one": cross_entropy}}
    with pytest.raises(ConfigError, match=f"^{message}"):
        multitask.train(single_process(), config, data=DATA, **parts, **own)
