import copy
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_custom.errors import ConfigError
from lightning_custom.task_norm import (
    BatchStatisticsNorm,
    PerStepNorm,
    per_step_norms,
    require_safe_norms,
    set_inner_step_,
    statistics_from,
    unsafe_norms,
    update_running_statistics_,
    with_batch_statistics,
    with_per_step_norm,
)
from lightning_custom.testing import in_processes, single_process


def numbers(*shape, seed=0, dtype=torch.float64):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 1


def norm_like(reference):
    """Ours and torch's with the same weight and bias, away from 1 and 0."""
    ours = BatchStatisticsNorm(reference.num_features, affine=reference.affine).double()
    if reference.affine:
        with torch.no_grad():
            for seed, parameter in enumerate((reference.weight, reference.bias)):
                parameter.copy_(numbers(*parameter.shape, seed=seed))
            ours.load_state_dict(reference.state_dict())
    return ours


TORCHS = {
    "[B, C]": (nn.BatchNorm1d, (6, 4)),
    "[B, C, L]": (nn.BatchNorm1d, (3, 4, 5)),
    "[B, C, H, W]": (nn.BatchNorm2d, (3, 4, 5, 2)),
    "one sample": (nn.BatchNorm2d, (1, 4, 5, 2)),
    "[B, C, D, H, W]": (nn.BatchNorm3d, (2, 4, 3, 2, 2)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind, shape", TORCHS.values(), ids=TORCHS)
def test_outputs_and_gradients_are_those_of_torch(kind, shape, affine):
    reference = kind(4, affine=affine, track_running_stats=False).double()
    ours = norm_like(reference)
    results = []
    for norm in (reference, ours):
        inputs = numbers(*shape, seed=2).requires_grad_()
        outputs = norm(inputs)
        (outputs.sin() * numbers(*shape, seed=3)).sum().backward()
        results.append([outputs, inputs.grad, *(parameter.grad for parameter in norm.parameters())])
    assert len(results[1]) == (4 if affine else 2)
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_training_and_evaluation_are_alike_and_leave_no_trace():
    norm = BatchStatisticsNorm(4).double()
    inputs = numbers(5, 4)
    outputs = norm(inputs)
    assert torch.equal(norm.eval()(inputs), outputs)
    assert list(norm.buffers()) == []
    assert list(norm.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("seen", [None, 2])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2, 1)], ids=str)
def test_second_derivatives_are_finite_differences(shape, seen):
    norm = BatchStatisticsNorm(shape[1]).double()
    norm.statistics_from = seen

    def normalised(inputs, weight, bias):
        return functional_call(norm, {"weight": weight, "bias": bias}, (inputs,))

    inputs = [part.requires_grad_() for part in (numbers(*shape), numbers(shape[1], seed=1), numbers(shape[1], seed=2))]
    assert torch.autograd.gradcheck(normalised, inputs)
    assert torch.autograd.gradgradcheck(normalised, inputs)


def outer_loss(model, inputs, targets):
    """Of parameters: the mean over tasks of the loss after one inner step, all tasks under ``vmap``."""

    def loss(parameters, x, y):
        return (functional_call(model, parameters, (x,)).sin() - y).square().mean()

    def task(parameters, x, y):
        gradients = grad(loss)(parameters, x, y)
        adapted = {name: value - 0.1 * gradients[name] for name, value in parameters.items()}
        return loss(adapted, x.flip(0), y)

    return lambda parameters: vmap(task, (None, 0, 0))(parameters, inputs, targets).mean()


