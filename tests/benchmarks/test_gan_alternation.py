import copy
import dataclasses

import pytest
import torch

from lightning_custom.data import Batches
from lightning_custom.loop import seed_step
from lightning_custom.testing import first_difference, single_process
from recipes.gan import networks, train
from tests.benchmarks.gan_alternation import CONVOLUTIONAL, MICRO, noise_images, raw_loop


def recipe_draw(fabric, config, data):
    """The recipe's own batches and latents, for the raw loop."""
    batches = Batches(fabric, data.dataset(), batch_size=config.batch_size, seed=config.seed)

    def draw(step):
        shared = seed_step(config.seed, step, fabric).shared
        return *next(batches), torch.randn(config.batch_size, config.latent_size, generator=shared)

    return draw


@pytest.mark.parametrize("config", (MICRO, CONVOLUTIONAL), ids=("micro", "convolutional"))
def test_raw_loop_does_the_work_of_the_recipe_to_the_bit(config, tmp_path):
    fabric, data = single_process(), noise_images(8, count=40)
    config = dataclasses.replace(config, steps=7, log_every=2, width=4, batch_size=8, run_dir=str(tmp_path))
    generator, discriminator = networks(config, data)
    start = {key: value.clone() for key, value in generator.state_dict().items()}
    average = copy.deepcopy(generator)
    raw_loop(config, generator, discriminator, average, recipe_draw(fabric, config, data))

    own_generator, own_discriminator = networks(config, data)
    state = train(fabric, config, generator=own_generator, discriminator=own_discriminator, dataset=data.dataset())
    expected = {"generator": own_generator, "discriminator": own_discriminator, "average": state.average.module}
    actual = {"generator": generator, "discriminator": discriminator, "average": average}
    states = [{name: dict(module.state_dict()) for name, module in side.items()} for side in (expected, actual)]
    assert first_difference(*states) is None
    assert first_difference(start, dict(generator.state_dict())) is not None
