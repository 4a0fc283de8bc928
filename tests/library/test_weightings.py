import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from lightning_custom.distributed import mean_gradients_, sum_over_processes, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed
from lightning_custom.multitask.weighting import Weighting
from lightning_custom.multitask.weightings import WEIGHTINGS
from lightning_custom.state import capture, mismatches, restore_
from lightning_custom.testing import first_difference, in_processes, largest_difference

TASKS = ("left", "right", "depth")
FIXED = {"left": 0.5, "right": 2.0, "depth": 1.0}
OPTIONS = {"static": {"fixed": FIXED}, "dwa": {"window": 3}}

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)


def make(name, tasks=TASKS):
    return WEIGHTINGS[name](tasks, **OPTIONS.get(name, {}))


def step_generator(k):
    return torch.Generator().manual_seed(hash_seed(0, k))


def losses_of_step(k, size=3):
    return torch.rand(size, dtype=torch.float64, generator=step_generator(k)) + 0.2


def step(weighting, k, losses=None, generator=None, present=None):
    """One whole step of ``weighting`` on losses without a network: the learned ones move, by hand or by a hook."""
    losses = losses_of_step(k) if losses is None else losses
    total = weighting(losses, losses, generator or step_generator(k), present)
    parameters = list(weighting.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(total, parameters) if parameters else (), strict=True
    ):
        parameter.data -= 0.1 * gradient
    weighting.after_backward(3 * losses.flip(0))
    weighting.after_update(losses * torch.linspace(0.5, 0.9, len(losses), dtype=torch.float64, device=losses.device))
    return weighting.weights


def after(name, steps):
    weighting = make(name)
    for k in range(steps):
        step(weighting, k)
    return weighting


def adam(values, gradient, moments, updates, lr=0.025):
    """The update as Kingma and Ba 2015 write it."""
    moments[0] = 0.9 * moments[0] + 0.1 * gradient
    moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
    corrected = moments[0] / (1 - 0.9**updates), moments[1] / (1 - 0.999**updates)
    return values - lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


# What every weighting has in common


@every_weighting
def test_the_gradient_is_the_sum_of_the_weighted_task_gradients(name):
    weighting = after(name, 7)
    point = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[1.0, 2.0, 0.5], [-0.4, 1.0, 0.1], [0.2, 0.7, -1.0]], dtype=torch.float64)
    losses = (matrix @ point).square() + 0.1
    rows = torch.autograd.functional.jacobian(lambda x: (matrix @ x).square() + 0.1, point)
    (gradient,) = torch.autograd.grad(weighting(losses, losses, step_generator(9)), point)
    assert torch.allclose(gradient, weighting.weights @ rows, rtol=1e-13)
    assert weighting.weights.shape == (3,)
    assert not weighting.weights.requires_grad


