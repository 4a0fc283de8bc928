import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_custom.distributed import take_share
from lightning_custom.errors import ConfigError, NonFiniteError
from lightning_custom.multitask.aggregators import MGDA, UPGrad
from lightning_custom.multitask.gram import gram_matrix
from lightning_custom.multitask.jacobian import (
    Cut,
    aggregate_present,
    feature_gram,
    last_layer_norms,
    mean_rows_,
    remember_,
    set_gradient_,
    task_gradients,
    weighted_backward,
    weights_of_present,
)
from lightning_custom.multitask.surgery import GradVac
from lightning_custom.precision import bare
from lightning_custom.testing import in_processes, single_process

TASKS = ("kind", "place", "size")


def networks():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 7), nn.Tanh())
    heads = {"kind": nn.Linear(7, 4), "place": nn.Linear(7, 2), "size": nn.Sequential(nn.Linear(7, 5), nn.ReLU())}
    return trunk.double(), {task: head.double() for task, head in heads.items()}


def samples(size=8):
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 6, 6, generator=rng, dtype=torch.float64)
    return images, torch.randint(4, (size,), generator=rng)


def task_loss(task, outputs, labels):
    if task == "kind":
        return cross_entropy(outputs, labels)
    return outputs.square().mean() if task == "size" else mse_loss(outputs[:, 0], labels.double())


def whole_loss(trunk, heads, task, images, labels):
    return task_loss(task, heads[task](trunk(images)), labels)


def vector(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def expected_rows(trunk, heads, images, labels):
    """By autograd, of each whole loss."""
    return torch.stack(
        [
            vector(torch.autograd.grad(whole_loss(trunk, heads, task, images, labels), list(trunk.parameters())))
            for task in TASKS
        ]
    )


def cut_and_go_back(trunk, heads, images, labels, *, apart=False):
    """The cuts after the backward pass of the sum of all losses; ``apart`` with a pass for each task."""
    features = trunk(images)
    cuts = {task: Cut(trunk(images) if apart else features) for task in TASKS}
    sum(task_loss(task, heads[task](cut.seen), labels) for task, cut in cuts.items()).backward()
    return list(cuts.values())


@pytest.mark.parametrize("how", ["one after another", "batched", "apart"])
def test_rows_are_the_gradients_of_the_whole_losses_and_heads_keep_their_own(how):
    trunk, heads = networks()
    images, labels = samples()
    expected = expected_rows(trunk, heads, images, labels)
    cuts = cut_and_go_back(trunk, heads, images, labels, apart=how == "apart")
    rows = task_gradients(single_process(), cuts, list(trunk.parameters()), batched=how == "batched")
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-14)
    assert all(parameter.grad is None for parameter in trunk.parameters())
    for task, head in heads.items():
        own = torch.autograd.grad(whole_loss(trunk, heads, task, images, labels), list(head.parameters()))
        torch.testing.assert_close(vector(p.grad for p in head.parameters()), vector(own), rtol=0, atol=1e-14)


def test_graphs_apart_cannot_be_batched():
    trunk, heads = networks()
    cuts = cut_and_go_back(trunk, heads, *samples(), apart=True)
    with pytest.raises(ConfigError, match="batched_backward"):
        task_gradients(single_process(), cuts, list(trunk.parameters()), batched=True)
    with pytest.raises(ConfigError, match="gradients: features of tasks"):
        feature_gram(single_process(), cuts)


def test_features_in_containers_are_cut_too():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, inputs):
            fine = self.first(inputs).tanh()
            return {"fine": fine, "coarse": [self.second(fine), torch.arange(3)]}

    torch.manual_seed(0)
    trunk, inputs = Pyramid(), torch.randn(5, 3)
    losses = [
        lambda seen: seen["fine"].square().sum() + seen["coarse"][0].sum(),
        lambda seen: seen["coarse"][0].exp().mean() * seen["coarse"][1].sum(),
    ]
    parameters = list(trunk.parameters())
    expected = [
        vector(torch.autograd.grad(loss(trunk(inputs)), parameters, allow_unused=True, materialize_grads=True))
        for loss in losses
    ]
    features = trunk(inputs)
    cuts = [Cut(features) for _ in losses]
    for loss, cut in zip(losses, cuts, strict=True):
        loss(cut.seen).backward()
    torch.testing.assert_close(task_gradients(single_process(), cuts, parameters), torch.stack(expected))


