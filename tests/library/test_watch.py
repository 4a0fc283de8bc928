"""What Watch records: statistics against their definitions, in the chosen steps only, without a word to the host."""

import copy

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_custom.errors import ConfigError
from lightning_custom.metrics import MetricLogger, read_rows
from lightning_custom.testing import single_process
from lightning_custom.watch import Watch

LR = 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)


def train(model, steps=1, *, every=1, folder=None, histograms=True):
    metrics = MetricLogger(single_process(), folder)
    metrics.resume_at(None)
    watch = Watch(model, every=every, histograms=histograms)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    inputs, targets = data()
    for step in range(1, steps + 1):
        watch.begin(step)
        optimizer.zero_grad()
        mse_loss(model(inputs), targets).backward()
        optimizer.step()
        watch.end(metrics)
    return metrics.latest


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_statistics_equal_their_definitions():
    model = network()
    before = copy.deepcopy(model)
    found = train(model)
    inputs, _ = data()
    layers = {"0": model[0], "2.0": model[2][0]}
    with torch.no_grad():
        first = before[0](inputs)
        outputs = {"0": first, "2.0": before[2][0](first.relu())}
    expected = {}
    for name, layer in layers.items():
        weights = flat(layer.parameters()).norm()
        gradient = flat([parameter.grad for parameter in layer.parameters()]).norm()
        output = outputs[name].numpy()
        expected |= {
            f"watch/activation_mean/{name}": output.mean(),
            f"watch/activation_std/{name}": output.std(),
            f"watch/activation_dead/{name}": (output <= 0).all(axis=0).mean(),
            f"watch/grad_norm/{name}": gradient,
            f"watch/weight_norm/{name}": weights,
            # Of plain SGD the update is the gradient times the learning rate.
            f"watch/update_ratio/{name}": LR * gradient / weights,
        }
    assert found == pytest.approx({tag: float(value) for tag, value in expected.items()}, rel=1e-5)


def test_units_that_never_fire_are_dead():
    model = network()
    model[0].bias.data[:3] = -100.0
    model[0].bias.data[3] = 100.0
    assert train(model)["watch/activation_dead/0"] == 0.75


def test_a_batch_of_one_output_has_no_spread():
    model = nn.Linear(3, 1)
    metrics = MetricLogger(single_process(), None)
    watch = Watch(model, every=1)
    watch.begin(1)
    model(torch.ones(1, 3)).sum().backward()
    watch.end(metrics)
    assert metrics.latest["watch/activation_std/model"] == 0.0


def test_a_frozen_layer_has_no_gradient_norm_and_no_update():
    model = network()
    model[0].requires_grad_(False)
    found = train(model)
    assert "watch/grad_norm/0" not in found
    assert found["watch/update_ratio/0"] == 0.0
    assert found["watch/update_ratio/2.0"] > 0.0


def test_only_the_chosen_steps_have_rows(tmp_path):
    train(network(), 7, every=3, folder=tmp_path)
    assert [row["step"] for row in read_rows(tmp_path)] == [3, 6]


def test_never_where_every_is_0(tmp_path):
    assert train(network(), 4, every=0, folder=tmp_path) == {}
    assert not (tmp_path / "metrics.jsonl").exists()


def test_no_hook_is_left_between_chosen_steps():
    model = network()
    metrics, watch = MetricLogger(single_process(), None), Watch(model, every=2)
    hooks = []
    for step in (1, 2, 3):
        watch.begin(step)
        hooks.append(sum(len(part._forward_hooks) for part in model.modules()))
        model(data()[0]).sum().backward()
        watch.end(metrics)
    assert hooks == [0, 2, 0]


def test_watching_changes_no_bit_of_the_training():
    watched, plain = network(), network()
    train(watched, 5)
    train(plain, 5, every=0)
    assert torch.equal(flat(watched.parameters()), flat(plain.parameters()))


def test_histograms_hold_every_weight_and_gradient(tmp_path):
    train(network(), 2, every=2, folder=tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    numbers = {
        tag: [(event.step, event.histogram_value.num) for event in events.Histograms(tag)]
        for tag in events.Tags()["histograms"]
    }
    assert numbers == {
        f"watch/{kind}/{name}": [(2, count)]
        for kind in ("weights", "gradients")
        for name, count in {"0": 3 * 4 + 4, "2.0": 4 * 2 + 2}.items()
    }


class HostSyncs(TorchDispatchMode):
    """Counts the operations that fetch a number from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


def test_nothing_is_fetched_from_the_device_between_begin_and_end():
    model, metrics = network(), MetricLogger(single_process(), None)
    watch = Watch(model, every=1)
    with HostSyncs() as syncs:
        watch.begin(1)
        output = model(data()[0]).sum()
        output.backward()
        assert syncs.count == 0
        output.item()
        assert syncs.count == 1
    watch.end(metrics)
    assert metrics.latest


def test_a_compiled_model_which_calls_no_hooks_is_refused():
    model = network()
    model[0].compile(backend="eager")
    Watch(model, every=0)
    with pytest.raises(ConfigError, match="watch_every: 3, but a compiled model calls no hooks; set it to 0"):
        Watch(model, every=3)