OBJECTIVES = {
    "geometric-mean": lambda weighting, losses: losses.prod() ** (1 / 3),
    "scale-invariant": lambda weighting, losses: losses.log().sum(),
    "uncertainty": lambda weighting, losses: (
        (losses / (2 * weighting.log_variances.exp())).sum() + weighting.log_variances.exp().sqrt().log().sum()
    ),
    "imtl-l": lambda weighting, losses: (weighting.log_scales.exp() * losses - weighting.log_scales).sum(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_finite_differences_are_those_of_the_papers_objective(name):
    weighting, losses = after(name, 5), losses_of_step(5)
    objective = OBJECTIVES[name]
    inputs = losses.clone().requires_grad_()
    total = weighting(inputs, inputs, step_generator(5))
    assert total.item() == pytest.approx(objective(weighting, losses).item(), rel=1e-13)
    gradients = torch.autograd.grad(total, [inputs, *weighting.parameters()])
    for tensor, gradient in zip([losses, *weighting.parameters()], gradients, strict=True):
        for i in range(3):
            sides = []
            for shift in (1e-6, -1e-6):
                tensor.data[i] += shift
                sides.append(objective(weighting, losses).item())
                tensor.data[i] -= shift
            assert gradient[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-7, abs=1e-8)


@every_weighting
def test_a_restored_weighting_goes_on_to_the_bit(name):
    straight, stopped, resumed = make(name), make(name), make(name)
    for k in range(5):  # within the second window of DWA
        step(straight, k)
        step(stopped, k)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    for k in range(5, 12):
        weights = step(straight, k)
        assert torch.equal(step(resumed, k), weights)
    assert first_difference(straight.state_dict(), resumed.state_dict()) is None
    if name in ("uncertainty", "imtl-l", "dwa", "gradnorm", "famo"):
        assert not torch.equal(step(make(name), 11), weights)


@dataclass
class State:
    weighting: Weighting


@every_weighting
def test_a_checkpoint_of_a_state_holds_all_of_it(name, tmp_path):
    state, fresh = State(after(name, 7)), State(make(name))
    torch.save(capture(state), tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    assert mismatches(fresh, stored, {}) == []
    restore_(fresh, stored, {})
    assert torch.equal(step(fresh.weighting, 7), step(state.weighting, 7))
    assert first_difference(capture(state), capture(fresh)) is None


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "random"])
def test_permuted_tasks_get_permuted_weights(name):
    order = [2, 0, 1]
    weighting, permuted = make(name), make(name, [TASKS[i] for i in order])
    for k in range(8):
        losses = losses_of_step(k)
        for module, own in ((weighting, losses), (permuted, losses[order])):
            total = module(own, own, step_generator(k))
            for parameter in module.parameters():
                parameter.data -= 0.1 * torch.autograd.grad(total, parameter)[0]
            module.after_backward(own.square())
            module.after_update(own.sqrt() / 2)
        assert torch.allclose(permuted.weights, weighting.weights[order], rtol=1e-13)
    assert name == "equal" or weighting.weights.std() > 1e-3


@pytest.mark.parametrize("name", ["random", "dwa", "gradnorm", "famo"])
def test_weights_that_are_fixed_only_up_to_a_factor_have_mean_one(name):
    weighting = make(name)
    for k in range(12):
        assert step(weighting, k).mean().item() == pytest.approx(1, rel=1e-14)
    assert weighting.weights.std() > 1e-3


@pytest.mark.parametrize("name", ["geometric-mean", "scale-invariant"])
def test_a_constant_on_one_loss_changes_no_direction(name):
    network = nn.Linear(4, 3).double()

    def gradient(scales):
        losses = network(torch.ones(4, dtype=torch.float64)).exp() * torch.tensor(scales, dtype=torch.float64)
        total = make(name)(losses, losses, step_generator(0))
        return torch.autograd.grad(total, network.weight)[0]

    plain, scaled = gradient([1.0, 1.0, 1.0]), gradient([8.0, 1.0, 1e-3])
    # The geometric mean itself is multiplied by the cube root of 0.008.
    assert torch.allclose(scaled, plain * (0.2 if name == "geometric-mean" else 1), rtol=1e-12)


# Each by its paper


def test_equal_and_static_weights_are_what_they_say():
    assert after("equal", 3).weights.tolist() == [1, 1, 1]
    assert after("static", 3).weights.tolist() == [0.5, 2.0, 1.0]


def test_random_weights_are_a_softmax_of_normal_numbers_of_the_step():
    weighting = make("random")
    generator = np.random.default_rng(0)
    drawn = np.stack([step(weighting, k).numpy() for k in range(4000)])
    expected = np.stack([3 * softmax(generator.standard_normal(3)) for _ in range(4000)])
    assert drawn.mean(0) == pytest.approx(np.ones(3), abs=0.05)
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(expected, [0.1, 0.5, 0.9]), abs=0.05)
    again = make("random")
    assert torch.equal(step(again, 7), torch.from_numpy(drawn[7]))


def test_uncertaintys_variances_settle_at_the_losses():
    weighting, losses = make("uncertainty"), torch.tensor([0.02, 1.0, 30.0], dtype=torch.float64)
    for k in range(2000):
        step(weighting, k, losses)
    assert torch.allclose(weighting.log_variances.exp(), losses, rtol=1e-9)
    assert torch.allclose(weighting.weights * losses, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-9)


def test_imtl_l_leads_every_weighted_loss_to_one():
    weighting, losses = make("imtl-l"), torch.tensor([0.02, 1.0, 9.0], dtype=torch.float64)
    for k in range(2000):
        step(weighting, k, losses)
    assert torch.allclose(weighting.weights * losses, torch.ones(3, dtype=torch.float64), rtol=1e-9)


