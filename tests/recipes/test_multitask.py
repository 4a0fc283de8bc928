"""``recipes.multitask``: one step is what the equations say, in every mode; what a user gives it, and gets wrong."""

import copy
import dataclasses
import math

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_custom.cli import command_line
from lightning_custom.errors import ConfigError, NonFiniteError, SolverError
from lightning_custom.metrics import read_rows
from lightning_custom.multitask.aggregator import aggregate
from lightning_custom.multitask.aggregators import UPGrad
from lightning_custom.multitask.conflict import conflict, delta_m
from lightning_custom.multitask.gram import gram_matrix
from lightning_custom.multitask.task_losses import MISSING
from lightning_custom.multitask.weightings import FAMO, Equal, GradNorm
from lightning_custom.precision import unwrap
from lightning_custom.schedules import StepDecay
from lightning_custom.testing import single_process
from recipes import multitask

SIZE = 12
CONFIG = multitask.MultitaskConfig(
    steps=1, batch_size=SIZE, lr=0.5, schedule="constant", validate_every=0, log_every=1, checkpoint_every=0
)
TASKS = ("kind", "place")


def samples():
    """Inputs, a class, and a place, of which every step below sees all."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(SIZE, 5, generator=rng, dtype=torch.float64)
    return inputs, torch.randint(3, (SIZE,), generator=rng), torch.randn(SIZE, generator=rng, dtype=torch.float64)


class Samples(torch.utils.data.Dataset):
    """(input, targets by task)."""

    def __init__(self, inputs, kinds, places):
        self.inputs, self.kinds, self.places = inputs, kinds, places

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], {"place": self.places[index], "kind": self.kinds[index]}


def apart(inputs, kinds, places):
    return {"kind": TensorDataset(inputs, kinds), "place": TensorDataset(inputs, places)}


def networks(trunk=None):
    torch.manual_seed(0)
    trunk = trunk or nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
    heads = {"kind": nn.Linear(4, 3), "place": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))}
    return trunk.double(), {task: head.double() for task, head in heads.items()}


LOSSES = {
    "kind": lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
    "place": lambda outputs, targets: (outputs - targets).square(),
}
MEANS = {"kind": cross_entropy, "place": mse_loss}


def plain_sgd(groups):
    return SGD(groups)


def train(
    tmp_path, parts=None, *, trunk=None, data=Samples, name="run", fabric=None, losses=None, own=None, **settings
):
    """One step on all samples with SGD: the networks before it, and the state after it."""
    fields = {field.name for field in dataclasses.fields(CONFIG)} & settings.keys()
    config = dataclasses.replace(
        CONFIG, **{field: settings.pop(field) for field in fields}, run_dir=str(tmp_path / name)
    )
    trunk, heads = networks(trunk)
    before = copy.deepcopy((trunk, heads))
    state = multitask.train(
        fabric or single_process("64-true"),
        config,
        trunk=trunk,
        heads=heads,
        data=data(*(parts or samples())),
        losses=losses or LOSSES,
        method=own,
        **{"optimizer": plain_sgd, **settings},
    )
    return before, state


def vector(parts):
    return torch.cat([part.detach().flatten() for part in parts])


def whole_losses(trunk, heads, parts=None):
    inputs, kinds, places = parts or samples()
    features = trunk(inputs)
    there = kinds != MISSING, ~places.isnan()
    return (
        cross_entropy(heads["kind"](features)[there[0]], kinds[there[0]]),
        mse_loss(heads["place"](features)[there[1]], places[there[1]]),
    )


def rows_of(before, parts=None):
    trunk, heads = before
    losses = whole_losses(trunk, heads, parts)
    return torch.stack(
        [vector(torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True)) for loss in losses]
    )


def moved(before, state):
    """What the step took from the trunk, over the learning rate: the direction."""
    return (vector(before[0].parameters()) - vector(unwrap(state.trunk).parameters())) / CONFIG.lr


def generator():
    return torch.Generator().manual_seed(0)


def missing(parts):
    """Two kinds in three, and one place in two, without a label."""
    inputs, kinds, places = parts
    numbers = torch.arange(SIZE)
    return (
        inputs,
        torch.where(numbers % 3 > 0, MISSING, kinds),
        torch.where(numbers % 2 > 0, math.nan, places),
    )


# One step


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("parts", [samples(), missing(samples())], ids=["all labels", "labels missing"])
def test_the_trunk_moves_along_the_aggregate_of_autograds_rows_and_heads_along_their_own_loss(batched, parts, tmp_path):
    before, state = train(tmp_path, parts, batched_backward=batched)
    direction, weights = aggregate(UPGrad(), rows_of(before, parts), generator())
    torch.testing.assert_close(moved(before, state), direction, rtol=0, atol=1e-13)
    torch.testing.assert_close(state.weights, weights, rtol=0, atol=1e-12)
    for i, task in enumerate(TASKS):
        own = torch.autograd.grad(whole_losses(*before, parts)[i], list(before[1][task].parameters()))
        step = vector(before[1][task].parameters()) - vector(unwrap(state.heads[task]).parameters())
        torch.testing.assert_close(step, CONFIG.lr * vector(own), rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [samples(), missing(samples())], ids=["all labels", "labels missing"])
def test_equal_weighting_is_the_gradient_of_the_sum_of_the_losses(parts, tmp_path):
    before, state = train(tmp_path, parts, method="equal")
    torch.testing.assert_close(moved(before, state), rows_of(before, parts).sum(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("parts", [samples(), missing(samples())], ids=["all labels", "labels missing"])
def test_a_loss_that_gives_a_mean_equals_one_that_gives_a_value_a_sample(parts, tmp_path):
    _, by_sample = train(tmp_path, parts, name="by sample")
    _, by_mean = train(tmp_path, parts, losses=MEANS, name="by mean")
    torch.testing.assert_close(
        vector(unwrap(by_mean.trunk).parameters()), vector(unwrap(by_sample.trunk).parameters()), rtol=0, atol=1e-14
    )
    rows = [read_rows(tmp_path / name)[0] for name in ("by sample", "by mean")]
    expected = [loss.item() for loss in whole_losses(*networks(), parts)]
    for row in rows:
        assert [row[f"train/loss/{task}"] for task in TASKS] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", ["upgrad", "static"])
def test_losses_may_be_in_another_order_than_the_heads(method, tmp_path):
    options = {"fixed": {"kind": 1.0, "place": 3.0}} if method == "static" else None
    parts, rows = (samples()[0], torch.full((SIZE,), MISSING), samples()[2]), []
    for name, losses in (("one", LOSSES), ("other", dict(reversed(LOSSES.items())))):
        _, state = train(
            tmp_path, parts, method=method, method_options=options, losses=losses, val_data=Samples(*samples()),
            name=name,
        )  # fmt: skip
        rows.append([{t: v for t, v in row.items() if "time" not in t} for row in read_rows(tmp_path / name)])
        last = vector(unwrap(state.trunk).parameters())
    assert rows[0] == rows[1]
    assert rows[0][0]["train/loss/kind"] is None
    before, _ = train(tmp_path, parts, method=method, method_options=options, name="again")
    assert (vector(before[0].parameters()) - last).norm() > 1e-2


def test_a_mask_that_is_ignored_would_be_seen(tmp_path):
    before, state = train(tmp_path, missing(samples()))
    direction, _ = aggregate(UPGrad(), rows_of(before, samples()), generator())
    assert (moved(before, state) - direction).abs().max() > 1e-2


def test_a_task_without_any_label_stays_out_of_the_step(tmp_path):
    inputs, kinds, places = samples()
    parts = inputs, torch.full_like(kinds, MISSING), places
    trunk, heads = networks()
    for method in ("mgda", "equal", "scale-invariant"):
        before, state = train(tmp_path, parts, method=method, name=method)
        expected = vector(torch.autograd.grad(mse_loss(heads["place"](trunk(inputs)), places), trunk.parameters()))
        if method == "scale-invariant":
            expected = expected / mse_loss(heads["place"](trunk(inputs)), places).detach()
        torch.testing.assert_close(moved(before, state), expected, rtol=0, atol=1e-13)
        assert torch.equal(vector(before[1]["kind"].parameters()), vector(unwrap(state.heads["kind"]).parameters()))
        row = read_rows(tmp_path / method)[0]
        assert row["train/loss/kind"] is None
        assert row["train/accuracy/kind"] is None


@pytest.mark.parametrize("gradients", ["exact", "features"])
@pytest.mark.parametrize("method, absent", [("mgda", True), ("mgda", False), ("gradvac", True)])
def test_the_task_whose_gradient_is_not_finite_is_named(method, absent, gradients, tmp_path):
    inputs, kinds, places = samples()
    parts = inputs, torch.full_like(kinds, MISSING) if absent else kinds, torch.full_like(places, math.inf)
    with pytest.raises(NonFiniteError, match="step 1: gradient of task place is not finite"):
        train(tmp_path, parts, method=method, gradients=gradients)


@pytest.mark.parametrize("method", ["equal", "upgrad", "graddrop"])
def test_a_batch_for_each_task_gives_the_step_of_one_shared_batch_with_the_same_samples(method, tmp_path):
    _, shared = train(tmp_path, method=method, name="shared")
    before, own = train(tmp_path, method=method, data=apart, name="apart")
    found = [vector(unwrap(state.trunk).parameters()) for state in (shared, own)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)
    assert moved(before, own).norm() > 1e-2


@pytest.mark.parametrize("method", ["mgda", "upgrad", "nash-mtl"])
def test_gradients_at_the_features_give_the_exact_step_of_a_linear_trunk_on_orthonormal_inputs(method, tmp_path):
    _, kinds, places = samples()
    parts = torch.eye(SIZE, dtype=torch.float64), kinds, places
    before, exact = train(tmp_path, parts, trunk=nn.Linear(SIZE, 4, bias=False), method=method, name="exact")
    _, features = train(
        tmp_path, parts, trunk=nn.Linear(SIZE, 4, bias=False), method=method, gradients="features", name="features"
    )
    torch.testing.assert_close(moved(before, features), moved(before, exact), rtol=0, atol=1e-12)


def test_gradients_at_the_features_are_another_method_for_a_deep_trunk(tmp_path):
    before, exact = train(tmp_path, method="mgda", name="exact")
    _, features = train(tmp_path, method="mgda", gradients="features", name="features")
    assert (moved(before, exact) - moved(before, features)).norm() > 1e-3
    # A sum of the same rows all the same.
    expected = features.weights @ rows_of(before)
    torch.testing.assert_close(moved(before, features), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gradients", ["exact", "features"])
def test_weights_serve_for_as_many_steps_as_asked(gradients, tmp_path):
    train(tmp_path, method="mgda", steps=7, aggregate_every=3, gradients=gradients)
    weights = [row["weight/kind"] for row in read_rows(tmp_path / "run")]
    assert weights[0] == weights[1] == weights[2]
    assert weights[3] == weights[4] == weights[5]
    assert len(set(weights)) == 3


def test_weights_that_serve_again_make_the_sum_of_the_new_gradients(tmp_path):
    _, first = train(tmp_path, steps=1, name="first")
    _, second = train(tmp_path, steps=2, aggregate_every=2, name="second")
    between = copy.deepcopy((unwrap(first.trunk), {task: unwrap(head) for task, head in first.heads.items()}))
    torch.testing.assert_close(moved(between, second), first.weights @ rows_of(between), rtol=0, atol=1e-13)


def test_famo_learns_from_the_losses_on_the_same_batch_after_the_update(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(FAMO, "after_update", lambda self, losses: seen.append(losses))
    _, state = train(tmp_path, method="famo")
    heads = {task: unwrap(head) for task, head in state.heads.items()}
    expected = torch.stack(whole_losses(unwrap(state.trunk), heads)).detach()
    torch.testing.assert_close(seen, [expected])


def test_gradnorm_sees_the_norms_at_the_last_shared_layer(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GradNorm, "after_backward", lambda self, norms: seen.append(norms))
    before, _ = train(tmp_path, method="gradnorm")
    last = sum(parameter.numel() for parameter in before[0][2].parameters())
    torch.testing.assert_close(seen, [rows_of(before)[:, -last:].norm(dim=1)])


class CPUHalf(MixedPrecision):
    """16-mixed on a CPU, where Lightning itself goes over to bfloat16."""

    def __init__(self, scale):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize(
    "method, gradients",
    [("gradnorm", "exact")] + [(method, kind) for method in ("upgrad", "nash-mtl") for kind in ("exact", "features")],
)
def test_the_loss_scale_of_16_bit_precision_changes_no_weights(method, gradients, tmp_path):
    inputs, kinds, places = samples()
    found = {}
    for scale in (1.0, 1024.0):
        trunk, heads = networks()
        config = dataclasses.replace(CONFIG, method=method, gradients=gradients, run_dir=str(tmp_path / str(scale)))
        state = multitask.train(
            Fabric(accelerator="cpu", devices=1, plugins=[CPUHalf(scale)]),
            config,
            trunk=trunk.float(),
            heads={task: head.float() for task, head in heads.items()},
            data=Samples(inputs.float(), kinds, places.float()),
            losses=LOSSES,
            optimizer=plain_sgd,
        )
        found[scale] = vector(unwrap(state.trunk).parameters())
    torch.testing.assert_close(found[1024.0], found[1.0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gradients", ["exact", "features"])
def test_a_step_that_overflows_in_16_bit_precision_is_left_out(gradients, tmp_path):
    inputs, kinds, places = samples()
    trunk, heads = networks()
    before = vector(trunk.parameters()).float()
    state = multitask.train(
        Fabric(accelerator="cpu", devices=1, plugins=[CPUHalf(2.0**100)]),
        dataclasses.replace(CONFIG, gradients=gradients, run_dir=str(tmp_path)),
        trunk=trunk.float(),
        heads={task: head.float() for task, head in heads.items()},
        data=Samples(inputs.float(), kinds, places.float()),
        losses=LOSSES,
        optimizer=plain_sgd,
    )
    assert torch.equal(vector(unwrap(state.trunk).parameters()), before)
    assert torch.equal(state.weights, torch.ones(2, dtype=torch.float64))


# What it shows


def test_scores_are_those_of_torchmetrics_and_delta_m_is_relative_to_the_baselines(tmp_path):
    metrics = {
        "kind": MetricCollection({"own": MulticlassAccuracy(3, average="micro"), "f1": MulticlassF1Score(3)}),
        "place": MeanSquaredError(),
    }
    baselines = tmp_path / "alone.yaml"
    baselines.write_text(yaml.safe_dump({"kind": 0.5, "place": 0.4}))
    val_data = Samples(*missing(samples()))
    train(tmp_path, val_data=val_data, metrics=metrics, baselines=str(baselines))
    row = read_rows(tmp_path / "run")[-1]
    assert row["val/accuracy/kind"] == pytest.approx(row["val/own/kind"])
    assert row["val/loss/place"] == pytest.approx(row["val/MeanSquaredError/place"])
    assert row["val/loss"] == pytest.approx(row["val/loss/kind"] + row["val/loss/place"])
    scores = {"kind": row["val/accuracy/kind"], "place": row["val/error/place"]}
    expected = delta_m(scores, {"kind": 0.5, "place": 0.4}, {"kind": True, "place": False})
    assert row["val/delta_m"] == pytest.approx(expected)
    assert expected != 0


def test_metrics_are_given_no_batch_without_labels(tmp_path):
    inputs, kinds, places = (part.repeat(100, *[1] * (part.dim() - 1)) for part in samples())
    places[600:] = math.nan  # the last of three batches
    metrics = {"kind": MulticlassAccuracy(3), "place": PearsonCorrCoef()}
    _, state = train(tmp_path, val_data=Samples(inputs, kinds, places), metrics=metrics)
    with torch.no_grad():
        found = unwrap(state.heads["place"])(unwrap(state.trunk)(samples()[0]))
    expected = torch.corrcoef(torch.stack([found, samples()[2]]))[0, 1]
    row = read_rows(tmp_path / "run")[-1]
    assert row["val/PearsonCorrCoef/place"] == pytest.approx(float(expected), rel=1e-4)


def test_validation_is_the_same_for_data_sets_apart(tmp_path):
    train(tmp_path, val_data=Samples(*samples()), name="shared")
    train(tmp_path, val_data=apart(*samples()), name="apart")
    rows = [read_rows(tmp_path / name)[-1] for name in ("shared", "apart")]
    assert rows[0] == pytest.approx(rows[1])
    assert "val/error/place" in rows[0]


def test_tensorboard_shows_conflict_weights_and_the_cosines_as_a_picture(tmp_path):
    before, _ = train(tmp_path)
    row = read_rows(tmp_path / "run")[0]
    found = conflict(gram_matrix(rows_of(before)))
    for tag, value in found.scores(TASKS).items():
        assert row[tag] == pytest.approx(value, rel=1e-9)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert events.Tags()["images"] == ["conflict/cosines"]
    assert {"weight/kind", "weight/place", "train/loss/kind", "train/accuracy/kind", "train/error/place"} < set(row)


def test_every_group_has_its_learning_rate_and_own_schedules_take_its_place(tmp_path):
    _, state = train(
        tmp_path, method="uncertainty", head_lr={"place": 0.1}, steps=3, rates={"trunk": StepDecay(0.2, 1, 0.5)}
    )
    rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    assert rates == {"trunk": 0.05, "kind": 0.5, "place": 0.1, "weighting": 0.5}
    assert state.optimizer.param_groups[-1]["weight_decay"] == 0


def test_a_weighting_of_ones_own_is_used(tmp_path):
    class Doubled(Equal):
        def weigh(self, losses, generator):
            return 2 * torch.ones_like(losses)

    before, state = train(tmp_path, own=Doubled(TASKS))
    torch.testing.assert_close(moved(before, state), 2 * rows_of(before).sum(0), rtol=0, atol=1e-13)


# What goes wrong


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "graddrop", "gradients": "features"}, "gradients: features, but GradDrop has no weights"),
        ({"method": "graddrop", "aggregate_every": 2}, "aggregate_every: 2, but GradDrop has no weights"),
        ({"method": "cagrad", "method_options": {"d": 1}}, r"method_options: .*unexpected keyword argument 'd'"),
        ({"method": "static"}, "method_options: .*'fixed'"),
        ({"head_lr": {"kin": 1.0}}, "head_lr: for kind, place, kin; the heads are of kind, place"),
        ({"losses": {"kind": cross_entropy}}, "losses: for kind; the heads are of kind, place"),
        ({"data": lambda *parts: TensorDataset(*parts[:2])}, r"data: targets of shape \(12,\) for 2 tasks"),
        ({"data": apart, "gradients": "features"}, "gradients: features of tasks with batches of their own"),
        ({"data": apart, "batched_backward": True}, "batched_backward: tasks with batches of their own"),
        ({"losses": {**LOSSES, "place": lambda outputs, targets: outputs[:3]}}, "'place' gave 3 values for 12 samples"),
        ({"losses": {**LOSSES, "place": lambda outputs, targets: 1.0}}, "'place' gave a float"),
        ({"val_data": Samples(*samples()), "best": "val/delta_m"}, "best: 'val/delta_m' is not a score"),
        ({"val_data": Samples(*samples()), "baselines": {"kind": 0.5}}, "baselines: of kind, scores of kind, place"),
        ({"baselines": "nowhere.yaml"}, "nowhere.yaml"),
        ({"method": "equal", "gradients": "features"}, "gradients: features, but Equal sees losses and no gradients"),
        ({"method": "equal", "aggregate_every": 2}, "aggregate_every: 2, but Equal sees losses"),
        ({"method": "equal", "batched_backward": True}, "batched_backward: True, but Equal sees losses"),
        ({"sampling": "proportional"}, "sampling: proportional, but all tasks share one data set"),
        ({"own": Equal(TASKS[::-1])}, "method: of tasks place, kind; give those .* order: kind, place"),
        ({"data": lambda *parts: TensorDataset(*parts)}, r"data: a batch is a list of \(Tensor, Tensor, Tensor\)"),
        ({"data": lambda *parts: [{"inputs": part} for part in parts[0]]}, "data: a batch of inputs; the heads are of"),
        ({"val_data": DataLoader(Samples(*samples()))}, "val_data: a DataLoader cannot be indexed; .*its own dataset"),
        ({"val_data": apart(*samples()) | {"kind": iter([])}}, "val_data: a list_iterator cannot be indexed"),
        (
            {
                "val_data": Samples(*samples()),
                "metrics": {"kind": MulticlassAccuracy(3, average=None), "place": MeanSquaredError()},
            },
            "metrics: MulticlassAccuracy gives 3 numbers",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as failure:
        train(tmp_path, **settings)
    assert "\n" not in str(failure.value)


def test_a_trunk_without_parameters_leaves_nothing_to_aggregate(tmp_path):
    with pytest.raises(ConfigError, match="trunk: no parameter"):
        train(tmp_path, trunk=nn.Identity())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"aggregate_every": 2, "sampling": "proportional"}, "aggregate_every: 2 needs all tasks"),
        ({"temperature": 2.0}, "temperature: 2.0, but sampling is cycle; use sampling temperature"),
        ({"ratios": {"kind": 1.0}, "sampling": "shortest"}, "ratios: .*, but sampling is shortest"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_heads_that_share_a_parameter_are_named(tmp_path):
    for heads, message in (
        (lambda trunk, heads: {"kind": heads["kind"], "place": heads["kind"]}, "place has a parameter of kind"),
        (lambda trunk, heads: {**heads, "place": trunk[2]}, "place has a parameter of trunk"),
    ):
        trunk, own = networks(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)))
        config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
        with pytest.raises(ConfigError, match=f"heads: {message}; what is shared belongs into the trunk alone"):
            multitask.train(
                single_process("64-true"), config, trunk=trunk, heads=heads(trunk, own), data=Samples(*samples()),
                losses=LOSSES,
            )  # fmt: skip


def test_an_optimizer_of_parameters_without_groups_follows_the_schedule(tmp_path):
    def one_group(groups):
        return SGD([parameter for group in groups for parameter in group["params"]], lr=0.2)

    _, state = train(tmp_path, optimizer=one_group, steps=4, schedule="cosine")
    (group,) = state.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.2 * (1 + math.cos(math.pi * 3 / 4)) / 2)


SMALL = ("--accelerator", "cpu", "--steps", "4", "--log_every", "2", "--width", "2")


def program(*words):
    return command_line(multitask.MultitaskConfig, multitask.main, presets=multitask.PRESETS, arguments=words)


def test_one_task_alone_is_trained_by_the_same_program(tmp_path, capsys):
    words = (*SMALL, "--only", "right", "--method", "equal", "--run_dir", str(tmp_path))
    assert program(*words) == 0
    assert "test accuracy: right" in capsys.readouterr().out
    row = read_rows(tmp_path)[-1]
    assert row["test/accuracy"] == row["test/accuracy/right"] > 0
    assert program(*words) == 0
    assert "was complete already, at step 4" in capsys.readouterr().out
    tags = {tag for row in read_rows(tmp_path) for tag in row}
    assert "val/accuracy/right" in tags
    assert not [tag for tag in tags if "left" in tag]


def test_the_command_line_takes_baselines_and_options_of_methods(tmp_path):
    words = ("--method", "cagrad", "--method_options", "{c: 0.2}", "--baselines", "{left: 0.9, right: 0.8}")
    assert program(*SMALL, *words, "--run_dir", str(tmp_path)) == 0
    (row,) = [row for row in read_rows(tmp_path) if "val/delta_m" in row]
    scores = {task: row[f"val/accuracy/{task}"] for task in ("left", "right")}
    assert row["val/delta_m"] == pytest.approx(delta_m(scores, {"left": 0.9, "right": 0.8}, higher_is_better=True))


def test_a_wrong_task_is_one_line_and_status_2(tmp_path, capsys):
    assert program(*SMALL, "--only", "middle", "--run_dir", str(tmp_path)) == 2
    assert capsys.readouterr().err == "error: only: 'middle' is no task; there are left, right\n"


def test_a_solver_that_fails_ends_the_run_with_one_line(tmp_path, capsys, monkeypatch):
    def fail(self, gram, generator):
        raise SolverError("UPGrad on 2 tasks: no")

    monkeypatch.setattr(UPGrad, "weights", fail)
    assert program(*SMALL, "--run_dir", str(tmp_path)) == 1
    assert capsys.readouterr().err == "error: UPGrad on 2 tasks: no\n"
