"""What the recipes of few-shot learning do alike with a user's own networks, tasks and losses."""

import pytest
import torch
from torch import nn

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
