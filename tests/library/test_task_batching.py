"""Several tasks at once are the tasks one after another, whatever the network and whichever parameters are theirs."""

from collections import OrderedDict

import pytest
import torch
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss

from lightning_custom.errors import ConfigError
from lightning_custom.precision import Bare, FullDouble
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.task_norm import BatchStatisticsNorm

TASKS, SAMPLES = 3, 5
ACTIVATION = nn.Tanh()


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 2))


class Gate(nn.Module):
    """Not a sequence."""

    def __init__(self):
        super().__init__()
        self.value, self.gate = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)

    def forward(self, inputs):
        return self.value(inputs) * self.gate(inputs).sigmoid()


SEQUENCES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 2)),
    "no biases": lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.SiLU(), nn.Linear(6, 2, bias=False)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ELU()), nn.Linear(6, 2)),
    "named": lambda: nn.Sequential(OrderedDict(trunk=nn.Linear(4, 6), act=nn.GELU(), head=nn.Linear(6, 2))),
    "one activation throughout": lambda: nn.Sequential(
        nn.Linear(4, 6), ACTIVATION, nn.Linear(6, 6), ACTIVATION, nn.Linear(6, 2)
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Softplus(), nn.Linear(6, 2)),
    "plain layer norm": lambda: nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 2)),
}  # fmt: skip
OTHERS = {
    "tied": tied,
    "not a sequence": Gate,
    "a layer without a rule": lambda: nn.Sequential(nn.Linear(4, 6), nn.Mish(), nn.Linear(6, 2)),
    "a subclass": lambda: nn.Sequential(type("Doubled", (nn.Linear,), {})(4, 2)),
    "batch statistics": lambda: nn.Sequential(nn.Linear(4, 6), BatchStatisticsNorm(6), nn.Linear(6, 2)),
}
OF_IMAGES = {
    "flattened images": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 2)),
    "images flattened from behind": lambda: nn.Sequential(nn.Flatten(-3, -1), nn.LayerNorm(18), nn.Linear(18, 2)),
    "layer norm over images": lambda: nn.Sequential(nn.LayerNorm([2, 3, 3]), nn.Flatten(), nn.Linear(18, 2)),
    "rows of images": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
}
NETWORKS = SEQUENCES | OTHERS | OF_IMAGES
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name):
    torch.manual_seed(0)
    module = NETWORKS[name]().double()
    shape = (2, 3, 3) if name in OF_IMAGES else (4,)
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(TASKS, SAMPLES, *shape, generator=draw, dtype=torch.float64)
    own = {
        key: torch.randn(TASKS, *part.shape, generator=draw, dtype=torch.float64)
        for key, part in module.named_parameters()
    }
    return module, inputs, own


def by_hand(module, inputs, parameters):
    """Each task by functional_call alone; those of ``parameters`` without a task axis are shared."""
    dims = {name: part.dim() for name, part in module.named_parameters()}
    return torch.stack([
        functional_call(
            module, {key: part[task] if part.dim() > dims[key] else part for key, part in parameters.items()}, samples
        )
        for task, samples in enumerate(inputs)
    ])  # fmt: skip


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("together", [True, False])
@every_network
def test_outputs_are_each_tasks_own(name, together):
    module, inputs, own = made(name)
    outputs = TaskModel(Bare(module, Precision()), together=together)(inputs, own)
    assert outputs.shape == (TASKS, SAMPLES, 2)
    assert_close(outputs, by_hand(module, inputs, own))


@pytest.mark.parametrize("together", [True, False])
@every_network
def test_any_of_the_parameters_may_be_shared(name, together):
    module, inputs, own = made(name)
    model = TaskModel(Bare(module, Precision()), together=together)
    shared = dict(module.named_parameters())
    for key in own:
        for parameters in ({**own, key: shared[key]}, {**shared, key: own[key]}):
            assert_close(model(inputs, parameters), by_hand(module, inputs, parameters))


