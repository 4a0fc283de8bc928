"""``recipes.gan.train`` with networks and data of one's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_custom.errors import ConfigError
from lightning_custom.testing import assert_resumes_exactly, first_difference, single_process
from recipes.gan import GANConfig, train

CENTRES = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])
CONFIG = GANConfig(
    steps=600, log_every=200, validate_every=0, checkpoint_every=0, batch_size=60, latent_size=2, num_classes=3,
    g_lr=3e-3, d_lr=3e-3, r1=0.1, r2=0.1, ema_half_life=3000.0,
)  # fmt: skip


class Generator(nn.Module):
    """Latents and labels to points of the plane: no pictures."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.embed = nn.Embedding(max(num_classes, 1), 16)
        self.layers = nn.Sequential(nn.Linear(2 + 16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, latent, label=None):
        label = latent.new_zeros(len(latent), dtype=torch.long) if label is None else label
        return self.layers(torch.cat([latent, self.embed(label)], dim=1))


class Discriminator(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Softplus(), nn.Linear(32, max(num_classes, 1), bias=False))

    def forward(self, point, label=None):
        logits = self.layers(point)
        return logits[:, 0] if label is None else logits.gather(1, label.unsqueeze(1)).squeeze(1)


class Points(Dataset):
    """A point near the centre of each label, in turn: a map-style dataset that is no TensorDataset."""

    def __init__(self, labelled=True):
        self.labelled = labelled
        self.noise = 0.2 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.noise)

    def __getitem__(self, index):
        point = CENTRES[index % 3] + self.noise[index]
        return (point, index % 3) if self.labelled else point


class EndlessBatches:
    """An iterable of batches that knows its place, as torchdata's loaders do."""

    def __init__(self, batch_size=60):
        self.batch_size, self.place = batch_size, 0

    def __iter__(self):
        while True:
            draw = torch.Generator().manual_seed(self.place)
            label = torch.randint(3, (self.batch_size,), generator=draw)
            self.place += 1
            yield CENTRES[label] + 0.2 * torch.randn(self.batch_size, 2, generator=draw), label

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def train_on_points(fabric, config, dataset):
    torch.manual_seed(0)
    networks = {"generator": Generator(config.num_classes), "discriminator": Discriminator(config.num_classes)}
    return train(fabric, config, **networks, dataset=dataset)


def train_on_stream(fabric, config):
    return train_on_points(fabric, config, EndlessBatches(config.batch_size))


def generated_points(state, config, label=None):
    latents = torch.randn(500, config.latent_size, generator=torch.Generator().manual_seed(1))
    labels = () if label is None else (torch.full((500,), label),)
    with torch.no_grad():
        return state.average.module(latents, *labels)


@pytest.mark.slow
@pytest.mark.parametrize("make_dataset", [Points, EndlessBatches])
def test_generated_points_of_each_label_lie_where_the_data_of_the_label_lies(make_dataset, tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path))
    state = train_on_points(single_process(), config, make_dataset())
    for label, centre in enumerate(CENTRES):
        points = generated_points(state, config, label)
        torch.testing.assert_close(points.mean(0), centre, atol=0.3, rtol=0)
        assert points.std(0).max() < 0.6


@pytest.mark.slow
def test_without_labels_generated_points_have_the_mean_and_spread_of_all_data(tmp_path):
    config = replace(CONFIG, num_classes=0, run_dir=str(tmp_path))
    dataset = Points(labelled=False)
    state = train_on_points(single_process(), config, dataset)
    points, data = generated_points(state, config), torch.stack([dataset[i] for i in range(len(dataset))])
    torch.testing.assert_close(points.mean(0), data.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(points.std(0), data.std(0), atol=0.5, rtol=0)


def test_an_unconditional_run_ignores_the_labels_of_a_labelled_dataset(tmp_path):
    states = []
    for labelled in (True, False):
        config = replace(CONFIG, num_classes=0, steps=5, run_dir=str(tmp_path / str(labelled)))
        states.append(train_on_points(single_process(), config, Points(labelled)))
    assert first_difference(*(state.generator.state_dict() for state in states)) is None


def test_a_stream_with_a_state_resumes_exactly(tmp_path):
    config = replace(CONFIG, steps=12, log_every=4)
    assert_resumes_exactly(train_on_stream, config, stop_at=7, folder=tmp_path)


def test_labels_that_the_dataset_has_not_are_refused(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="num_classes: 3, but the dataset has no labels; set it to 0"):
        train_on_points(single_process(), config, Points(labelled=False))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_batches_of_another_size_are_refused(num_classes, tmp_path):
    config = replace(CONFIG, num_classes=num_classes, run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="batch_size: 60 over 1 processes, but the dataset yields batches of 20"):
        train_on_points(single_process(), config, EndlessBatches(batch_size=20))
