"""A step of recipes.diffusion against the same step in raw PyTorch.

    python -m tests.benchmarks.diffusion_step

The recipe is ``recipes.diffusion.train`` itself, with metrics, progress bar, schedule and stop check. The raw loop only
trains: the same network, noise, self-conditioning, weights, clipping, Adam and average of the weights, written as an
example script would. The clock is in the network: from the end of the warm-up's last step to that of the last one.
"""

import tempfile
import time
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_custom.testing import single_process
from recipes.diffusion import DiffusionConfig, load_data, network, train
from tests.benchmarks.interleave import interleave, machine, quiet, table

WARM_UP, MEASURED, ROUNDS = 20, 100, 11
CONFIG = DiffusionConfig(
    steps=WARM_UP + MEASURED + 1, log_every=10, validate_every=0, checkpoint_every=0, schedule="constant",
    warmup_steps=0, accelerator="cpu",
)  # fmt: skip


class Timed(nn.Module):
    """The denoiser, with the time of each forward pass in training."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.network = network(config, load_data(config).images.shape[1:])
        self.times: list[float] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return self.network(*inputs)  # type: ignore[no-any-return]

    def seconds(self, config: DiffusionConfig) -> float:
        """Of a step: the first forward pass of one to that of another."""
        passes = 2 if config.self_conditioning else 1
        return (self.times[(WARM_UP + MEASURED) * passes] - self.times[WARM_UP * passes]) / MEASURED


def recipe(config: DiffusionConfig) -> Timed:
    """Train by the recipe."""
    model = Timed(config)
    with tempfile.TemporaryDirectory() as folder, quiet():
        own = replace(config, run_dir=folder)
        train(single_process(), own, denoiser=model, dataset=load_data(config).dataset())
    return model


def raw_loop(config: DiffusionConfig) -> Timed:
    """Train in raw PyTorch: the default's cosine schedule, prediction of the sample, and min-SNR."""
    data, model = load_data(config), Timed(config)
    optimizer = Adam(model.parameters(), config.lr, fused=True)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    offset = 0.008
    floor = torch.cos(torch.tensor(offset / (1 + offset) * torch.pi / 2, dtype=torch.float64))
    for _ in range(config.steps):
        index = torch.randint(len(data.labels), (config.batch_size,))
        samples, labels = data.images[index], data.labels[index]
        times = torch.rand(config.batch_size, dtype=torch.float64)
        power = (torch.cos((times + offset) / (1 + offset) * torch.pi / 2) / floor).square().clamp(1e-9, 1)
        alpha, sigma = (part.float().view(-1, 1, 1, 1) for part in (power.sqrt(), (1 - power).sqrt()))
        noisy = alpha * samples + sigma * torch.randn_like(samples)
        labels = labels.masked_fill(torch.rand(config.batch_size) < config.label_dropout, config.num_classes)
        estimates: Tensor | None = None
        if config.self_conditioning:
            half = torch.randperm(config.batch_size)[: config.batch_size // 2]
            estimates = torch.zeros_like(samples)
            with torch.no_grad():
                found = model(noisy[half], times[half].float(), labels[half], estimates[half])
                estimates[half] = found.clamp(-config.bound, config.bound)
        weights = torch.minimum(power, config.min_snr * (1 - power)) / (1 - power)
        errors = (model(noisy, times.float(), labels, estimates) - samples).square().flatten(1).mean(1)
        optimizer.zero_grad()
        (weights.float() * errors).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        average.update_parameters(model)
    return model


def report(rounds: int = ROUNDS) -> str:
    """A table for the default network, and one without self-conditioning."""
    torch.set_num_threads(1)
    tables = []
    for name, config in (("default", CONFIG), ("no self-conditioning", replace(CONFIG, self_conditioning=False))):
        contenders = {
            "raw PyTorch": lambda config=config: raw_loop(config).seconds(config),
            "recipes.diffusion": lambda config=config: recipe(config).seconds(config),
        }
        tables.append(table(f"a step of diffusion, {name}", interleave(contenders, rounds)))
    return "\n".join(tables)


if __name__ == "__main__":
    print(report())
    print(machine())
