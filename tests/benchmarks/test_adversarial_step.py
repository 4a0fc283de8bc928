"""The contenders do the same work: otherwise their times say nothing."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_custom.attacks import Ball, pgd
from tests.benchmarks.adversarial_step import CONFIG, Timed, loops, usual_attack


def test_the_usual_attack_gives_the_librarys_points():
    config = dataclasses.replace(CONFIG, width=8)
    model, inputs, labels = Timed(8), torch.rand(6, 1, 8, 8), torch.arange(6)
    torch.manual_seed(0)
    start = torch.empty_like(inputs).uniform_(-config.eps, config.eps)
    torch.manual_seed(0)
    expected = usual_attack(config)(model, inputs, labels)

    def losses(points):
        return cross_entropy(model(points), labels, reduction="none")

    found = pgd(
        losses, inputs, Ball("linf", config.eps), steps=config.attack_steps,
        step_size=config.step_size * config.eps, start=start,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - inputs).abs().max() > 0.9 * config.eps


@pytest.mark.parametrize("name", loops(CONFIG))
def test_every_loop_makes_as_many_passes(name):
    config = dataclasses.replace(CONFIG, width=8, batch_size=4, steps=3)
    assert len(loops(config)[name]().times) == 3 * (config.attack_steps + 1)
