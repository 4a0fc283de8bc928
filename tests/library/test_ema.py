import copy

import pytest
import torch
from torch import nn

from lightning_custom.ema import EMA


def constant(value, dtype=torch.float32):
    module = nn.Linear(2, 1).to(dtype)
    return set_(module, value)


def set_(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def test_the_average_is_the_closed_form():
    module = constant(0.0, torch.float64)
    average = EMA(module, half_life=100.0, ramp=0.0)
    values = [1.0, -2.0, 5.0, 3.0]
    for i, value in enumerate(values):
        set_(module, value)
        average.update_(batch_size=50, samples_seen=50 * (i + 1))
    kept = 0.5**0.5
    expected = sum((1 - kept) * kept ** (len(values) - 1 - i) * value for i, value in enumerate(values))
    assert torch.allclose(average.module.weight, torch.full((1, 2), expected, dtype=torch.float64), rtol=1e-12)
    assert module.weight[0, 0] == 3.0


def test_after_a_half_life_of_samples_half_of_a_step_is_left():
    module = constant(1.0, torch.float64)
    average = EMA(module, half_life=600.0, ramp=0.0)
    set_(module, 0.0)
    for i in range(20):
        average.update_(batch_size=30, samples_seen=30 * (i + 1))
    assert average.module.bias.item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("seen, half_life", [(1_000, 50.0), (10_000, 500.0), (20_000, 1000.0), (10**6, 1000.0)])
def test_early_on_the_half_life_is_a_share_of_the_samples_seen(seen, half_life):
    average = EMA(nn.Linear(1, 1), half_life=1000.0, ramp=0.05)
    assert average.decay(batch_size=64, samples_seen=seen) == pytest.approx(0.5 ** (64 / half_life), rel=1e-12)


def test_without_a_half_life_the_average_is_the_module():
    average = EMA(constant(0.0), half_life=0.0)
    assert average.decay(batch_size=1, samples_seen=1) == 0.0


def test_buffers_are_copied_and_the_average_is_never_trained():
    module = nn.BatchNorm1d(3)
    average = EMA(module, half_life=10.0)
    module(torch.randn(8, 3))
    average.update_(batch_size=8, samples_seen=8)
    assert torch.equal(average.module.running_mean, module.running_mean)
    assert average.module.num_batches_tracked == 1
    assert not average.module.training
    assert module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_half_precision_is_averaged_in_float32_where_its_rounding_would_swallow_updates():
    module = constant(1.0, torch.bfloat16)
    average, swallowed = EMA(module, half_life=1000.0, ramp=0.0), copy.deepcopy(module.weight.detach())
    set_(module, 1.0078125)  # the next number in bfloat16
    for i in range(1000):
        average.update_(batch_size=1, samples_seen=i + 1)
        swallowed.lerp_(module.weight.detach(), 1 - 0.5**0.001)
    assert average.module.weight.dtype == torch.float32
    assert average.module.weight[0, 0].item() == pytest.approx(1.0 + 0.0078125 / 2, abs=1e-5)
    assert swallowed[0, 0] == 1.0


def test_a_module_of_mixed_dtypes_keeps_each_at_its_own_or_better():
    module = nn.ModuleList([constant(0.0), constant(0.0, torch.bfloat16), constant(0.0, torch.float64)])
    average = EMA(module, half_life=1.0, ramp=0.0)
    set_(module, 1.0)
    average.update_(batch_size=1, samples_seen=1)
    assert [part.weight.dtype for part in average.module] == [torch.float32, torch.float32, torch.float64]
    assert all(torch.equal(part.weight, torch.full_like(part.weight, 0.5)) for part in average.module)


def test_a_module_without_parameters_is_averaged_too():
    average = EMA(nn.ReLU(), half_life=1.0)
    average.update_(batch_size=1, samples_seen=1)
    assert average.state_dict() == {}


def test_a_restored_average_goes_on_to_the_bit():
    module = nn.Linear(3, 3)
    average = EMA(module, half_life=7.0)
    average.update_(batch_size=2, samples_seen=2)
    stored = copy.deepcopy(average.state_dict())
    restored = EMA(nn.Linear(3, 3), half_life=7.0)
    restored.load_state_dict(stored)
    restored._values = average._values
    for other in (average, restored):
        set_(module, 0.25)
        other.update_(batch_size=2, samples_seen=4)
    assert torch.equal(average.module.weight, restored.module.weight)
