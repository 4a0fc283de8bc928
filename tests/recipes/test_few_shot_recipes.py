"""What the recipes of few-shot learning do alike with a user's own networks, tasks and losses."""

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, poisson_nll_loss
from torch.utils.data import Dataset

from lightning_custom.data import Batches
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.precision import unwrap
from lightning_custom.task_batching import per_task
from lightning_custom.tasks import Sinusoids
from lightning_custom.testing import single_process
from recipes import imaml, maml, maml_plus_plus, reptile

WAVES = Sinusoids(3, 4)
CONFIGS = {
    maml: maml.MAMLConfig,
    maml_plus_plus: maml_plus_plus.MAMLPlusPlusConfig,
    reptile: reptile.ReptileConfig,
    imaml: imaml.IMAMLConfig,
}
every_recipe = pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.__name__.rpartition(".")[2])


def config_of(recipe, folder, **fields):
    small = {"steps": 2, "log_every": 1, "meta_batch_size": 4, "inner_steps": 2, "test_steps": 2, "val_tasks": 4}
    return CONFIGS[recipe](**{**small, "accelerator": "cpu", "run_dir": str(folder), **fields})


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def flat(state):
    return torch.cat([part.detach().flatten() for part in state.model.parameters()])


@every_recipe
def test_held_out_tasks_are_scored_and_pictured_without_dropout(recipe, tmp_path, monkeypatch):
    config, fabric = config_of(recipe, tmp_path), single_process()
    state = recipe.train(fabric, config, model=with_dropout(), tasks=WAVES.__call__)
    scores, pictures = [], []
    monkeypatch.setattr(state.metrics, "image", lambda step, tag, picture: pictures.append(picture))
    for seed in (0, 1):
        torch.manual_seed(seed)
        scores.append(recipe.validate(fabric, config, state, per_task(None), WAVES))
    assert scores[0] == scores[1]
    assert torch.equal(*pictures)
    assert all(part.training for part in state.model.modules())


class Iterable:
    """Anything that can be iterated over again, and nothing more."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@every_recipe
def test_a_list_of_meta_batches_is_read_in_its_order_as_any_iterable_of_them(recipe, tmp_path):
    drawn = [tuple(WAVES(4, torch.Generator().manual_seed(k))) for k in range(2)]
    found = []
    for tasks in (Iterable(drawn), drawn, tuple(drawn)):
        config = config_of(recipe, tmp_path / str(len(found)), steps=3)
        found.append(flat(recipe.train(single_process(), config, model=network(), tasks=tasks)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Drawn(Dataset):
    """Tasks one by one, by their number."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return [part[0] for part in WAVES(1, torch.Generator().manual_seed(index))]


@every_recipe
def test_a_dataset_of_tasks_is_shuffled_and_cut_into_meta_batches(recipe, tmp_path, monkeypatch):
    seen, next_of = [], Batches.__next__

    def kept(batches):
        seen.append(next_of(batches))
        return seen[-1]

    monkeypatch.setattr(Batches, "__next__", kept)
    recipe.train(single_process(), config_of(recipe, tmp_path, steps=3), model=network(), tasks=Drawn())
    assert [[tuple(part.shape) for part in batch] for batch in seen] == [
        [(4, 3, 1), (4, 3, 1), (4, 4, 1), (4, 4, 1)]
    ] * 3
    assert len({float(part.sum()) for batch in seen for part in batch[0]}) == 6


@every_recipe
@pytest.mark.parametrize(
    "sampler, message",
    [
        (lambda number, generator: WAVES(3, generator), r"^tasks: parts of \[3, 3, 3, 3\] tasks, where 4 were asked"),
        (lambda number, generator: WAVES(number, generator)[:2], r"^tasks: 2 parts; give support inputs"),
    ],
)
def test_a_sampler_that_gives_other_tasks_than_asked_for_is_refused(recipe, sampler, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        recipe.train(single_process(), config_of(recipe, tmp_path / "train"), model=network(), tasks=sampler)
    config = config_of(recipe, tmp_path / "val", steps=1)
    with pytest.raises(ConfigError, match=message):
        recipe.train(single_process(), config, model=network(), tasks=WAVES.__call__, val_tasks=sampler)


def counts(number, generator):
    """A rate that grows with the input, faster in some tasks, and how often something was seen: whole numbers."""
    slopes = torch.rand(number, 1, 1, generator=generator)
    points = torch.rand(number, 7, 1, generator=generator)
    seen = torch.poisson((slopes * points).exp(), generator=generator).long()
    return points[:, :3], seen[:, :3], points[:, 3:], seen[:, 3:]


def sides(number, generator):
    """Which of two sides of a threshold a point is on."""
    threshold = torch.rand(number, 1, generator=generator)
    points = torch.rand(number, 7, generator=generator)
    labels = (points > threshold).long()
    return points[:, :3, None], labels[:, :3], points[:, 3:, None], labels[:, 3:]


OWN = {
    "counts": (counts, lambda outputs, targets: poisson_nll_loss(outputs, targets)),
    "one logit": (sides, lambda outputs, targets: binary_cross_entropy_with_logits(outputs[:, 0], targets.float())),
}


@every_recipe
@pytest.mark.parametrize("name", OWN)
def test_whole_numbers_that_are_not_classes_of_the_outputs_have_a_loss_and_no_accuracy(recipe, name, tmp_path):
    tasks, loss = OWN[name]
    recipe.train(single_process(), config_of(recipe, tmp_path), model=network(), tasks=tasks, loss=loss)
    rows = read_rows(tmp_path)
    assert any("val/loss" in row for row in rows)
    assert not any("accuracy" in tag for row in rows for tag in row)


@every_recipe
def test_the_network_of_a_state_is_adapted_as_it_is_and_without_a_graph_around(recipe, tmp_path):
    config = config_of(recipe, tmp_path)
    state = recipe.train(single_process(), config, model=network(), tasks=WAVES.__call__)
    rates = {"rates": state.rates} if hasattr(state, "rates") else {}
    inputs, targets, queries, _ = (part[0] for part in WAVES(1, torch.Generator().manual_seed(0)))
    expected = recipe.adapt(unwrap(state.model), (inputs, targets), config=config, **rates)
    with torch.no_grad():  # as at prediction time
        adapted = recipe.adapt(state.model, (inputs, targets), config=config, **rates)
        assert torch.equal(adapted(queries), expected(queries))
        assert not torch.equal(adapted(queries), state.model(queries))


@every_recipe
def test_tasks_of_float64_are_refused_with_the_remedies_which_help(recipe, tmp_path):
    def of_numpy(number, generator):
        return [part.double() for part in WAVES(number, generator)]

    with pytest.raises(ConfigError, match=r"^tasks: inputs of float64, as NumPy makes them; give float32, or use"):
        recipe.train(single_process(), config_of(recipe, tmp_path / "32"), model=network(), tasks=of_numpy)
    config = config_of(recipe, tmp_path / "64", precision="64-true")
    recipe.train(single_process("64-true"), config, model=network(), tasks=of_numpy)
