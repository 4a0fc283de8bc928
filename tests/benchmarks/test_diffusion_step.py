"""The contenders do the same work: otherwise their times say nothing."""

import dataclasses

import pytest
import torch

from lightning_custom.diffusion import Diffusion
from tests.benchmarks import diffusion_step
from tests.benchmarks.diffusion_step import CONFIG, raw_loop, recipe


@pytest.mark.parametrize("self_conditioning, passes", [(True, 2), (False, 1)])
@pytest.mark.parametrize("loop", [raw_loop, recipe])
def test_both_loops_make_as_many_passes(loop, self_conditioning, passes):
    config = dataclasses.replace(CONFIG, steps=3, self_conditioning=self_conditioning)
    assert len(loop(config).times) == 3 * passes


def test_the_raw_loop_lowers_the_recipes_loss():
    """The loss of one step on all of the data's noise, before and after: as low as the recipe brings it."""
    config = dataclasses.replace(CONFIG, steps=300)
    data = diffusion_step.load_data(config)
    process = Diffusion(config.noise_schedule, config.prediction, config.bound)
    draw = torch.Generator().manual_seed(0)
    times, noise = torch.rand(512, generator=draw, dtype=torch.float64), torch.randn(512, 1, 8, 8, generator=draw)
    samples, labels = data.images[:512], data.labels[:512]
    noisy = process.noisy(samples, noise, times)

    @torch.no_grad()
    def loss_of(model):
        found = model.network(noisy, times.float(), labels, torch.zeros_like(noisy))
        errors = (found - process.target(samples, noise, times)).square().flatten(1).mean(1)
        return float((process.weights(times, config.min_snr) * errors).mean())

    start = loss_of(diffusion_step.Timed(config))
    raw, own = loss_of(raw_loop(config)), loss_of(recipe(config))
    assert raw < start / 3
    assert raw == pytest.approx(own, rel=0.1)
