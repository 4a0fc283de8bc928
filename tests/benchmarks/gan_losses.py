"""Losses of ``recipes.gan`` at one budget: FID on Fashion-MNIST, modes on stacked images, over seeds.

    python -m tests.benchmarks.gan_losses --data_root DIR --runs DIR                       # Fashion-MNIST, 3 seeds
    python -m tests.benchmarks.gan_losses --preset stacked --data_root DIR --runs DIR      # 1,000 modes

A run is the preset with the loss and its penalty and nothing else changed. Runs are kept in --runs; after each a line
is written to PRESET.jsonl there, and what has a line is not run again, so that it goes on where it was stopped.
Prints a table, whose score is that of the average at the last step.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lightning_custom.checkpoint import load_module
from lightning_custom.class_scores import class_scores
from lightning_custom.image_data import image_classifier
from lightning_custom.metrics import read_rows
from lightning_custom.run import CHECKPOINTS
from lightning_custom.sampling import sampler
from lightning_custom.storage import saved_steps
from lightning_custom.testing import single_process
from recipes import gan

LOSSES: dict[str, dict[str, Any]] = {
    "r3 + R1 + R2": {"loss": "r3"},
    "nonsaturating + R1": {"loss": "nonsaturating", "r2": 0.0},
    "hinge + R1": {"loss": "hinge", "r2": 0.0},
    "wasserstein + GP": {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "gp": 10.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    "fashion-mnist-small": gan.PRESETS["fashion-mnist-small"],
    "stacked": {
        **gan.PRESETS["fashion-mnist-small"], "data": "stacked-fashion-mnist", "num_classes": 0, "latent_size": 128,
    },
}  # fmt: skip
COLUMNS = {
    "fashion-mnist-small": (
        "val/fid", "val/fid_floor", "val/kid", "val/precision", "val/recall", "val/density", "val/coverage",
        "val/confident_as_asked",
    ),
    "stacked": ("modes", "reverse_kl", "val/fid", "val/fid_floor"),
}  # fmt: skip
MODE_SAMPLES = 26_000
"""As many as Lin et al. 2018 count modes among."""


def config_of(preset: str, loss: str, seed: int, fields: Mapping[str, Any], run_dir: Path) -> gan.GANConfig:
    """The config of one run, on one thread of the CPU."""
    shell = {"seed": seed, "run_dir": str(run_dir), "accelerator": "cpu", "threads": 1, "keep": 1}
    return gan.GANConfig(**{**PRESETS[preset], **LOSSES[loss], **shell, **fields})


def run(config: gan.GANConfig) -> dict[str, Any]:
    """Train once, or go on; the scores of the last step, and the CPU's seconds, data and scores included."""
    started = time.process_time()
    run_dir = gan.main(config)
    if max(saved_steps(Path(run_dir) / CHECKPOINTS), default=0) < config.steps:
        raise SystemExit(f"stopped: {run_dir} is kept; the same command goes on")
    found: dict[str, Any] = {"seconds": time.process_time() - started}
    for row in read_rows(run_dir):
        found |= {tag: value for tag, value in row.items() if tag.startswith("val/")}
    return found | (modes(config) if config.data.startswith("stacked") else {})


def modes(config: gan.GANConfig, samples: int = MODE_SAMPLES) -> dict[str, float]:
    """Modes and reverse KL of ``samples`` of the last average, one classifier's predictions for each channel."""
    data = gan.load_data(config)
    classify = image_classifier(single_process(), config.data, data)
    generator, _ = gan.networks(config, data)
    generator.load_state_dict(load_module(str(config.run_dir), "average", which="last"))
    draw = torch.Generator().manual_seed(config.seed + 1)
    predicted = []
    for part in torch.zeros(samples).split(1000):
        latents = torch.randn(len(part), config.latent_size, generator=draw)
        images = sampler(generator, conditional=config.num_classes > 0, device=torch.device("cpu"))(
            latents, torch.zeros(len(part), dtype=torch.long)
        )
        predicted.append(classify(images)[1].argmax(1))
    return class_scores(torch.cat(predicted), torch.full((data.num_classes,), 1 / data.num_classes))


def row(loss: str, found: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    """A line of the table: means over seeds, and the range of the first column."""
    first = [one[columns[0]] for one in found]
    spread = f"{min(first):.3f} to {max(first):.3f}" if len(first) > 1 else ""
    cells = [f"{mean(one[column] for one in found):.3f}" for column in columns]
    return f"| {loss} | {cells[0]} | {spread} | {' | '.join(cells[1:])} | {mean(one['seconds'] for one in found):.0f} |"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion-mnist-small", choices=list(PRESETS))
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--steps", type=int)
    words = parser.parse_args()
    fields = {"data_root": words.data_root} | ({} if words.steps is None else {"steps": words.steps})
    lines, found = Lines(words.runs / f"{words.preset}.jsonl"), {loss: [] for loss in words.losses}
    for seed in words.seeds:
        for loss in words.losses:
            run_dir = words.runs / f"{words.preset}-{loss.partition(' ')[0]}-{seed}"
            found[loss].append(lines.get(loss, seed, config_of(words.preset, loss, seed, fields, run_dir)))
    columns = COLUMNS[words.preset]
    print(f"\n| loss | {columns[0]} | over seeds | {' | '.join(columns[1:])} | CPU s |")
    print("|---" * (len(columns) + 3) + "|")
    for loss, results in found.items():
        print(row(loss, results, columns))


class Lines:
    """Results in a file, a line a run; what is not there is run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        self._known = {json.dumps(line["run"]): line for line in map(json.loads, text.splitlines())}

    def get(self, loss: str, seed: int, config: gan.GANConfig) -> dict[str, Any]:
        """The result of a run."""
        key = [loss, seed, config.steps]
        if json.dumps(key) not in self._known:
            line = {"run": key, **run(config)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._known[json.dumps(key)] = line
        return self._known[json.dumps(key)]


if __name__ == "__main__":
    main()
