import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, mean_absolute_error, mean_squared_error
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_custom.distributed import take_share
from lightning_custom.errors import ConfigError
from lightning_custom.multitask.conflict import delta_m
from lightning_custom.multitask.methods import make_method
from lightning_custom.multitask.task_data import passes_of, require_tasks
from lightning_custom.multitask.task_losses import (
    MISSING,
    Scores,
    TaskScores,
    has_label,
    labelled,
    task_losses,
    update_metric,
)
from lightning_custom.testing import first_difference, in_processes, single_process

SIZE = 20
LOSSES = {
    "kind": lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
    "place": lambda outputs, targets: (outputs - targets).square(),
    "pixels": lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"),
    "mean": mse_loss,
}


def batch():
    """Outputs and targets of four tasks; the second half of the batch has no label of three of them, or a few."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    outputs = {"kind": normal(SIZE, 3), "place": normal(SIZE, 2), "pixels": normal(SIZE, 4, 5), "mean": normal(SIZE)}
    targets = {
        "kind": torch.randint(3, (SIZE,), generator=rng),
        "place": normal(SIZE, 2),
        "pixels": torch.randint(4, (SIZE, 5), generator=rng),
        "mean": normal(SIZE),
    }
    targets["kind"][3:] = MISSING
    targets["place"][7:, 1] = math.nan
    targets["pixels"][1:15, 2:] = MISSING
    targets["mean"][SIZE // 2 :] = math.nan
    return outputs, targets


def expected_means(outputs, targets):
    """By scikit-learn."""
    kinds, places, pixels, means = (targets[task].numpy() for task in LOSSES)
    known = [kinds != MISSING, ~np.isnan(places), pixels != MISSING, ~np.isnan(means)]
    shares = [outputs[task].softmax(1).numpy() for task in ("kind", "pixels")]
    return [
        log_loss(kinds[known[0]], shares[0][known[0]], labels=range(3)),
        mean_squared_error(places[known[1]], outputs["place"].numpy()[known[1]]),
        log_loss(pixels[known[2]], shares[1].transpose(0, 2, 1)[known[2]], labels=range(4)),
        mean_squared_error(means[known[3]], outputs["mean"].numpy()[known[3]]),
    ]


def test_means_are_over_the_labels_that_are_there():
    outputs, targets = batch()
    found = task_losses(single_process(), LOSSES, outputs, targets)
    assert found.means.tolist() == pytest.approx(expected_means(outputs, targets), rel=1e-12)
    assert found.counts.tolist() == [3, 27, 58, 10]
    torch.testing.assert_close(found.local, found.means, rtol=1e-14, atol=0)
    ignored = task_losses(single_process(), LOSSES, outputs, {task: targets[task].nan_to_num(0) for task in LOSSES})
    assert ignored.means[1] != pytest.approx(found.means[1].item(), rel=0.01)


def test_missing_labels_leave_no_gradient_and_no_nan():
    outputs, targets = batch()
    outputs = {task: part.requires_grad_() for task, part in outputs.items()}
    task_losses(single_process(), LOSSES, outputs, targets).local.sum().backward()
    for task in ("kind", "mean"):
        there = has_label(targets[task])
        gradient = outputs[task].grad
        assert gradient.isfinite().all()
        assert torch.equal(gradient[~there], torch.zeros_like(gradient[~there]))
        assert gradient[there].abs().sum() > 0.1


def test_a_loss_that_divides_by_its_target_has_a_gradient_where_labels_are_missing():
    outputs = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    targets = torch.tensor([math.nan, 4.0, math.nan])
    relative = {"depth": lambda outputs, targets: (outputs / targets - 1).square()}
    task_losses(single_process(), relative, {"depth": outputs}, {"depth": targets}).local.sum().backward()
    assert outputs.grad.tolist() == [0, 2 * (2 / 4 - 1) / 4, 0]


def test_a_task_without_labels_or_without_outputs_has_a_loss_of_zero_and_is_not_present():
    outputs, targets = batch()
    targets["mean"] = torch.full((SIZE,), math.nan, dtype=torch.float64)
    del outputs["kind"], targets["kind"]
    found = task_losses(single_process(), LOSSES, outputs, targets)
    assert found.present.tolist() == [False, True, True, False]
    assert found.means[[0, 3]].tolist() == [0, 0]


def test_a_sample_needs_every_one_of_several_targets():
    outputs = {"pair": (torch.ones(4), torch.ones(4))}
    targets = {"pair": [torch.tensor([0.0, math.nan, 2.0, 3.0]), torch.tensor([1, 1, MISSING, 1])]}

    def pair(outputs, targets):
        return (outputs[0] - targets[0]).square() + targets[1]

    found = task_losses(single_process(), {"pair": pair}, outputs, targets)
    assert found.counts.tolist() == [2]
    assert found.means.tolist() == [(1 + 1 + 4 + 1) / 2]
    mean = task_losses(single_process(), {"pair": lambda *parts: pair(*parts).mean()}, outputs, targets)
    assert mean.means.tolist() == found.means.tolist()
    kept, known = labelled(outputs["pair"], targets["pair"])
    assert [len(part) for part in (*kept, *known)] == [2] * 4


def segmentation():
    """Logits and classes of pixels, of which a few of each image, and all of one, have none."""
    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (4, 5, 5), generator=rng)
    classes[:, 0, :2] = MISSING
    classes[3] = MISSING
    return {"pixels": torch.randn(4, 3, 5, 5, generator=rng)}, {"pixels": classes}


def test_a_mean_over_images_with_a_few_missing_pixels_is_refused_and_not_a_silent_nothing():
    outputs, targets = segmentation()
    message = r"losses: that of 'pixels' gave a mean, but 3 of 4 samples have only some of their labels; .*reduction"
    with pytest.raises(ConfigError, match=message):
        task_losses(single_process(), {"pixels": cross_entropy}, outputs, targets)
    found = task_losses(single_process(), {"pixels": LOSSES["pixels"]}, outputs, targets)
    assert found.counts.tolist() == [3 * 23]
    assert found.means.item() == pytest.approx(cross_entropy(outputs["pixels"], targets["pixels"]).item(), rel=1e-6)
    whole = {"pixels": targets["pixels"].clamp_min(0)}
    mean = task_losses(single_process(), {"pixels": cross_entropy}, outputs, whole)
    assert mean.means.item() == pytest.approx(cross_entropy(outputs["pixels"], whole["pixels"]).item(), rel=1e-6)


def test_a_value_a_sample_of_which_none_is_whole_is_warned_of():
    outputs, targets = segmentation()
    by_sample = {"pixels": lambda *parts: LOSSES["pixels"](*parts).mean((1, 2))}
    scores = TaskScores(single_process(), ("pixels",))
    scores.update(task_losses(single_process(), by_sample, outputs, targets), outputs, targets)
    with pytest.warns(UserWarning, match="'pixels' gave a value a sample, and no sample had all of its labels"):
        scores.flush()


def test_a_metric_gets_images_with_any_labelled_pixel_and_no_batch_without():
    outputs, targets = segmentation()
    metric = MulticlassAccuracy(3, average="micro", ignore_index=MISSING)
    update_metric(metric, outputs["pixels"], targets["pixels"])
    there = has_label(targets["pixels"])
    assert metric.compute() == (outputs["pixels"].argmax(1) == targets["pixels"])[there].float().mean()
    nothing = MeanSquaredError()
    update_metric(nothing, torch.ones(3), torch.full((3,), math.nan))
    assert nothing.update_count == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_every_number_that_is_not_missing_is_a_label_in_any_integer_type(dtype):
    targets = torch.arange(256).to(dtype)
    missing = [label for label in targets.tolist() if label == MISSING]
    assert int((~has_label(targets)).sum()) == len(missing) == (dtype == torch.int8)


def test_a_process_without_samples_adds_nothing():
    found = task_losses(single_process(), {"mean": mse_loss}, {"mean": torch.ones(0)}, {"mean": torch.ones(0)})
    assert found.means.tolist() == [0]
    assert not found.present.any()


def scores_of(fabric, parts=3):
    """Scores of the batch, given in parts of it."""
    outputs, targets = batch()
    scores = TaskScores(fabric, tuple(LOSSES))
    for index in torch.arange(SIZE).tensor_split(parts):
        part = {task: take_share(outputs[task][index], fabric) for task in LOSSES}
        known = {task: take_share(targets[task][index], fabric) for task in LOSSES}
        scores.update(task_losses(fabric, LOSSES, part, known), part, known)
    return scores


def test_scores_are_those_of_scikit_learn():
    outputs, targets = batch()
    found = scores_of(single_process()).flush()
    assert list(found.loss.values()) == pytest.approx(expected_means(outputs, targets), rel=1e-12)
    kinds, pixels = has_label(targets["kind"]), has_label(targets["pixels"])
    assert found.accuracy == {
        "kind": accuracy_score(targets["kind"][kinds], outputs["kind"].argmax(1)[kinds]),
        "pixels": pytest.approx(accuracy_score(targets["pixels"][pixels], outputs["pixels"].argmax(1)[pixels])),
    }
    places = has_label(targets["place"])
    expected = mean_absolute_error(targets["place"][places], outputs["place"][places])
    assert found.error["place"] == pytest.approx(expected, rel=1e-12)
    tags = found.tags("val/")
    assert tags["val/loss"] == pytest.approx(sum(found.loss.values()))
    assert tags["val/accuracy"] == pytest.approx((found.accuracy["kind"] + found.accuracy["pixels"]) / 2)
    assert tags["val/error/place"] == found.error["place"]


def test_delta_m_counts_an_error_that_falls_as_a_gain():
    scores = Scores(loss={"a": 1.0, "b": 2.0}, accuracy={"a": 0.8}, error={"b": 0.1})
    baselines = {"a": 0.4, "b": 0.2, "c": 1.0}
    assert scores.delta_m(baselines) == pytest.approx((100 + 50) / 2)
    assert scores.delta_m(baselines) == delta_m({"a": 0.8, "b": -0.1}, {"a": 0.4, "b": -0.2}, higher_is_better=True)
    with pytest.raises(ConfigError, match="baselines: task 'c' has neither accuracy nor error"):
        Scores(loss={"a": 1.0, "c": 2.0}, accuracy={"a": 0.8}, error={}).delta_m(baselines)


def test_open_sums_come_back_from_a_checkpoint():
    fabric, scores = single_process(), scores_of(single_process())
    restored = TaskScores(fabric, tuple(LOSSES))
    restored.load_item_state_dict(scores.item_state_dict())
    assert restored.flush() == scores.flush()
    assert math.isnan(scores.flush().loss["kind"])


def on_a_share(fabric):
    outputs, targets = batch()
    own = {task: take_share(part, fabric).requires_grad_() for task, part in outputs.items()}
    found = task_losses(fabric, LOSSES, own, {task: take_share(part, fabric) for task, part in targets.items()})
    found.local.sum().backward()
    scores = scores_of(fabric)
    return {
        "means": found.means,
        "gradients": [part.grad / fabric.world_size for part in own.values()],
        "counts": found.counts,
        "scores": scores.flush()._asdict(),
    }


@pytest.mark.distributed
def test_labels_missing_on_one_process_count_as_they_do_on_one():
    one, two = on_a_share(single_process("64-true")), in_processes(on_a_share, 2, precision="64-true")
    assert two[1]["counts"][[0, 3]].tolist() == [0, 0]
    for part in two:
        torch.testing.assert_close(part["means"], one["means"], rtol=0, atol=1e-14)
        for kind, values in one["scores"].items():
            assert part["scores"][kind] == pytest.approx(values, rel=1e-12)
    for i, gradient in enumerate(one["gradients"]):
        joined = torch.cat([part["gradients"][i] for part in two])
        torch.testing.assert_close(joined, gradient, rtol=0, atol=1e-14)


# What a batch holds, and methods by name


def test_targets_are_by_task_or_a_column_each():
    inputs, targets = torch.zeros(3, 2), torch.arange(6).view(3, 2)
    ((_, by_column),) = passes_of([inputs, targets], ("a", "b"))
    assert {task: part.tolist() for task, part in by_column.items()} == {"a": [0, 2, 4], "b": [1, 3, 5]}
    ((_, by_task),) = passes_of([inputs, {"b": targets[:, 1], "a": targets[:, 0]}], ("a", "b"))
    assert list(by_task) == ["a", "b"]
    assert first_difference(dict(by_column), dict(by_task)) is None
    apart = list(passes_of({"b": [inputs, targets[:, 1]]}, ("a", "b")))
    assert [(len(part), list(known)) for part, known in apart] == [(3, ["b"])]


def test_fields_that_are_not_of_the_tasks_are_named():
    require_tasks(("a", "b"), losses={"b": 1, "a": 2}, metrics=None)
    with pytest.raises(ConfigError, match="metrics: for a, c; the heads are of a, b"):
        require_tasks(("a", "b"), losses={"b": 1, "a": 2}, metrics={"a": 1, "c": 2})


def test_an_unknown_method_is_named():
    with pytest.raises(ConfigError, match="method: 'mean' is unknown; there are equal, static"):
        make_method("mean", ("a",))