def test_features_that_hold_no_tensor_with_a_gradient_are_named():
    class Features:
        def __init__(self, values):
            self.values = values

    trunk, _ = networks()
    for features, kind in ((Features(trunk(samples()[0])), "Features"), (samples()[0], "Tensor")):
        with pytest.raises(ConfigError, match=f"trunk: its features, a {kind}, hold no tensor with a gradient"):
            Cut(features)


@pytest.mark.parametrize("apart", [False, True])
def test_a_weighted_backward_pass_is_the_weighted_sum_of_the_rows(apart):
    trunk, heads = networks()
    images, labels = samples()
    expected = expected_rows(trunk, heads, images, labels)
    weights = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    weighted_backward(cut_and_go_back(trunk, heads, images, labels, apart=apart), weights)
    torch.testing.assert_close(vector(p.grad for p in trunk.parameters()), weights @ expected, rtol=0, atol=1e-14)


def test_the_gram_matrix_at_the_features_is_the_exact_one_of_a_linear_trunk_on_orthonormal_inputs():
    # Then a gradient by the trunk is the one at the features, in another order.
    torch.manual_seed(0)
    trunk = nn.Linear(6, 7, bias=False).double()
    heads = {task: nn.Linear(7, 4).double() for task in TASKS}
    inputs, labels = torch.eye(6, dtype=torch.float64), torch.arange(6) % 4
    cuts = cut_and_go_back(trunk, heads, inputs, labels)
    exact = gram_matrix(task_gradients(single_process(), cuts, list(trunk.parameters())))
    torch.testing.assert_close(feature_gram(single_process(), cuts), exact, rtol=1e-12, atol=1e-14)


def test_the_gram_matrix_at_the_features_bounds_the_exact_one_of_a_linear_trunk():
    torch.manual_seed(0)
    trunk = nn.Linear(6, 7, bias=False).double()
    heads = {task: nn.Linear(7, 4).double() for task in TASKS}
    inputs, labels = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 4
    cuts = cut_and_go_back(trunk, heads, inputs, labels)
    exact = gram_matrix(task_gradients(single_process(), cuts, list(trunk.parameters())))
    largest = torch.linalg.matrix_norm(inputs, 2) ** 2
    difference = largest * feature_gram(single_process(), cuts) - exact
    assert torch.linalg.eigvalsh(difference).min() > -1e-12
    assert not torch.allclose(feature_gram(single_process(), cuts), exact, rtol=0.1)


def test_a_direction_becomes_the_gradient_of_each_parameter():
    trunk, _ = networks()
    parameters = list(trunk.parameters())
    direction = torch.arange(sum(p.numel() for p in parameters), dtype=torch.float64)
    set_gradient_(single_process(), parameters, direction)
    assert torch.equal(vector(p.grad for p in parameters), direction)
    assert [p.grad.shape for p in parameters] == [p.shape for p in parameters]


def test_norms_are_of_the_last_layer_and_leave_the_graph():
    trunk, heads = networks()
    images, labels = samples()
    features = trunk(images)
    losses = torch.stack([task_loss(task, heads[task](features), labels) for task in TASKS])
    norms = last_layer_norms(single_process(), losses, trunk)
    last = list(trunk[3].parameters())
    for i, loss in enumerate(losses):
        assert norms[i] == pytest.approx(float(vector(torch.autograd.grad(loss, last, retain_graph=True)).norm()))
    losses.sum().backward()


