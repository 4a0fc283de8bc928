"""Losses of the GAN recipe on mixtures of 8 and 25 Gaussians in the plane: a picture, and modes and good samples.

python docs/figures/gan_gaussians.py        # writes docs/figures/gan-gaussians.png and prints the table

8 on a circle of radius 2 with a standard deviation of 0.1, and 25 on a grid from -2 to 2 with one of 0.05, where Lin et
al. 2018 have a grid of twice the width. A sample is good within 3 deviations of a centre, and a mode is caught by one
good sample among 2,500.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_custom.sampling import sampler
from lightning_custom.testing import single_process
from recipes import gan

LOSSES: dict[str, dict[str, Any]] = {
    "r3 + R1 + R2": {"loss": "r3", "r1": 0.01, "r2": 0.01},
    "nonsaturating + R1": {"loss": "nonsaturating", "r1": 0.01, "r2": 0.0},
    "wasserstein + GP": {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "gp": 0.1},
    "nonsaturating alone": {"loss": "nonsaturating", "r1": 0.0, "r2": 0.0},
}
SAMPLES, SEEDS = 2500, 3


def centres(modes: int) -> Tensor:
    """``[modes, 2]``."""
    if modes == 8:
        angles = torch.arange(8) * torch.pi / 4
        return 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    line = torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(line, line)


def deviation(modes: int) -> float:
    """Of each Gaussian."""
    return 0.1 if modes == 8 else 0.05


def points(modes: int) -> Tensor:
    """The data set, 20,000 points."""
    draw = torch.Generator().manual_seed(0)
    middle = centres(modes)[torch.randint(modes, (20_000,), generator=draw)]
    return middle + deviation(modes) * torch.randn(20_000, 2, generator=draw)


def network(inputs: int, outputs: int, *, bias: bool) -> nn.Sequential:
    """Three hidden layers of 128."""
    widths = (inputs, 128, 128, 128)
    layers = [part for i in range(3) for part in (nn.Linear(widths[i], widths[i + 1]), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(128, outputs, bias=bias))


def generated(modes: int, loss: str, seed: int) -> Tensor:
    """Samples of the average after training."""
    with tempfile.TemporaryDirectory() as folder:
        config = gan.GANConfig(
            **LOSSES[loss], steps=5000, batch_size=128, latent_size=2, num_classes=0, g_lr=2e-3, d_lr=2e-3,
            g_schedule="cosine", d_schedule="cosine", ema_half_life=12_800.0, log_every=0, validate_every=0,
            checkpoint_every=0, seed=seed, accelerator="cpu", run_dir=folder,
        )  # fmt: skip
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        state = gan.train(
            single_process(),
            config,
            generator=network(2, 2, bias=True),
            discriminator=nn.Sequential(network(2, 1, bias=False), nn.Flatten(0)),
            dataset=TensorDataset(points(modes)),
        )
        latents = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed + 1))
        return sampler(state.average.module, conditional=False, device=torch.device("cpu"))(latents, latents)


def score(samples: Tensor, modes: int) -> tuple[int, float]:
    """Modes caught, and the share of good samples."""
    distance, nearest = torch.cdist(samples, centres(modes)).min(1)
    good = distance <= 3 * deviation(modes)
    return len(nearest[good].unique()), good.double().mean().item()


def draw(found: dict[int, dict[str, Tensor]], path: Path) -> None:
    """A row for each mixture: the data, then each loss's samples of seed 0."""
    figure, axes = pyplot.subplots(2, 1 + len(LOSSES), figsize=(12, 5), layout="constrained")
    for number, (modes, samples) in enumerate(found.items()):
        row, limit = axes[number], 2.8
        for axis, (name, cloud) in zip(row, {"data": points(modes)[:SAMPLES], **samples}.items(), strict=True):
            axis.scatter(*cloud.T, s=1.5, alpha=0.4, linewidths=0, color="0.4" if name == "data" else "#0072b2")
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
            caught, good = score(cloud, modes)
            axis.set_title("" if number else name, fontsize=10)
            axis.set_xlabel(f"{caught} of {modes}, {good:.0%} good", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def line(loss: str, samples: Sequence[Tensor], modes: int) -> str:
    """Means over seeds, and the fewest modes."""
    caught, good = zip(*(score(cloud, modes) for cloud in samples), strict=True)
    return f"| {modes} | {loss} | {mean(caught):.1f} | {min(caught)} | {mean(good):.1%} |"


if __name__ == "__main__":
    first: dict[int, dict[str, Tensor]] = {}
    print("| modes | loss | caught | fewest over seeds | good samples |\n|---|---|---|---|---|", flush=True)
    for modes in (8, 25):
        clouds = {loss: [generated(modes, loss, seed) for seed in range(SEEDS)] for loss in LOSSES}
        first[modes] = {loss: samples[0] for loss, samples in clouds.items()}
        print("\n".join(line(loss, samples, modes) for loss, samples in clouds.items()), flush=True)
    draw(first, Path(__file__).with_name("gan-gaussians.png"))