def test_dwa_is_the_papers_softmax_of_ratios_of_windows():
    weighting, means = make("dwa"), []
    for k in range(15):
        expected = np.ones(3)
        if len(means) >= 2:
            expected = 3 * softmax(means[-1] / means[-2] / 2.0)
        assert step(weighting, k).numpy() == pytest.approx(expected, rel=1e-13)
        if k % 3 == 2:
            means.append(np.mean([losses_of_step(i).numpy() for i in range(k - 2, k + 1)], axis=0))


def test_gradnorm_is_the_papers_algorithm_with_adam():
    weighting, weights, moments = make("gradnorm"), np.ones(3), [np.zeros(3), np.zeros(3)]
    for k in range(30):
        losses, norms = losses_of_step(k).numpy(), 3 * losses_of_step(k).numpy()[::-1]
        assert step(weighting, k).numpy() == pytest.approx(weights, rel=1e-12)
        if k == 0:
            first = losses
        rates = losses / first / np.mean(losses / first)
        target = np.mean(weights * norms) * rates**1.5

        def objective(w, norms=norms, target=target):
            return np.abs(w * norms - target).sum()

        shifts = 1e-7 * np.eye(3)
        gradient = [(objective(weights + shift) - objective(weights - shift)) / 2e-7 for shift in shifts]
        exact = np.sign(weights * norms - target) * norms
        assert gradient == pytest.approx(exact, rel=1e-5)
        weights = adam(weights, exact, moments, k + 1)
        weights = 3 * weights / weights.sum()
    assert weights.std() > 0.05


def test_gradnorm_levels_the_gradients_of_tasks_that_learn_alike():
    weighting, losses = make("gradnorm"), torch.ones(3, dtype=torch.float64)
    norms = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for k in range(400):
        weighting(losses, losses, step_generator(k))
        weighting.after_backward(norms)
    assert weighting.learned * norms == pytest.approx(np.full(3, 12 / 7), rel=0.05)


def test_gradnorms_weights_stay_above_zero():
    weighting, losses = make("gradnorm"), torch.ones(3, dtype=torch.float64)
    for k in range(200):
        weighting(losses, losses, step_generator(k))
        weighting.after_backward(torch.tensor([1e6, 1.0, 1.0], dtype=torch.float64))
        assert weighting.learned.min() > 5e-4


def test_famo_is_the_papers_algorithm_with_adam():
    weighting, logits, moments = make("famo"), np.zeros(3), [np.zeros(3), np.zeros(3)]
    for k in range(30):
        before = losses_of_step(k).numpy()
        shares = softmax(logits)
        expected = shares / before / np.sum(shares / before)  # the paper's constant c makes them sum to 1
        assert step(weighting, k).numpy() == pytest.approx(3 * expected, rel=1e-12)
        jacobian = np.diag(shares) - np.outer(shares, shares)
        fall = np.log(before) - np.log(before * np.linspace(0.5, 0.9, 3))
        logits = adam(logits, jacobian @ fall + 0.01 * logits, moments, k + 1)
    assert weighting.logits.tolist() == pytest.approx(logits, rel=1e-11)
    assert logits[0] < logits[1] < logits[2]  # the first fell most


@pytest.mark.parametrize("name", ["gradnorm", "famo"])
def test_the_inner_adam_is_torchs(name):
    weighting = make(name)
    values = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([values], 0.025)
    ours = values.detach().clone()
    for k in range(20):
        values.grad = losses_of_step(k) - 0.5
        optimizer.step()
        ours = weighting.adam.descended(ours, losses_of_step(k) - 0.5)
    assert torch.allclose(ours, values, rtol=1e-13)


# Missing tasks


@every_weighting
def test_a_task_without_labels_counts_with_its_last_known_loss(name):
    """Whatever stands in for its loss, nan among it, changes nothing."""
    weighting, reference = after(name, 4), after(name, 4)
    known, present = losses_of_step(3)[1], torch.tensor([True, False, True])
    for k in range(4, 9):
        losses = losses_of_step(k)
        ends = []
        for module, middle in ((weighting, torch.nan), (reference, known)):
            everywhere = losses.clone()
            everywhere[1] = middle
            own = losses.clone().requires_grad_()
            total = module(own * present, everywhere, step_generator(k), present)
            for parameter in module.parameters():
                parameter.data -= 0.1 * torch.autograd.grad(total, parameter, retain_graph=True)[0]
            module.after_backward(torch.where(present, losses, middle))
            module.after_update(torch.where(present, losses / 2, middle))
            ends.append(torch.autograd.grad(total, own)[0])
            assert ends[-1][1] == 0
        assert torch.equal(*ends)
        assert torch.isfinite(weighting.weights).all()
    assert first_difference(reference.state_dict(), weighting.state_dict()) is None
    weighting.check()


