import json
from pathlib import Path

import pytest
import torch

from lightning_custom.class_scores import class_scores
from lightning_custom.config import read_config
from lightning_custom.datasets import digits
from lightning_custom.stacked import stacked
from lightning_custom.storage import saved_steps
from tests.benchmarks import gan_losses
from tests.benchmarks.gan_losses import LOSSES, Lines, config_of, modes, row, run

SMALL = {"data": "digits", "image_size": 0, "network": "mlp", "width": 4, "steps": 3, "batch_size": 8}


def test_a_run_differs_from_the_preset_in_loss_and_penalty_alone():
    configs = [config_of("fashion-mnist-small", loss, 1, {}, Path("here")) for loss in LOSSES]
    for name in ("steps", "batch_size", "width", "g_lr", "d_lr", "ema_half_life", "seed", "threads"):
        assert len({getattr(config, name) for config in configs}) == 1
    assert [(config.loss, config.r1, config.r2, config.gp) for config in configs] == [
        ("r3", 0.1, 0.1, 0), ("nonsaturating", 0.1, 0, 0), ("hinge", 0.1, 0, 0), ("wasserstein", 0, 0, 10)
    ]  # fmt: skip
    stack = config_of("stacked", "r3 + R1 + R2", 0, {}, Path("here"))
    assert (stack.data, stack.num_classes, stack.image_size) == ("stacked-fashion-mnist", 0, 32)


@pytest.mark.slow
def test_a_run_is_kept_and_scored_at_its_last_step(tmp_path):
    config = config_of("fashion-mnist-small", "hinge + R1", 0, SMALL | {"validate_every": 2}, tmp_path / "run")
    found = run(config)
    assert {"val/fid", "val/precision", "val/density", "val/confident_as_asked"} <= found.keys()
    assert found["seconds"] > 0
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 3
    assert read_config(tmp_path / "run" / "config.yaml")["loss"] == "hinge"


def test_a_stopped_run_is_no_result(tmp_path):
    config = config_of("fashion-mnist-small", "hinge + R1", 0, SMALL | {"stop_at": 2}, tmp_path / "run")
    with pytest.raises(SystemExit, match="is kept; the same command goes on"):
        run(config)


def test_what_is_in_the_file_is_not_run_again(tmp_path, monkeypatch):
    runs = []

    def fake(config):
        runs.append((config.loss, config.seed))
        return {"val/fid": 1.0}

    monkeypatch.setattr(gan_losses, "run", fake)
    for _ in range(2):
        lines = Lines(tmp_path / "lines.jsonl")
        for seed in (0, 1):
            config = config_of("fashion-mnist-small", "r3 + R1 + R2", seed, {"data_root": "here"}, tmp_path)
            assert lines.get("r3 + R1 + R2", seed, config)["val/fid"] == 1.0
    assert runs == [("r3", 0), ("r3", 1)]
    keys = [json.loads(line)["run"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert keys == [["r3 + R1 + R2", 0, 3000], ["r3 + R1 + R2", 1, 3000]]


def test_rows_are_means_over_seeds_with_the_range_of_the_first_column():
    found = [{"a": 1.0, "b": 2.0, "seconds": 10.0}, {"a": 2.0, "b": 4.0, "seconds": 20.0}]
    assert row("r3", found, ("a", "b")) == "| r3 | 1.500 | 1.000 to 2.000 | 3.000 | 15 |"
    assert row("r3", found[:1], ("a", "b")) == "| r3 | 1.000 |  | 2.000 | 10 |"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["real", "one"])
def test_modes_of_samples_that_are_real_stacks_are_those_of_the_stacks(kind, tmp_path, monkeypatch):
    data, drawn = stacked(digits(), count=3000), []

    class Stacks(torch.nn.Linear):
        def forward(self, latents):
            index = (latents[:, 0].abs() * 1e4).long() % (len(data.labels) if kind == "real" else 1)
            drawn.append(data.labels[index])
            return data.images[index]

    generator = Stacks(1, 1)
    monkeypatch.setattr(gan_losses.gan, "load_data", lambda config: data)
    monkeypatch.setattr(gan_losses.gan, "networks", lambda config, data: (generator, None))
    monkeypatch.setattr(gan_losses, "load_module", lambda *_, **__: generator.state_dict())
    found = modes(config_of("stacked", "r3 + R1 + R2", 0, {"data": "stacked-mnist"}, tmp_path), samples=3000)
    expected = class_scores(torch.cat(drawn), torch.full((1000,), 1e-3))
    assert len(torch.cat(drawn)) == 3000
    assert found["modes"] == pytest.approx(expected["modes"], rel=0.02)
    assert found["reverse_kl"] == pytest.approx(expected["reverse_kl"], rel=0.05)
    assert expected["modes"] == (1 if kind == "one" else pytest.approx(850, abs=40))