def second_order_error(norm, seen=None):
    """The largest difference between the outer gradient and central differences, relative to the largest gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), norm).double()
    outer = outer_loss(model, numbers(3, 4, 2, 3, 3), numbers(3, 4, 3, 3, 3, seed=1))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with statistics_from(model, seen):
        gradients = grad(outer)(parameters)
        weight, step = parameters["0.weight"], 1e-5
        differences = []
        for i in range(0, weight.numel(), 5):
            shift = torch.zeros_like(weight)
            shift.view(-1)[i] = step
            higher, lower = (
                outer(parameters | {"0.weight": weight + shift}),
                outer(parameters | {"0.weight": weight - shift}),
            )
            differences.append((higher - lower) / (2 * step))
    found = gradients["0.weight"].flatten()[::5]
    return (torch.stack(differences) - found).abs().max() / found.abs().max()


@pytest.mark.parametrize("seen", [None, 2])
def test_second_order_under_vmap_is_finite_differences(seen):
    assert second_order_error(BatchStatisticsNorm(3), seen) < 1e-8


def test_second_order_under_vmap_of_torchs_own_layer_is_not():
    """Why the layer exists; where this fails, torch has been mended and the layer may go."""
    assert second_order_error(nn.BatchNorm2d(3, track_running_stats=False)) > 1e-4


def test_statistics_come_from_the_first_samples_alone():
    support, query = numbers(3, 2, 4, 4), 5 * numbers(4, 2, 4, 4, seed=1) + 7
    norm = norm_like(nn.BatchNorm2d(2, track_running_stats=False).double())
    with statistics_from(norm, 3):
        outputs = norm(torch.cat([support, query]))
        alone = [norm(torch.cat([support, sample.unsqueeze(0)]))[3] for sample in query]
    for channel in range(2):
        values = support[:, channel].flatten()
        mean = values.sum() / 48
        variance = ((values - mean) ** 2).sum() / 48
        for samples, found in ((support, outputs[:3]), (query, outputs[3:])):
            expected = (samples[:, channel] - mean) / (variance + 1e-5) ** 0.5
            expected = expected * norm.weight[channel] + norm.bias[channel]
            assert torch.allclose(found[:, channel], expected, rtol=0, atol=1e-12)
    assert torch.allclose(torch.stack(alone), outputs[3:], rtol=0, atol=1e-12)
    # Without, query samples do see each other.
    together = norm(torch.cat([support, query]))[3:]
    assert not torch.allclose(norm(torch.cat([support, query[:1]]))[3], together[0])


def test_the_block_sets_every_layer_and_restores_each_even_after_an_error():
    model = nn.Sequential(BatchStatisticsNorm(2), nn.Sequential(nn.ReLU(), BatchStatisticsNorm(2)))
    model[0].statistics_from = 5
    inside = []
    with suppress(KeyError), statistics_from(model, 3):
        inside = [model[0].statistics_from, model[1][1].statistics_from]
        with statistics_from(model, None):
            inside.append(model[0].statistics_from)
        inside.append(model[0].statistics_from)
        raise KeyError
    assert inside == [3, 3, None, 3]
    assert (model[0].statistics_from, model[1][1].statistics_from) == (5, None)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_half_precision_has_statistics_in_float32(dtype, tolerance):
    inputs = numbers(64, 3, 4, 4, dtype=torch.float32) + 200
    norm = BatchStatisticsNorm(3)
    exact = norm(inputs.to(dtype).float())
    found = norm(inputs.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() < tolerance
    assert exact.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "norm, listed",
    [
        (nn.BatchNorm1d(2), "1 (BatchNorm1d)"),
        (nn.BatchNorm2d(2), "1 (BatchNorm2d)"),
        (nn.SyncBatchNorm(2), "1 (SyncBatchNorm)"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "1 (InstanceNorm2d)"),
        (nn.BatchNorm2d(2).eval(), None),
        (nn.BatchNorm2d(2, track_running_stats=False), None),
        (nn.InstanceNorm2d(2), None),
        (nn.GroupNorm(1, 2), None),
        (BatchStatisticsNorm(2), None),
    ],
)
def test_layers_that_write_running_statistics_are_unsafe(norm, listed):
    model = nn.Sequential(nn.Identity(), norm)
    assert unsafe_norms(model) == ([] if listed is None else [listed])


def test_unsafe_layers_are_refused_by_name_with_the_remedies():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(2)))
    with pytest.raises(
        ConfigError, match=r"in 0 \(BatchNorm1d\), 1.0 \(BatchNorm2d\); .*track_running_stats=False, or"
    ):
        require_safe_norms(model)
    with pytest.raises(ConfigError, match=r"the model itself \(BatchNorm1d\)"):
        require_safe_norms(model[0])
    require_safe_norms(model.eval())
    require_safe_norms(with_batch_statistics(model.train()))


def test_replaced_layers_compute_what_batch_norm_does_in_training():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), shared, nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), shared), nn.Flatten(), nn.Linear(12, 4)
    )
    model.append(nn.BatchNorm1d(4, eps=1e-3, affine=False)).double()
    with torch.no_grad():
        shared.weight.copy_(numbers(3))
    parameters, before = dict(model.named_parameters()), copy.deepcopy(model)
    replaced = with_batch_statistics(model)
    assert replaced is model
    assert isinstance(model[1], BatchStatisticsNorm)
    assert model[3][1] is model[1]
    assert isinstance(model[6], BatchStatisticsNorm)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    inputs = numbers(5, 2, 4, 4)
    assert torch.allclose(model(inputs), before(inputs), rtol=0, atol=1e-12)
    assert list(model.buffers()) == []


def test_a_model_that_is_one_layer_is_replaced_whole():
    layer = nn.BatchNorm1d(3).eval()
    norm = with_batch_statistics(layer)
    assert isinstance(norm, BatchStatisticsNorm)
    assert norm.weight is layer.weight
    assert not norm.training


def test_what_has_no_statistics_is_refused():
    norm = BatchStatisticsNorm(3)
    with pytest.raises(ConfigError, match=r"inputs: shape \(1, 3\) with statistics of one value a channel; give more"):
        norm(torch.zeros(1, 3))
    with pytest.raises(ConfigError, match=r"inputs: shape \(4, 2\); give \[samples, 3, ...\]"):
        norm(torch.zeros(4, 2))
    with pytest.raises(ConfigError, match=r"inputs: shape \(3,\); give \[samples, 3, ...\]"):
        norm(torch.zeros(3))
    with statistics_from(norm, 5), pytest.raises(ConfigError, match="statistics_from: 5, but there are 4 samples"):
        norm(torch.zeros(4, 3))
    with pytest.raises(ConfigError, match="statistics_from: 0; give the number"), statistics_from(norm, 0):
        pass


def test_statistics_of_the_first_samples_are_refused_beside_layers_that_would_take_those_of_all():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), BatchStatisticsNorm(2))
    for training in (True, False):
        with (
            pytest.raises(ConfigError, match=r"^batch_statistics: support, but 1 \(BatchNorm1d\) can only take those"),
            statistics_from(model.train(training), 3),
        ):
            pass
    with statistics_from(model, None):
        pass
    for allowed in (nn.BatchNorm1d(2).eval(), nn.InstanceNorm1d(2), nn.GroupNorm(1, 2)):
        with statistics_from(nn.Sequential(allowed, BatchStatisticsNorm(2)), 3):
            pass
    with statistics_from(with_batch_statistics(model), 3):
        inputs = numbers(5, 2, dtype=torch.float32)
        assert torch.equal(model(inputs)[:3], model(torch.cat([inputs[:3], inputs[4:] + 9]))[:3])


# A set of parameters and statistics for each inner step


def per_step(num_steps=3, channels=4):
    norm = PerStepNorm(channels, num_steps).double()
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(numbers(*parameter.shape, seed=seed))
    return norm


@pytest.mark.parametrize("kind, shape", TORCHS.values(), ids=TORCHS)
def test_each_step_is_torchs_layer_with_the_parameters_of_that_step(kind, shape):
    norm = per_step()
    for step in (2, 0, 1):
        reference = kind(4, track_running_stats=False).double()
        reference.load_state_dict({"weight": norm.weight[step], "bias": norm.bias[step]})
        set_inner_step_(norm, step)
        results = []
        for layer in (reference, norm):
            inputs = numbers(*shape, seed=2).requires_grad_()
            outputs = layer(inputs)
            parameters = list(layer.parameters())
            results.append([outputs, *torch.autograd.grad(outputs.sin().sum(), [inputs, *parameters])])
        rest = [part[torch.arange(3) != step] for part in results[1][2:]]
        assert all(part.abs().sum() == 0 for part in rest)
        results[1][2:] = [part[step] for part in results[1][2:]]
        for expected, found in zip(*results, strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_steps_past_the_last_are_the_last():
    norm = per_step()
    outputs = []
    for step in (2, 3, 40, 1):
        set_inner_step_(nn.Sequential(norm), step)
        outputs.append(norm(numbers(5, 4)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[3])


@pytest.mark.parametrize("statistics", ["batch", "collect", "running"])
def test_second_derivatives_of_a_step_are_finite_differences(statistics):
    norm = PerStepNorm(3, 2).double()
    norm.running_mean.copy_(numbers(2, 3, seed=4))
    norm.running_var.copy_(numbers(2, 3, seed=5).square() + 0.5)
    set_inner_step_(norm, 1, statistics)

    def normalised(inputs, weight, bias):
        return functional_call(norm, {"weight": weight, "bias": bias}, (inputs,))

    inputs = [part.requires_grad_() for part in (numbers(4, 3), numbers(2, 3, seed=1), numbers(2, 3, seed=2))]
    assert torch.autograd.gradcheck(normalised, inputs)
    assert torch.autograd.gradgradcheck(normalised, inputs)


@pytest.mark.parametrize("kind, shape", TORCHS.values(), ids=TORCHS)
def test_running_statistics_after_one_pass_and_outputs_with_them_are_torchs(kind, shape):
    reference, norm = kind(4).double(), PerStepNorm(4, 2).double()
    for seed in range(3):
        reference(numbers(*shape, seed=seed))
        set_inner_step_(norm, 1, "collect")
        norm(numbers(*shape, seed=seed))
        update_running_statistics_(single_process(), norm)
    assert torch.allclose(norm.running_mean[1], reference.running_mean, rtol=0, atol=1e-12)
    assert torch.allclose(norm.running_var[1], reference.running_var, rtol=0, atol=1e-12)
    assert torch.equal(norm.running_mean[0], torch.zeros(4, dtype=torch.float64))
    set_inner_step_(norm, 1, "running")
    inputs = numbers(*shape, seed=9)
    assert torch.allclose(norm(inputs), reference.eval()(inputs), rtol=0, atol=1e-12)
    # A single sample has no statistics of its own.
    assert torch.allclose(norm(inputs[:1]), reference(inputs[:1]), rtol=0, atol=1e-12)


def collected(order, *, together=False):
    """The statistics that a layer has after a pass of each of four tasks, for two steps."""
    norm, tasks = PerStepNorm(3, 2).double(), numbers(4, 5, 3, 2, 2)
    for step in range(2):
        set_inner_step_(norm, step, "collect")
        inputs = (1 + step) * tasks[order]
        if together:
            vmap(norm)(inputs)
        else:
            for task in inputs:
                norm(task)
    return norm


def test_running_statistics_do_not_depend_on_the_order_of_tasks_or_whether_they_are_one_pass():
    norms = [collected([0, 1, 2, 3]), collected([3, 1, 0, 2]), collected([0, 1, 2, 3], together=True)]
    for norm in norms:
        update_running_statistics_(single_process(), norm)
    tasks = numbers(4, 5, 3, 2, 2)
    for norm in norms:
        assert torch.allclose(norm.running_mean[0], 0.1 * tasks.mean((0, 1, 3, 4)), rtol=0, atol=1e-12)
        variance = torch.stack([task.var((0, 2, 3)) for task in tasks]).mean(0)
        assert torch.allclose(norm.running_var[0], 0.9 + 0.1 * variance, rtol=0, atol=1e-12)
        assert torch.allclose(norm.running_mean[1], 2 * norm.running_mean[0], rtol=0, atol=1e-12)
    # torch's own layer depends on it.
    orders = [nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()]
    for layer, order in zip(orders, ([0, 1, 2, 3], [3, 1, 0, 2]), strict=True):
        for task in tasks[order]:
            layer(task)
    assert not torch.allclose(orders[0].running_mean, orders[1].running_mean)


def test_what_was_collected_is_used_once_and_a_pass_alone_changes_nothing():
    norm = collected([0, 1, 2, 3])
    assert torch.equal(norm.running_mean, torch.zeros(2, 3, dtype=torch.float64))
    update_running_statistics_(single_process(), norm)
    before = norm.running_mean.clone()
    for statistics in ("batch", "running"):
        set_inner_step_(norm, 0, statistics)
        norm(numbers(5, 3))
        update_running_statistics_(single_process(), norm)
    assert torch.equal(norm.running_mean, before)


def statistics_of_a_share(fabric):
    norm = collected([[0, 1, 2], [3]][fabric.global_rank])
    update_running_statistics_(fabric, norm)
    return [norm.running_mean, norm.running_var]


@pytest.mark.distributed
def test_two_processes_with_unequal_shares_have_the_statistics_of_one():
    norm = collected([0, 1, 2, 3])
    update_running_statistics_(single_process(), norm)
    for found in in_processes(statistics_of_a_share, 2):
        assert torch.allclose(found[0], norm.running_mean, rtol=0, atol=1e-14)
        assert torch.allclose(found[1], norm.running_var, rtol=0, atol=1e-14)


def test_replaced_layers_start_each_step_as_the_layer_was():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, eps=1e-3)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), shared, nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), shared))
    model.append(BatchStatisticsNorm(3)).append(nn.BatchNorm2d(3, affine=False)).append(nn.GroupNorm(1, 3)).double()
    with torch.no_grad():
        shared.weight.copy_(numbers(3))
        model[4].bias.copy_(numbers(3, seed=1))
    inputs = numbers(5, 2, 4, 4)
    before = model(inputs)
    replaced = with_per_step_norm(model, 2)
    assert replaced is model
    assert list(per_step_norms(model)) == ["1", "4", "5"]
    assert model[3][1] is model[1]
    assert isinstance(model[6], nn.GroupNorm)
    for step in range(2):
        set_inner_step_(model, step)
        assert torch.allclose(model(inputs), before, rtol=0, atol=1e-12)
    require_safe_norms(model)
    layers = list(per_step_norms(model).values())
    assert list(per_step_norms(with_per_step_norm(model, 5)).values()) == layers
    assert isinstance(with_per_step_norm(nn.BatchNorm1d(3), 4), PerStepNorm)


def test_a_frozen_layer_is_frozen_at_every_step():
    norm = nn.BatchNorm2d(3)
    norm.weight.requires_grad_(False)
    replaced = with_per_step_norm(norm, 2)
    assert (replaced.weight.requires_grad, replaced.bias.requires_grad) == (False, True)


def test_a_step_with_one_value_a_channel_is_refused():
    with pytest.raises(ConfigError, match=r"inputs: shape \(1, 3\) with statistics of one value a channel; give more"):
        PerStepNorm(3, 2)(torch.zeros(1, 3))