@pytest.mark.parametrize("name", ["gradnorm", "famo"])
def test_a_task_that_was_never_there_learns_nothing(name):
    weighting = make(name)
    present = torch.tensor([True, True, False])
    for k in range(6):
        step(weighting, k, present=present)
    if name == "famo":  # no fall, and the softmax of three
        assert weighting.logits[2] > weighting.logits[:2].max()
        assert weighting.known[2] == 1
    else:
        assert weighting.first[2] == 0
        assert weighting.adam.mean[2] == 0
    for k in range(6, 9):
        step(weighting, k)
    assert torch.isfinite(weighting.weights).all()


# Losses that cannot be


@pytest.mark.parametrize(
    "name, loss",
    [(name, loss) for name in ("geometric-mean", "scale-invariant", "famo") for loss in (0.0, -0.5)]
    + [(name, -0.5) for name in ("uncertainty", "imtl-l", "dwa", "gradnorm")],
)
def test_a_loss_that_the_method_cannot_take_makes_nan_and_is_named_by_the_check(name, loss):
    weighting = after(name, 3)
    weighting.check()
    bad = torch.tensor([1.0, loss, 1.0], dtype=torch.float64)
    total = weighting(bad, bad, step_generator(3))
    if name not in ("dwa", "gradnorm"):  # theirs comes with the next window, or the next ratio
        assert total.isnan()
    step(weighting, 4)
    message = f"weighting: the loss of task 'right' was {loss:g}, but {type(weighting).__name__} needs losses that"
    with pytest.raises(ConfigError, match=f"{message} are {weighting.losses_must_be}; add a constant"):
        weighting.check()
    weighting.check()


def test_a_loss_after_the_update_is_checked_too():
    weighting = after("famo", 3)
    weighting.after_update(torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match="the loss of task 'depth' was -2"):
        weighting.check()


@pytest.mark.parametrize("name", ["equal", "static", "random"])
def test_other_methods_take_any_loss(name):
    weighting, losses = make(name), torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64)
    assert weighting(losses, losses, step_generator(0)).isfinite()
    weighting.check()


def test_a_loss_that_was_zero_for_a_window_has_no_ratio_in_dwa():
    weighting = make("dwa")
    for k in range(12):
        weights = step(weighting, k, torch.tensor([1.0, 0.0, 0.0 if k < 9 else 0.5], dtype=torch.float64))
        assert torch.isfinite(weights).all()
    assert weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["uncertainty", "imtl-l", "dwa", "gradnorm"])
def test_a_loss_of_zero_ends_no_run_where_the_method_has_an_answer(name):
    weighting = after(name, 3)
    for k in range(3, 9):
        weights = step(weighting, k, torch.tensor([1.0, 0.0 if k == 4 else 0.5, 0.3], dtype=torch.float64))
        assert torch.isfinite(weights).all()
    weighting.check()


def test_wrong_tasks_weights_and_shapes_are_named():
    with pytest.raises(ConfigError, match=r"tasks: \['a', 'a'\]; give at least one, each once"):
        WEIGHTINGS["equal"](["a", "a"])
    with pytest.raises(ConfigError, match=r"fixed: \{'left': 1.0\}; give a weight of at least 0 for each of left, ri"):
        WEIGHTINGS["static"](["left", "right"], {"left": 1.0})
    with pytest.raises(ConfigError, match=r"task_losses: shape \(2,\) for 3 tasks"):
        make("equal")(torch.ones(2), torch.ones(2), step_generator(0))
    with pytest.raises(ConfigError, match="window: 0"):
        WEIGHTINGS["dwa"](TASKS, window=0)
    with pytest.raises(ConfigError, match="lr: 0"):
        WEIGHTINGS["famo"](TASKS, lr=0)


