"""The picture of the front page: samples, adapted sines, task conflict and returns, each from runs of the recipes.

    python docs/figures/front_page.py --runs runs/front-page        # trains five runs; writes front-page.png

Runs that are complete are not trained again. The picture is transparent, with colours for light and dark pages.
"""

import argparse
import io
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torch.utils.data import TensorDataset

from lightning_custom.datasets import digits
from lightning_custom.launch import launch
from lightning_custom.metrics import read_rows
from lightning_custom.multitask.conflict import conflict
from recipes import maml, multitask

RUNS = {
    "gan": "recipes.gan --validate_every 100",
    "maml": "recipes.maml --joint false",
    **{f"ppo-{seed}": f"recipes.ppo --validate_every 10 --seed {seed}" for seed in range(3)},
}
"""Directory to command."""
PPO_STEP = 8 * 32
"""Environment steps of a step of the recipe's default."""
SAMPLE_STEPS = (100, 300, 1000, 5000)
ROWS, GAP = 3, 5
"""Of the samples, and pixels between two."""
INK, GREEN, ORANGE, BLUE = "#818b98", "#1a9e77", "#e0701b", "#3a86d6"
"""Legible on white and on black."""
MIDDLE = LinearSegmentedColormap.from_list("conflict", [ORANGE, "#f4f4f2", BLUE])


def train(folder: Path) -> None:
    """What is missing of the runs of the command line."""
    for name, words in RUNS.items():
        command = [sys.executable, "-m", *words.split(), "--run_dir", str(folder / name)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def draw_samples(axis: Axes, run_dir: Path, step: int) -> None:
    """The first rows of the pictures that the run has shown at a step, a column a class."""
    events = EventAccumulator(str(run_dir), size_guidance={IMAGES: 0})
    events.Reload()
    (shown,) = (event for event in events.Images("samples") if event.step == step)
    picture = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    side = picture.shape[1] // 10
    apart = np.full((ROWS * (side + GAP) - GAP, 10 * (side + GAP) - GAP), np.nan)
    for row, column in np.ndindex(ROWS, 10):
        tile = picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
        apart[row * (side + GAP) :, column * (side + GAP) :][:side, :side] = tile
    axis.imshow(apart, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_axis_off()
    axis.set_title(f"step {step:,}", fontsize=8)


def draw_sines(axis: Axes, run_dir: Path) -> None:
    """A wave that was never trained on, before and after steps on ten points of it."""
    model, settings = maml.load(str(run_dir))
    x = torch.linspace(-5, 5, 200).unsqueeze(1)
    points = torch.tensor([-4.3, -3.6, -2.4, -1.6, -0.4, 0.5, 1.7, 2.6, 3.4, 4.6]).unsqueeze(1)
    axis.plot(x, wave(x), color=INK, linewidth=4, alpha=0.45, label="the new wave")
    for steps, label, colour in ((0, "before", ORANGE), (1, "after 1 step", BLUE), (10, "after 10 steps", GREEN)):
        adapted = maml.adapt(model, (points, wave(points)), **settings, steps=steps)
        with torch.no_grad():
            axis.plot(x, adapted(x), color=colour, linewidth=1.8, label=label)
    axis.plot(points, wave(points), "o", color=INK, markersize=5)
    axis.set_ylim(-4.5, 6.5)
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, labelcolor=INK)


def wave(x: Tensor) -> Tensor:
    """Of the family that the recipe trains on."""
    return 3.5 * torch.sin(x - 0.9)


class IsDigit(nn.Linear):
    """Says whether the picture is one digit."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """A logit for each picture ``[B]``."""
        return super().forward(features).squeeze(1)


def task_cosines(run_dir: Path) -> Tensor:
    """Cosines ``[10, 10]`` of the trunk's gradients of ten tasks, is it a 0, is it a 1 and so on, on a batch."""
    config = multitask.MultitaskConfig(steps=100, accelerator="cpu", validate_every=0, run_dir=str(run_dir))
    data = digits()
    torch.manual_seed(config.seed)
    trunk = multitask.LeNetTrunk(1, 8, width=config.width, kernel=3, padding=1)
    heads = {str(digit): IsDigit(trunk.features) for digit in range(10)}
    targets = one_hot(data.labels, 10).float()
    loss = nn.BCEWithLogitsLoss(reduction="none")
    multitask.train(
        launch(config), config, trunk=trunk, heads=heads, data=TensorDataset(data.images, targets),
        losses=dict.fromkeys(heads, loss),
    )  # fmt: skip
    rows = []
    for digit, head in enumerate(heads.values()):
        total = binary_cross_entropy_with_logits(head(trunk(data.images[:64])), targets[:64, digit])
        gradients = torch.autograd.grad(total, list(trunk.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    jacobian = torch.stack(rows)
    return conflict(jacobian @ jacobian.T).cosines


def draw_conflict(axis: Axes, cosines: Tensor) -> None:
    """Blue where two tasks pull the same way, orange where they fight."""
    largest = float(cosines[~torch.eye(len(cosines), dtype=torch.bool)].abs().max())
    shown = axis.imshow(cosines, cmap=MIDDLE, vmin=-largest, vmax=largest)
    axis.set_xticks(range(10))
    axis.set_yticks(range(10))
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.9, extend="max")
    bar.outline.set_edgecolor(INK)
    bar.ax.tick_params(colors=INK, labelsize=8)


def draw_returns(axis: Axes, run_dirs: list[Path]) -> None:
    """Mean and range over seeds."""
    tag = "val/episodic_return"
    curves = [{row["step"]: row[tag] for row in read_rows(path) if tag in row} for path in run_dirs]
    steps, values = np.array(list(curves[0])) * PPO_STEP, np.array([list(curve.values()) for curve in curves])
    axis.fill_between(steps, values.min(0), values.max(0), color=GREEN, alpha=0.25, linewidth=0)
    axis.plot(steps, values.mean(0), color=GREEN, linewidth=2)
    axis.axhline(500, color=INK, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 530)
    axis.set_xlabel("environment steps", fontsize=8)
    axis.set_xticks([0, 50_000, 100_000], ["0", "50,000", "100,000"])


def style(axis: Axes, title: str) -> None:
    """Thin axes and a title in ink that shows on light and dark."""
    axis.set_title(title, fontsize=9)
    axis.set_facecolor("none")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw(folder: Path, out: Path) -> None:
    """All of it."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    pyplot.rcParams.update(dict.fromkeys(inked, INK))
    figure = pyplot.figure(figsize=(10, 5.4), layout="constrained", facecolor="none")
    figure.get_layout_engine().set(wspace=0.05)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2.2))
    upper.suptitle("GAN: digits drawn on the way, a column a class", fontsize=9)
    for axis, step in zip(upper.subplots(1, len(SAMPLE_STEPS)), SAMPLE_STEPS, strict=True):
        draw_samples(axis, folder / "gan", step)
    sines, tasks, returns = lower.subplots(1, 3)
    draw_sines(sines, folder / "maml")
    style(sines, "MAML: ten points of a wave never seen")
    draw_conflict(tasks, task_cosines(folder / "multitask"))
    style(tasks, "Multi-task: cosines of ten tasks' gradients")
    draw_returns(returns, [folder / f"ppo-{seed}" for seed in range(3)])
    style(returns, "PPO on CartPole: return, three seeds")
    figure.savefig(out, dpi=150, transparent=True, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/front-page"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("front-page.png"))
    given = parser.parse_args()
    train(given.runs)
    draw(given.runs, given.out)
