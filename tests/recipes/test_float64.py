"""Data sets of float64, as NumPy makes them, train the same networks as those of float32."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

from lightning_custom.denoisers import MLPDenoiser
from lightning_custom.networks import MLPDiscriminator, MLPGenerator
from lightning_custom.precision import unwrap
from lightning_custom.testing import single_process
from recipes import adversarial_training, classification, diffusion, gan, multitask

SHAPE = (1, 4, 4)


class Pictures(Dataset):
    """(picture, label), or with a place (picture, targets by task)."""

    def __init__(self, dtype, *, places=False):
        self.dtype, self.places = dtype, places

    def __len__(self):
        return 16

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        # Numbers that both types have.
        picture = rng.random(SHAPE, dtype=np.float32).astype(self.dtype)
        return picture, {"place": picture.mean(dtype=np.float32).astype(self.dtype)} if self.places else index % 2


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def classified(fabric, fields, dtype):
    data, config = Pictures(dtype), classification.ClassificationConfig(**fields)
    return classification.train(fabric, config, model=classifier(), train_data=data, val_data=data, num_classes=2).model


def attacked(fabric, fields, dtype):
    data, config = Pictures(dtype), adversarial_training.AdversarialTrainingConfig(**fields)
    return adversarial_training.train(
        fabric, config, model=classifier(), dataset=data, val_data=data, num_classes=2
    ).model


def denoised(fabric, fields, dtype):
    torch.manual_seed(0)
    network = MLPDenoiser(2, SHAPE, 8, 1, self_conditioning=True)
    config = diffusion.DiffusionConfig(**fields, num_classes=2)
    return diffusion.train(fabric, config, denoiser=network, dataset=Pictures(dtype)).denoiser


def generated(fabric, fields, dtype):
    torch.manual_seed(0)
    networks = {"generator": MLPGenerator(4, 2, SHAPE, 8), "discriminator": MLPDiscriminator(2, SHAPE, 8)}
    config = gan.GANConfig(**fields, num_classes=2, latent_size=4)
    return gan.train(fabric, config, **networks, dataset=Pictures(dtype)).generator


def of_several_tasks(fabric, fields, dtype):
    trunk, heads = classifier(), {"place": nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))}
    data, config = Pictures(dtype, places=True), multitask.MultitaskConfig(**fields)
    return multitask.train(
        fabric, config, trunk=trunk, heads=heads, data=data, val_data=data, losses={"place": mse_loss}
    ).trunk


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("train", [classified, attacked, denoised, generated, of_several_tasks])
def test_float64_and_float32_train_the_same_network(train, precision, tmp_path):
    networks = []
    for dtype in (np.float32, np.float64):
        fields = {"steps": 3, "batch_size": 8, "run_dir": str(tmp_path / np.dtype(dtype).name)}
        network = train(single_process(precision), fields, dtype)
        networks.append(torch.cat([part.detach().flatten() for part in unwrap(network).parameters()]))
    assert torch.equal(*networks)
    assert networks[0].dtype is torch.float32