# Precision, processes, one's own


@every_weighting
def test_losses_in_float32_give_the_weights_of_float64(name):
    weighting, wide = make(name), make(name)
    for k in range(8):
        narrow = step(weighting, k, losses_of_step(k).float())
        assert narrow.dtype == torch.float64
        assert torch.allclose(narrow, step(wide, k), rtol=2e-6, atol=1e-7)


@every_weighting
def test_a_step_never_waits_for_the_device(name):
    """On the meta device there is no value to wait for: asking for one raises."""
    weighting = make(name).to("meta")
    present = torch.ones(3, dtype=torch.bool, device="meta")
    for k in range(8):
        weights = step(weighting, k, losses_of_step(k).to("meta"), present=present if k % 2 else None)
    assert weights.device.type == "meta"
    if weighting.losses_must_be != "any":
        with pytest.raises(NotImplementedError, match="meta"):
            weighting.check()


def train_with(fabric, name):
    """Thirty updates of two heads on one layer, with labels of the last task on few samples."""
    torch.manual_seed(0)
    model, weighting = nn.Linear(5, 3).double(), make(name)
    optimizer = torch.optim.Adam([*model.parameters(), *weighting.parameters()], 1e-2)
    for k in range(30):
        generator = step_generator(k)
        inputs = torch.randn(8, 5, dtype=torch.float64, generator=generator)
        labels = torch.rand(8, 3, dtype=torch.float64, generator=generator) < torch.tensor([1.0, 0.6, 0.2])
        inputs, labels = take_share(inputs, fabric), take_share(labels, fabric)

        def losses():
            errors = ((model(inputs) - inputs[:, :3].sin()).square() + 0.1) * labels  # noqa: B023
            counts = sum_over_processes(fabric, labels.sum(0))  # noqa: B023
            return errors.sum(0) * fabric.world_size / counts.clamp_min(1), counts > 0

        own, present = losses()
        everywhere = sum_over_processes(fabric, own) / fabric.world_size
        if weighting.needs_norms:
            rows = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in own]
            rows = sum_over_processes(fabric, torch.stack(rows)) / fabric.world_size
            norms = rows.flatten(1).norm(dim=1)
        optimizer.zero_grad()
        weighting(own, everywhere, generator, present).backward()
        mean_gradients_(fabric, model, weighting)
        optimizer.step()
        if weighting.needs_norms:
            weighting.after_backward(norms)
        if weighting.needs_losses_after:
            with torch.no_grad():
                weighting.after_update(sum_over_processes(fabric, losses()[0]) / fabric.world_size)
    weighting.check()
    return {"model": model.state_dict(), "weighting": weighting.state_dict(), "weights": weighting.weights}


def train_with_all(fabric):
    return {name: train_with(fabric, name) for name in WEIGHTINGS}


def train_with_weights_of_each_process(fabric):
    """What would be wrong: weights from a process's own losses."""
    seen = Weighting.forward

    def forward(self, task_losses, global_losses, generator, present=None):
        return seen(self, task_losses, task_losses.detach() + 1e-3, generator, present)

    Weighting.forward = forward
    try:
        return train_with(fabric, "geometric-mean")
    finally:
        Weighting.forward = seen


@pytest.mark.distributed
def test_two_processes_give_the_run_of_one():
    one, two = (in_processes(train_with_all, processes, precision="64-true") for processes in (1, 2))
    assert first_difference(two[0], two[1]) is None
    for name in WEIGHTINGS:
        assert largest_difference(one[0][name], two[0][name]) < 1e-9, name


@pytest.mark.distributed
def test_weights_from_a_processs_own_losses_are_another_run():
    one, two = (in_processes(train_with_weights_of_each_process, processes) for processes in (1, 2))
    assert largest_difference(one[0]["model"], two[0]["model"]) > 1e-4


def test_ones_own_weighting_is_three_lines():
    class Inverse(Weighting):
        def weigh(self, losses, generator):
            return 1 / losses

    losses = torch.tensor([0.5, 4.0], dtype=torch.float64)
    weighting = Inverse(["a", "b"])
    assert float(weighting(losses, losses, step_generator(0))) == pytest.approx(2)
    assert weighting.weights.tolist() == [2.0, 0.25]
    assert math.isclose(float(weighting.known.sum()), 4.5)
