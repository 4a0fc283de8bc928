"""The outer losses against their papers' formulas, the order of the two loops, and the command line's verb."""

import dataclasses
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from lightning_custom.attacks import Ball
from lightning_custom.cli import command_line
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.precision import bare
from lightning_custom.testing import single_process
from recipes import adversarial_training as recipe

CONFIG = recipe.AdversarialTrainingConfig(
    steps=4, log_every=1, validate_every=2, checkpoint_every=2, batch_size=8, width=8, schedule="constant",
    attack_steps=3, val_attack_steps=2, test_attack_steps=2, test_restarts=1, test_queries=2, accelerator="cpu",
)  # fmt: skip


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.fixture
def logits():
    draw = torch.Generator().manual_seed(0)
    clean, perturbed = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return clean, perturbed, torch.tensor([0, 1, 2, 3, 0, 1])


def found_loss(loss, logits, **fields):
    clean, perturbed, labels = logits
    config = dataclasses.replace(CONFIG, loss=loss, **fields)
    value, returned = recipe.outer_loss(config, nn.Identity(), clean, perturbed, labels)
    assert torch.equal(returned, perturbed)
    return float(value)


def test_the_losses_are_those_of_the_papers(logits):
    clean, perturbed, labels = (part.numpy() for part in logits)
    p, q, rows = probabilities(clean), probabilities(perturbed), np.arange(6)
    apart = (p * np.log(p / q)).sum(1)
    assert found_loss("madry", logits) == pytest.approx(-np.log(q[rows, labels]).mean())
    trades = -np.log(p[rows, labels]).mean() + 3 * apart.mean()
    assert found_loss("trades", logits, beta=3.0) == pytest.approx(trades)
    others = q.copy()
    others[rows, labels] = 0
    boosted = -np.log(q[rows, labels]) - np.log(1 - others.max(1))
    mart = (boosted + 3 * apart * (1 - p[rows, labels])).mean()
    assert found_loss("mart", logits, beta=3.0) == pytest.approx(mart, rel=1e-3)  # 1e-4 keeps the logarithm finite


def test_trades_without_weight_is_the_clean_loss_and_its_attack_leaves_a_zero_divergence(logits):
    clean, _, labels = logits
    assert found_loss("trades", logits, beta=0.0) == pytest.approx(found_loss("madry", (clean, clean, labels)))


@pytest.mark.parametrize("loss", ["madry", "trades", "mart"])
def test_the_attack_raises_the_loss_that_training_lowers(loss):
    fabric, config = single_process(), dataclasses.replace(CONFIG, loss=loss, beta=6.0, attack_steps=10)
    data, _, _ = recipe.load_data(config)
    classify = bare(fabric, fabric.setup_module(recipe.network(config, data)))
    inputs, labels = data.images[:32], data.labels[:32]
    ball, draw = Ball("linf", 0.2), torch.Generator().manual_seed(0)
    perturbed = recipe.attacked(fabric, config, classify, inputs, labels, ball, draw)
    noise = ball.project(inputs, inputs + ball.start(tuple(inputs.shape), draw))
    losses = [
        float(recipe.outer_loss(config, classify, inputs, points, labels)[0].detach()) for points in (noise, perturbed)
    ]
    assert losses[1] > losses[0] + 1e-3


def run(config, folder, **fields):
    data, val, _ = recipe.load_data(config)
    config = dataclasses.replace(config, run_dir=str(folder), **fields)
    return recipe.train(
        single_process(), config, model=recipe.network(config, data), dataset=data.dataset(), num_classes=10,
        val_data=val.dataset(),
    )  # fmt: skip


def test_eps_grows_over_the_warmup_and_no_perturbation_is_larger(tmp_path):
    seen, original = [], recipe.outer_loss

    def watched(config, classify, inputs, perturbed, labels):
        seen.append(float((perturbed - inputs).abs().max()))
        return original(config, classify, inputs, perturbed, labels)

    with patch.object(recipe, "outer_loss", watched):
        run(CONFIG, tmp_path, eps_warmup=4)
    bounds = [CONFIG.eps * (step + 1) / 4 for step in range(4)]
    assert seen == pytest.approx(bounds, abs=1e-6)
    assert [row["eps"] for row in read_rows(tmp_path) if "eps" in row] == pytest.approx(bounds)