ROWS = torch.tensor([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def rng():
    return torch.Generator().manual_seed(0)


def test_an_absent_task_does_not_stop_an_aggregator_for_which_zero_means_still():
    present = [True, False, True]
    direction, weights = aggregate_present(MGDA(), ROWS[present], present, rng())
    expected, expected_weights = aggregate_present(MGDA(), ROWS[present], [True, True], rng())
    assert torch.equal(direction, expected)
    assert torch.equal(weights, torch.tensor([expected_weights[0], 0, expected_weights[1]]))
    assert torch.equal(weights, weights_of_present(MGDA(), gram_matrix(ROWS[present]), present, rng()))
    # What it would do with a row of zeros.
    still, _ = aggregate_present(MGDA(), ROWS * torch.tensor(present)[:, None], [True] * 3, rng())
    assert torch.equal(still, torch.zeros(3, dtype=torch.float64))


def test_a_gradient_that_is_not_finite_is_of_the_task_counted_among_all():
    rows = ROWS.clone()
    rows[2, 0] = torch.inf
    present = [False, True, True]
    for aggregator in (MGDA(), GradVac(3)):
        with pytest.raises(NonFiniteError, match="gradient of task 2 is not finite"):
            aggregate_present(aggregator, rows[present], present, rng())
        with pytest.raises(NonFiniteError, match="gradient of task 2 is not finite"):
            weights_of_present(aggregator, gram_matrix(rows[present]), present, rng())


def test_an_aggregator_that_remembers_keeps_what_it_knows_of_absent_tasks():
    aggregators = [GradVac(3), GradVac(3)]
    present = [True, False, True]
    gram = gram_matrix(ROWS)
    for aggregator in aggregators:
        weights_of_present(aggregator, gram, [True] * 3, rng())
    before = copy.deepcopy(aggregators[0].targets)
    _, weights = aggregate_present(aggregators[0], ROWS[present], present, rng())
    among = gram[present][:, present]
    assert torch.equal(weights, weights_of_present(aggregators[1], among, present, rng()))
    after = aggregators[0].targets
    assert torch.equal(after[1], before[1])
    assert after[0, 2] != before[0, 2]
    assert weights[1] == 0


def test_weights_of_absent_tasks_stay_as_they_were():
    weights = torch.tensor([1.0, 2.0, 3.0])
    remember_(weights, torch.tensor([5.0, 0.0, 7.0]), [True, False, True])
    assert weights.tolist() == [5, 2, 7]
    remember_(weights, None, [True] * 3)
    assert weights.tolist() == [5, 2, 7]


# Several processes


def on_a_share(fabric):
    """Rows and Gram matrix at the features of a batch that is cut by process, its losses as means over the batch."""
    trunk, heads = networks()
    trunk, images, labels = bare(fabric, fabric.setup_module(trunk)), *samples()
    images, labels = take_share(images, fabric), take_share(labels, fabric)
    cuts = cut_and_go_back(trunk, heads, images, labels)
    gram, rows = feature_gram(fabric, cuts), task_gradients(fabric, cuts, list(trunk.module.parameters()))
    of_its_own = aggregate_present(UPGrad(), rows, [True] * 3, rng())[0].unsqueeze(0)
    mean_rows_(fabric, rows)
    mean_rows_(fabric, of_its_own)
    return {"rows": rows, "gram": gram, "surgery, then mean": of_its_own[0]}


@pytest.mark.distributed
def test_rows_and_gram_matrix_of_two_processes_are_those_of_one():
    one, (first, second) = on_a_share(single_process("64-true")), in_processes(on_a_share, 2, precision="64-true")
    for name in ("rows", "gram"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=0, atol=1e-14)
    mean_then_surgery, _ = aggregate_present(UPGrad(), first["rows"], [True] * 3, rng())
    torch.testing.assert_close(mean_then_surgery, one["surgery, then mean"], rtol=0, atol=1e-14)
    # The negative control: surgery on each process and then a mean is another method.
    assert (first["surgery, then mean"] - one["surgery, then mean"]).abs().max() > 1e-3
