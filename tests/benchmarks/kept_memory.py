"""Training steps on a CPU with glibc as it is, and with freed memory kept as ``launch`` has it.

    python -m tests.benchmarks.kept_memory

The same loop, the recipe's, in both rows; what differs is what glibc does with a block that torch frees.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Iterator

import torch

from lightning_custom.freed_memory import keep_freed_memory
from lightning_custom.launch import launch
from recipes.gan import GANConfig
from tests.benchmarks.gan_alternation import noise_images, recipe_contender
from tests.benchmarks.interleave import Contender, interleave, machine, table

ROUNDS = 9
BASE = GANConfig(
    steps=9, log_every=3, validate_every=0, checkpoint_every=0, latent_size=64, accelerator="cpu", devices=1
)
NETWORKS = {
    "GAN, conv, width 16, batch 32, 32x32": dataclasses.replace(BASE, network="conv", width=16, batch_size=32),
    "GAN, dcgan, width 32, batch 64, 32x32": dataclasses.replace(BASE, network="dcgan", width=32),
    "GAN, residual, width 8, batch 32, 32x32": dataclasses.replace(BASE, network="residual", width=8, batch_size=32),
}


def as_glibc_does() -> None:
    """glibc's own values, and what it holds back given to the system."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 65536)
    libc.mallopt(-1, 128 * 1024)
    libc.malloc_trim(0)


def prepared(prepare: Callable[[], object], contender: Contender) -> Contender:
    """A contender after ``prepare``."""

    def run() -> float:
        prepare()
        return contender()

    return run


def report(rounds: int = ROUNDS) -> Iterator[str]:
    """A table for each of the networks."""
    data = noise_images(32, count=1024)
    for name, config in NETWORKS.items():
        contender = recipe_contender(launch(config), config, data)
        both = {
            "as glibc does": prepared(as_glibc_does, contender),
            "kept": prepared(keep_freed_memory, contender),
        }
        yield table(name, interleave(both, rounds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in report():
        print(part, flush=True)
    print(machine())