class WithNormalisation(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
        self.modes = []

    def forward(self, inputs):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.layers(inputs)


def test_the_attack_sees_the_model_in_evaluation_mode_and_batch_statistics_are_counted_once_a_step(tmp_path):
    data, _, _ = recipe.load_data(CONFIG)
    model = WithNormalisation()
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    recipe.train(single_process(), config, model=model, dataset=data.dataset(), num_classes=10)
    assert model.modes == ([(False, True)] * 3 + [(True, True)]) * 4
    assert int(model.layers[1].num_batches_tracked) == 4


@pytest.mark.slow
def test_robust_accuracy_at_eps_zero_is_the_clean_one_and_falls_where_there_is_an_attack(tmp_path):
    fields = {"attack_steps": 0, "steps": 150, "lr": 0.01, "validate_every": 0, "log_every": 50}
    state = run(CONFIG, tmp_path, eps=0.0, **fields)
    clean = state.metrics.latest["val/accuracy"]
    assert state.metrics.latest["val/robust_accuracy"] == clean
    assert clean > 0.5
    attacked = run(CONFIG, tmp_path / "other", eps=0.3, **fields).metrics.latest
    assert attacked["val/accuracy"] == clean
    assert attacked["val/robust_accuracy"] < clean / 2


def test_inputs_outside_the_box_are_refused_wherever_they_stand(tmp_path):
    images = torch.zeros(8, 1, 8, 8)
    images[5] = -1
    data = TensorDataset(images, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"from -1 to 0; scale them to \[0, 1\]"):
        recipe.train(single_process(), CONFIG, model=nn.Linear(1, 1), dataset=data, num_classes=10)
    config = dataclasses.replace(CONFIG, batch_size=8, run_dir=str(tmp_path))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConfigError, match=r"from -1 to 0; scale them to \[0, 1\]"):
        recipe.train(single_process(), config, model=model, dataset=iter([data.tensors]), num_classes=10)


@pytest.mark.parametrize(
    "fields",
    [{"eps": -0.1}, {"width": 12}, {"val_attack_steps": 0}, {"test_restarts": 0}, {"attack_steps": 0, "loss": "mart"}],
)
def test_a_wrong_setting_is_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        recipe.AdversarialTrainingConfig(**fields)


def test_the_verb_draws_the_best_checkpoints_samples_under_attack(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"))
    recipe.main(config)
    out = capsys.readouterr().out
    assert "under PGD-2 from 1 starts, linf eps 0.1:" in out
    assert "under 2 queries" in out
    recipe.attack(recipe.AttackConfig(run_dir=config.run_dir, count=3, out=str(tmp_path / "a.png"), attack_steps=2))
    assert "3 samples, " in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 65 + 1, 3 * (64 + 14 + 1) + 1)
        pixels = np.asarray(picture.convert("L"))
    tenfold = pixels[2 * 79 + 1 : 2 * 79 + 65, 1:65] / 255
    assert abs(tenfold - 0.5).max() > 0.4  # 0.1 tenfold is 1, cut at 0.5 around grey
    with pytest.raises(ConfigError, match="holds no run"):
        recipe.attack(recipe.AttackConfig(run_dir=str(tmp_path / "none")))


VERBS = {"attack": (recipe.AttackConfig, recipe.attack), "evaluate": (recipe.EvaluateConfig, recipe.score)}


def program(*words):
    """The exit status of the command line."""
    return command_line(
        recipe.AdversarialTrainingConfig, recipe.main, presets=recipe.PRESETS, verbs=VERBS, arguments=[*map(str, words)]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of 60 steps of standard training."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    config = dataclasses.replace(
        CONFIG, steps=60, lr=0.01, batch_size=32, attack_steps=0, eps=0.05, validate_every=0, checkpoint_every=0,
        log_every=60, run_dir=str(run_dir),
    )  # fmt: skip
    recipe.main(config)
    return run_dir


def shares(line):
    """The percentages in a line."""
    return [float(word) for word in re.findall(r"([\d.]+)%", line)]


def test_evaluate_repeats_the_runs_own_test_and_takes_any_attack(finished, capsys):
    own = next(row for row in read_rows(finished) if "test/accuracy" in row)
    lines = {}
    for name, words in {
        "own": (),
        "none": ("--eps", 0, "--queries", 0),
        "strong": ("--eps", 0.3, "--attack_steps", 5, "--restarts", 3, "--seed", 4, "--queries", 0),
        "l2": ("--norm", "l2", "--eps", 0.05, "--queries", 0),
    }.items():
        assert program("evaluate", "--run_dir", finished, "--accelerator", "cpu", *words) == 0
        lines[name] = capsys.readouterr().out
    assert "under PGD-2 from 1 starts, linf eps 0.05: " in lines["own"]
    tags = ("test/accuracy", "test/robust_accuracy", "test/search_accuracy")
    assert shares(lines["own"]) == pytest.approx([100 * own[tag] for tag in tags], abs=0.006)
    clean, robust, _ = shares(lines["own"])
    assert clean > 50
    assert shares(lines["none"]) == [clean, clean]
    assert "under PGD-5 from 3 starts, linf eps 0.3: " in lines["strong"]
    assert shares(lines["strong"])[1] < robust < shares(lines["l2"])[1] <= clean


@pytest.mark.parametrize(
    "words, named",
    [
        (("evaluate", "--restarts", 0), "restarts: 0; it must be at least 1"),
        (("evaluate", "--attack_steps", 0), "attack_steps: 0; it must be at least 1"),
        (("evaluate", "--norm", "l1"), "norm"),
        (("attack", "--count", 0), "count: 0; it must be at least 1"),
        (("attack", "--eps", -1), "eps: -1.0; it must be at least 0"),
        (("evaluate", "--run_dir", "nowhere"), "run_dir: nowhere holds no run"),
    ],
)
def test_a_verb_refuses_in_one_line(words, named, finished, capsys):
    assert program(words[0], "--run_dir", finished, *words[1:]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