@pytest.mark.parametrize("together", [True, False])
@every_network
def test_parameters_that_are_not_given_are_the_networks(name, together):
    module, inputs, own = made(name)
    first, *_ = own
    model = TaskModel(Bare(module, Precision()), together=together)
    assert_close(model(inputs, {first: own[first]}), by_hand(module, inputs, {first: own[first]}))


@every_network
def test_gradients_are_those_of_each_task_alone(name):
    module, inputs, own = made(name)
    leaves = [part.requires_grad_() for part in own.values()]
    model = TaskModel(Bare(module, Precision()), together=True)
    found = torch.autograd.grad(model(inputs, own).square().sum(), leaves)
    expected = torch.autograd.grad(by_hand(module, inputs, own).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name, batched", [*((name, True) for name in SEQUENCES), *((name, False) for name in OTHERS)])
def test_sequences_are_batched_products_and_other_networks_are_vmapped(name, batched, monkeypatch):
    calls = []

    def counted(function, **options):
        calls.append(options)
        return torch.func.vmap(function, **options)

    monkeypatch.setattr("lightning_custom.task_batching.vmap", counted)
    module, inputs, own = made(name)
    TaskModel(Bare(module, Precision()), together=True)(inputs, own)
    assert len(calls) == (0 if batched else 1)


def test_the_networks_hooks_are_called():
    module, inputs, own = made("nested")
    model, seen = TaskModel(Bare(module, Precision()), together=True), []
    module[0][0].register_forward_hook(lambda layer, given, output: seen.append(output.shape))
    assert_close(model(inputs, own), by_hand(module, inputs, own))
    assert seen[0] == (SAMPLES, 6)  # one task's, as the network itself would see them


class Attending(nn.Module):
    """A layer of a transformer over sequences of four numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs).mean(1)


def test_a_transformer_in_evaluation_mode_has_the_gradients_of_each_task_alone():
    torch.manual_seed(0)
    module = Attending().double().eval()
    inputs = torch.randn(TASKS, SAMPLES, 3, 4, dtype=torch.float64)
    own = {name: part.expand(TASKS, *part.shape) for name, part in module.named_parameters()}
    found = []
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for outputs in (TaskModel(Bare(module, Precision()), together=True)(inputs, own), by_hand(module, inputs, own)):
            slopes = torch.autograd.grad(outputs.square().sum(), list(module.parameters()), create_graph=True)
            total = sum(slope.square().sum() for slope in slopes)
            found.append(torch.autograd.grad(total, list(module.parameters()), materialize_grads=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 2, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs)[0]


class Branching(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


@pytest.mark.parametrize("make", [Recurrent, lambda: Branching(4, 2)])
def test_a_network_that_vmap_cannot_compute_is_refused_with_the_remedy_which_helps(make):
    module, inputs = make(), torch.ones(TASKS, SAMPLES, 3, 4)
    own = {name: part.expand(TASKS, *part.shape) for name, part in module.named_parameters()}
    with pytest.raises(ConfigError, match=r"^task_batching: vmap cannot compute this network \(.*\); use loop$"):
        TaskModel(Bare(module, Precision()), together=True)(inputs, own)
    assert TaskModel(Bare(module, Precision()), together=False)(inputs, own).shape == (TASKS, SAMPLES, 3, 2)


def test_an_error_of_the_network_itself_is_told_as_it_is():
    module, inputs, own = made("not a sequence")
    with pytest.raises(RuntimeError, match="Expected size for first two dimensions"):
        TaskModel(Bare(module, Precision()), together=True)(inputs[..., :3], own)


@pytest.mark.parametrize("together", [True, False])
def test_a_network_of_several_outputs_is_refused_with_the_remedy(together):
    class Two(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs), inputs

    module = Two(4, 2)
    own = {name: part.expand(TASKS, *part.shape) for name, part in module.named_parameters()}
    with pytest.raises(ConfigError, match=r"^model: gives a tuple, where an inner loop needs one tensor; concatenate"):
        TaskModel(Bare(module, Precision()), together=together)(torch.zeros(TASKS, SAMPLES, 4), own)


def test_tasks_have_dropout_of_their_own():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 40, bias=False))
    parameters = {"1.weight": torch.eye(40)}
    outputs = TaskModel(Bare(module, Precision()), together=True)(torch.ones(2, 1, 40), parameters)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "precision, error",
    [(FullDouble(), 0.0), (MixedPrecision("bf16-mixed", "cpu"), 0.02)],
    ids=["64-true", "bf16-mixed"],
)
def test_both_ways_compute_in_the_precision_of_the_run(precision, error, together):
    module, inputs, own = made("nested")
    exact = by_hand(module, inputs, own)
    if error:
        module, own = module.float(), {key: part.float() for key, part in own.items()}
    outputs = TaskModel(Bare(module, precision), together=together)(inputs.float() if error else inputs, own)
    assert outputs.dtype == (torch.float32 if error else torch.float64)
    difference = float((outputs - exact).norm() / exact.norm())
    assert error / 100 <= difference <= error if error else difference <= 1e-15


# Losses


@pytest.mark.parametrize("loss", [None, mse_loss, smooth_l1_loss])
def test_losses_of_numbers_are_each_tasks_own(loss):
    outputs, targets = torch.randn(2, TASKS, SAMPLES, 2, generator=torch.Generator().manual_seed(0)).unbind()
    expected = [(loss or mse_loss)(one, other) for one, other in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(per_task(loss)(outputs, targets), torch.stack(expected))


@pytest.mark.parametrize("loss", [None, cross_entropy, lambda outputs, targets: cross_entropy(outputs, targets)])
def test_losses_of_classes_are_each_tasks_own(loss):
    outputs = torch.randn(TASKS, SAMPLES, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(TASKS * SAMPLES).view(TASKS, SAMPLES) % 4
    expected = [cross_entropy(one, other) for one, other in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(per_task(loss)(outputs, targets), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_classes_may_be_of_any_integers(dtype):
    outputs = torch.randn(TASKS, SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(TASKS * SAMPLES).view(TASKS, SAMPLES) % 2
    torch.testing.assert_close(per_task(None)(outputs, targets.to(dtype)), per_task(None)(outputs, targets))


def of_known(outputs, targets):
    known = ~targets.isnan()
    return (outputs - targets)[known].square().mean()


def of_close(outputs, targets):
    distance = (outputs - targets).square().mean()
    return distance if distance.item() < 2 else distance.log()


@pytest.mark.parametrize("loss", [of_known, of_close])
def test_a_loss_may_look_at_values_though_vmap_may_not(loss):
    outputs, targets = torch.randn(2, TASKS, SAMPLES, 2, generator=torch.Generator().manual_seed(0)).unbind()
    if loss is of_known:
        targets[0, 2] = targets[1, 3:] = torch.nan
    expected = torch.stack([loss(*task) for task in zip(outputs, targets, strict=True)])
    with pytest.warns(UserWarning, match=r"loss: a task after another, as vmap cannot compute it \("):
        found = per_task(loss)(outputs, targets)
    torch.testing.assert_close(found, expected)


def test_an_error_of_the_loss_itself_is_not_taken_for_vmaps():
    def wrong(outputs, targets):
        calls.append(outputs)
        return (outputs @ targets).mean()

    calls = []
    with pytest.raises(RuntimeError, match="Expected size for first two dimensions"):
        per_task(wrong)(torch.zeros(TASKS, 2, 3), torch.zeros(TASKS, 2, 3))
    assert len(calls) == 1


@pytest.mark.parametrize("tasks", [1, TASKS])
def test_a_loss_of_each_sample_is_refused_and_not_summed(tasks):
    outputs = torch.zeros(tasks, SAMPLES, 2)
    with pytest.raises(ConfigError, match=r"^loss: shape \(5, 2\) of a task; give the mean over its samples$"):
        per_task(nn.MSELoss(reduction="none"))(outputs, outputs)


def test_targets_of_another_shape_than_the_outputs_are_refused_and_not_broadcast():
    with pytest.raises(ConfigError, match=r"targets: shape \(1, 5\), but the model's outputs have \(1, 5, 1\)"):
        per_task(None)(torch.zeros(1, 5, 1), torch.zeros(1, 5))
