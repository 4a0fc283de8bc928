"""Draw the accuracy of trained classifiers against the size of the attack.

    python docs/figures/robust_accuracy.py NAME=RUN_DIR NAME=RUN_DIR --out docs/figures/robust-accuracy.png

Runs of recipes.adversarial_training; PGD on the test set in the run's norm, whose numbers are also printed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")

from matplotlib import pyplot

from lightning_custom.adversarial import frozen
from lightning_custom.attacks import Ball, margins, pgd_with_restarts
from lightning_custom.checkpoint import load_module
from lightning_custom.evaluation import evaluating
from lightning_custom.run import config_of_run
from recipes.adversarial_training import AdversarialTrainingConfig, load_data, network

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""


def accuracies(run_dir: str, sizes: Sequence[float], steps: int) -> list[float]:
    """The share of test samples that PGD of each size leaves right, from one random start."""
    config = config_of_run(AdversarialTrainingConfig, run_dir)
    _, _, data = load_data(config)
    model = network(config, data)
    model.load_state_dict(load_module(run_dir, "model"))
    found = []
    with evaluating(model), frozen(model):
        for eps in sizes:
            points = pgd_with_restarts(
                model, data.images, data.labels, Ball(config.norm, eps), steps=steps, step_size=2.5 * eps / steps,
                restarts=1, generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            found.append(float(margins(model(points), data.labels).le(0).double().mean()))
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", type=float, default=[0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(words)
    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    axis.set_prop_cycle(color=COLOURS)
    for run in given.runs:
        name, _, run_dir = run.partition("=")
        found = accuracies(run_dir, given.sizes, given.steps)
        print(name, *(f"{size:g}: {accuracy:.3f}" for size, accuracy in zip(given.sizes, found, strict=True)))
        axis.plot(given.sizes, found, marker=".", linewidth=1.4, label=name)
    axis.set(xlabel="eps", ylabel="accuracy", ylim=(0, 1.02))
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(given.out, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
