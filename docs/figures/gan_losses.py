"""Samples of runs of ``tests.benchmarks.gan_losses`` beside real images, a column a class.

python docs/figures/gan_losses.py RUNS        # writes docs/figures/gan-losses.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib import pyplot
from torch import Tensor

from lightning_custom.checkpoint import load_module
from lightning_custom.pictures import image_grid
from lightning_custom.run import config_of_run
from lightning_custom.sampling import sampler
from recipes import gan

NAMES = ("r3", "nonsaturating", "hinge", "wasserstein")
ROWS = 3


def samples(run_dir: Path) -> Tensor:
    """``[30, 1, 32, 32]`` of the last average, three of each class."""
    config = config_of_run(gan.GANConfig, str(run_dir))
    generator, _ = gan.networks(config, gan.load_data(config))
    generator.load_state_dict(load_module(str(run_dir), "average", which="last"))
    latents = torch.randn(10 * ROWS, config.latent_size, generator=torch.Generator().manual_seed(1))
    draw = sampler(generator, conditional=True, device=torch.device("cpu"))
    return draw(latents, torch.arange(10 * ROWS) % 10)


def real(run_dir: Path) -> Tensor:
    """As many real images."""
    data = gan.load_data(config_of_run(gan.GANConfig, str(run_dir)))
    found = [data.images[data.labels == label][:ROWS] for label in range(10)]
    return torch.stack(found, dim=1).flatten(0, 1)


def main(runs: Path) -> None:
    """Draw the first seed's runs."""
    folders = {name: runs / f"fashion-mnist-small-{name}-0" for name in NAMES}
    pictures = {"real": real(folders["r3"]), **{name: samples(folder) for name, folder in folders.items()}}
    figure, axes = pyplot.subplots(len(pictures), 1, figsize=(6, 9.2), layout="constrained")
    for axis, (name, images) in zip(axes, pictures.items(), strict=True):
        axis.imshow(image_grid((images + 1) / 2, columns=10)[0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    figure.savefig(Path(__file__).with_name("gan-losses.png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
