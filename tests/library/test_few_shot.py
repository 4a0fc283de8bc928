"""Scores on held-out tasks are those that scipy finds, the same tasks each time, on any number of processes."""

import numpy as np
import pytest
import scipy.stats
import torch
from lightning.fabric.plugins.precision import Precision
from torch import nn
from torch.nn.functional import mse_loss
from torch.overrides import TorchFunctionMode

from lightning_custom.errors import ConfigError
from lightning_custom.few_shot import (
    accuracies,
    are_classes,
    as_leaves,
    few_shot_network,
    held_out_scores,
    inner_product,
    load_tasks,
    mean_over_tasks,
    one_after_another,
    own_copies,
    query_outputs,
    require_a_task_each,
    require_share,
    score_lines,
    trainable,
    wave_picture,
    with_parameters,
)
from lightning_custom.pictures import CURVE_COLOURS
from lightning_custom.precision import Bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.task_norm import BatchStatisticsNorm
from lightning_custom.tasks import FewShot, Sinusoids
from lightning_custom.testing import in_processes, single_process

WAVES = Sinusoids(3, 4)


def constants(inputs, targets):
    """Predicts 0, then the mean of the support's targets, then half of it: no network, so that scores are known."""
    mean = targets.mean(1, keepdim=True)
    for factor in (0.0, 1.0, 0.5):
        yield lambda queries, factor=factor: factor * mean.expand(-1, queries.shape[1], -1)


def scores_of_constants(fabric, number, **options):
    return held_out_scores(fabric, constants, WAVES, number, per_task(None), "val", all_at_once=True, **options)


class Kept:
    """A sampler that keeps what it was asked for."""

    def __init__(self, tasks):
        self.tasks, self.drawn = tasks, []

    def __call__(self, number, generator):
        self.drawn.append(self.tasks(number, generator))
        return self.drawn[-1]

    def all(self):
        return [torch.cat(parts) for parts in zip(*self.drawn, strict=True)]


# Scores


def test_mean_and_interval_over_tasks_are_those_of_scipy():
    kept = Kept(WAVES)
    scores = held_out_scores(single_process(), constants, kept, 130, per_task(None), "val", all_at_once=True)
    _, support_targets, _, query_targets = (part.double() for part in kept.all())
    assert len(support_targets) == 130
    losses = (support_targets.mean(1, keepdim=True) / 2 - query_targets).square().mean((1, 2)).numpy()
    low, high = scipy.stats.norm.interval(0.95, loc=losses.mean(), scale=scipy.stats.sem(losses))
    assert scores["val/loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert scores["val/loss_interval"] == pytest.approx((high - low) / 2, rel=1e-4)


def test_scores_are_told_after_each_inner_update_and_the_last_is_the_score():
    kept = Kept(WAVES)
    scores = held_out_scores(single_process(), constants, kept, 20, per_task(None), "val", all_at_once=True)
    assert list(scores) == [
        "val/loss", "val/loss_interval", "val/loss_after/00", "val/loss_after/01", "val/loss_after/02"
    ]  # fmt: skip
    _, support_targets, _, query_targets = kept.all()
    for step, factor in enumerate((0.0, 1.0, 0.5)):
        expected = mse_loss(factor * support_targets.mean(1, keepdim=True).expand_as(query_targets), query_targets)
        assert scores[f"val/loss_after/{step:02d}"] == pytest.approx(float(expected), rel=1e-5)
    assert scores["val/loss"] == scores["val/loss_after/02"]


def test_scores_after_some_updates_are_those_of_all():
    every, some = (scores_of_constants(single_process(), 20, after=after) for after in (None, {0, 2}))
    del every["val/loss_after/01"]
    assert some == every


def test_held_out_tasks_are_the_same_each_time_and_more_of_them_begin_with_the_same():
    drawn = []
    for number, seed in ((120, 0), (120, 1), (150, 2)):
        torch.manual_seed(seed)
        kept = Kept(WAVES)
        held_out_scores(single_process(), constants, kept, number, per_task(None), "val", all_at_once=True)
        drawn.append(kept.all())
    for first, second, longer in zip(*drawn, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, longer[:120])
    inputs = drawn[0][0].flatten(1)
    assert len(torch.unique(inputs, dim=0)) == 120  # the second hundred are not the first again


@pytest.mark.parametrize("options", [{"all_at_once": False}, {"all_at_once": True, "largest": 7}])
def test_the_parts_that_tasks_are_computed_in_change_nothing(options):
    expected = scores_of_constants(single_process(), 110)
    found = held_out_scores(single_process(), constants, WAVES, 110, per_task(None), "val", **options)
    assert found == pytest.approx(expected, rel=1e-6)


def logits_of_labels(inputs, targets):
    """Right about a query whose input is above its task's threshold."""
    yield lambda queries: torch.stack([queries, torch.zeros_like(queries)], -1)


def signs(number, generator):
    queries = torch.randn(number, 5, generator=generator)
    labels = (torch.rand(number, 5, generator=generator) < 0.5).long()
    return queries, labels, queries, labels


def test_accuracy_and_its_interval_are_told_where_targets_are_classes():
    kept = Kept(signs)
    scores = held_out_scores(single_process(), logits_of_labels, kept, 60, per_task(None), "test", all_at_once=True)
    _, _, queries, labels = (part.numpy() for part in kept.all())
    right = ((queries > 0) == (labels == 0)).mean(1)
    assert scores["test/accuracy"] == pytest.approx(right.mean(), rel=1e-6)
    assert scores["test/accuracy_interval"] == pytest.approx(1.96 * scipy.stats.sem(right), rel=1e-6)
    assert scores["test/accuracy_after/00"] == scores["test/accuracy"]
    expected = np.logaddexp(queries, 0) - np.where(labels == 0, queries, 0)
    assert scores["test/loss"] == pytest.approx(expected.mean(), rel=1e-5)


def scores_of_several(fabric):
    return [scores_of_constants(fabric, number) for number in (101, 7, 2)]


@pytest.mark.distributed
def test_three_processes_with_uneven_shares_or_none_find_the_scores_of_one():
    one, several = scores_of_several(single_process()), in_processes(scores_of_several, 3)
    for found in several:
        for scores, expected in zip(found, one, strict=True):
            assert scores == pytest.approx(expected, rel=1e-12)


def test_accuracies_are_those_of_each_task():
    outputs = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert accuracies(outputs, torch.tensor([[0, 0], [0, 0]])).tolist() == [0.5, 1.0]


def test_accuracies_are_over_all_targets_of_a_task_where_a_sample_has_several():
    outputs = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(4, (2, 3, 5, 6), generator=torch.Generator().manual_seed(1))
    expected = [float((outputs[task].argmax(1) == targets[task]).double().mean()) for task in range(2)]
    assert are_classes(outputs, targets)
    assert accuracies(outputs, targets).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "outputs, targets, dtype, expected",
    [
        ((2, 3, 5), (2, 3), torch.int64, True),
        ((2, 3, 5), (2, 3), torch.uint8, True),
        ((2, 3, 5), (2, 3, 5), torch.float32, False),
        ((2, 3, 1), (2, 3, 1), torch.int64, False),  # counts, whose loss is the user's
        ((2, 3, 1), (2, 3), torch.int64, False),  # two classes by one logit
        ((2, 3), (2, 3), torch.bool, False),
        ((2, 3, 5, 4), (2, 3, 5), torch.int64, False),
    ],
)
def test_targets_are_classes_where_outputs_have_a_score_of_each(outputs, targets, dtype, expected):
    assert are_classes(torch.zeros(outputs), torch.zeros(targets, dtype=dtype)) is expected


class Names(TorchFunctionMode):
    """The names of torch's functions and methods, in the order of their calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_scores_are_in_float64_on_the_cpu_alone_as_some_devices_have_none():
    with Names() as called:
        scores_of_constants(single_process(), 5)
    assert called.names.index("cpu") < called.names.index("double")


def test_lines_name_the_learner_the_interval_and_what_was_found_after_0_1_and_all_updates():
    scores = {"test/loss": 0.5, "test/loss_interval": 0.01}
    scores |= {f"test/loss_after/{step:02d}": 3.0 - step / 4 for step in range(11)}
    scores |= {"test/accuracy": 0.75, "test/accuracy_interval": 0.125}
    scores |= {"test/accuracy_after/00": 0.25, "test/accuracy_after/01": 0.75}
    assert score_lines("MAML", scores) == [
        "MAML    loss     0.5000 +- 0.0100   after 0: 3.0000  1: 2.7500  10: 0.5000",
        "MAML    accuracy 0.7500 +- 0.1250   after 0: 0.2500  1: 0.7500",
    ]
    assert score_lines("MAML", scores, "val") == []


# Parts of tasks


@pytest.mark.parametrize(
    "options, sizes",
    [
        ({"all_at_once": True}, [7]),
        ({"all_at_once": False}, [1] * 7),
        ({"all_at_once": True, "largest": 3}, [3, 3, 1]),
        ({"all_at_once": True, "largest": 9}, [7]),
        ({"all_at_once": False, "largest": 3}, [1] * 7),
    ],
)
def test_tasks_come_in_parts_in_their_order(options, sizes):
    share = [torch.arange(14).view(7, 2), torch.arange(7)]
    parts = one_after_another(share, **options)
    assert [len(part[0]) for part in parts] == sizes
    for tensor, pieces in zip(share, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), tensor)


@pytest.mark.parametrize("all_at_once", [True, False])
def test_no_tasks_have_no_parts(all_at_once):
    assert one_after_another([torch.zeros(0, 3), torch.zeros(0)], all_at_once=all_at_once) == []


def test_sums_over_parts_become_a_mean_over_tasks():
    found = [{"loss": torch.tensor(3.0), "accuracy": torch.tensor(1.0)}, {"loss": torch.tensor(7.0)}]
    found[1]["accuracy"] = torch.tensor(4.0)
    assert mean_over_tasks(found, 4) == {"loss": torch.tensor(2.5), "accuracy": torch.tensor(1.25)}


def refused_with_fewer_tasks_than_processes(fabric):
    require_a_task_each(fabric, 2)
    with pytest.raises(ConfigError) as refusal:
        require_a_task_each(fabric, 1)
    return str(refusal.value)


@pytest.mark.distributed
def test_fewer_tasks_than_processes_are_refused():
    assert in_processes(refused_with_fewer_tasks_than_processes, 2) == [
        "meta_batch_size: 1 for 2 processes; each needs one"
    ] * 2  # fmt: skip


@pytest.mark.parametrize("number", [4, 6])
def test_a_share_of_another_size_than_the_meta_batch_says_is_refused(number):
    share = [torch.zeros(5, 2), torch.zeros(5)]
    assert require_share(single_process(), share, 5) is share
    with pytest.raises(
        ConfigError, match=f"^meta_batch_size: {number} over 1 processes is {number} for process 0, but"
    ):
        require_share(single_process(), share, number)


# Parameters of tasks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def test_trainable_parameters_are_the_live_ones_that_are_not_frozen():
    model = network()
    model[0].bias.requires_grad_(False)
    found = trainable(model)
    assert list(found) == ["0.weight", "2.weight", "2.bias"]
    assert found["0.weight"] is model[0].weight


def test_each_task_has_the_numbers_without_a_copy_in_memory_or_a_graph():
    model = network()
    copies = own_copies(trainable(model), 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(copies[name], torch.stack([parameter.detach()] * 4))
        assert copies[name].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        assert not copies[name].requires_grad
    leaves = as_leaves(copies)
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves.values())


def test_the_gradient_of_an_inner_product_is_its_direction():
    model = network()
    parameters = trainable(model)
    direction = {name: torch.randn_like(part) for name, part in parameters.items()}
    inner_product(parameters, direction).backward()
    for name, part in parameters.items():
        assert torch.equal(part.grad, direction[name])


def test_a_copy_has_the_parameters_of_one_task_and_the_model_its_own():
    model = network()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    copied = with_parameters(model, {"2.weight": torch.full((1, 1, 3), 7.0)})
    assert (copied[2].weight == 7).all()
    assert torch.equal(copied[0].weight, before["0.weight"])
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize("statistics", ["query", "support", "both"])
@pytest.mark.parametrize("together", [True, False])
def test_queries_are_normalised_by_the_statistics_of_the_samples_that_are_named(statistics, together):
    draw = torch.Generator().manual_seed(0)
    support, query = (3 * torch.randn(2, size, 4, generator=draw).double() + 1 for size in (5, 3))
    norm = TaskModel(Bare(BatchStatisticsNorm(4, eps=0, affine=False), Precision()), together=together)
    found = query_outputs(norm, {}, support, query, statistics)
    over = {"query": query, "support": support, "both": torch.cat([support, query], 1)}[statistics]
    expected = (query - over.mean(1, keepdim=True)) / over.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# Pictures


def pixels_of(picture, colour):
    target = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1) / 255
    return int(((picture - target).abs().amax(0) < 0.02).sum())


def heights(inputs, targets):
    """Flat lines, after update n at n."""
    for step in range(4):
        yield lambda queries, step=step: torch.full((len(queries), queries.shape[1], 1), float(step))


def test_a_picture_of_waves_shows_four_tasks_and_each_learner_after_the_updates_asked_for():
    fabric = single_process()
    none = wave_picture(fabric, {}, WAVES)
    two = wave_picture(fabric, {"flat": (heights, [0, 3])}, WAVES)
    assert none.shape == two.shape == (3, 640, 960)
    assert 0 <= float(two.min()) < float(two.max()) <= 1
    counts = [[pixels_of(picture, colour) for colour in CURVE_COLOURS[:4]] for picture in (none, two)]
    # The true wave is in both, a line of each learner's colour through four pictures 400 pixels wide in one.
    assert min(counts[0][0], counts[1][0]) > 800
    assert counts[0][1:] == [0, 0, 0]
    assert min(counts[1][1:3]) > 4 * 300
    assert counts[1][3] == 0


def test_the_true_wave_of_a_picture_is_that_of_the_support_points():
    seen = []

    def learner(inputs, targets):
        seen.append((inputs, targets))
        yield lambda queries: torch.zeros(4, queries.shape[1], 1)

    wave_picture(single_process(), {"none": (learner, [0])}, WAVES)
    ((inputs, targets),) = seen
    assert inputs.shape == (4, 3, 1)
    # Three points of each wave: amplitude and phase solve two of them, and the third agrees.
    for x, y in zip(inputs.double().squeeze(-1).numpy(), targets.double().squeeze(-1).numpy(), strict=True):
        sines, *_ = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y, rcond=None)
        np.testing.assert_allclose(np.stack([np.sin(x), np.cos(x)], 1) @ sines, y, atol=1e-5)
        assert 0.1 <= np.hypot(*sines) <= 5


# Families


def test_sinusoids_have_the_sizes_asked_for_and_the_papers_network():
    train, val, _ = load_tasks("sinusoid", None, ways=5, shots=3, query_shots=7)
    drawn = train(2, torch.Generator().manual_seed(0))
    assert [tuple(part.shape) for part in drawn] == [(2, 3, 1), (2, 3, 1), (2, 7, 1), (2, 7, 1)]
    assert train == val == Sinusoids(3, 7)
    widths = [tuple(part.shape) for part in few_shot_network("sinusoid", ways=5, width=40, seed=0).parameters()]
    assert widths == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]


def test_no_wave_is_tested_that_the_checkpoint_was_chosen_by():
    fabric, drawn = single_process(), []
    samplers = load_tasks("sinusoid", None, ways=5, shots=3, query_shots=4)
    for sampler in (samplers.val, samplers.test, samplers.test):
        kept = Kept(sampler)
        held_out_scores(fabric, constants, kept, 130, per_task(None), "val", all_at_once=True)
        drawn.append(kept.all()[0].flatten(1))
    val, test, again = drawn
    assert len(torch.unique(torch.cat([val, test]), dim=0)) == 260
    assert torch.equal(test, again)


def test_a_networks_weights_are_a_function_of_the_seed():
    one, again, other = (few_shot_network("omniglot", ways=5, width=8, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.head.out_features == 5


def test_omniglots_parts_have_1100_100_and_423_characters_four_ways_round_and_none_in_common(tmp_path):
    # A store of 1,623 characters of which each is a pattern of its own, in place of the real one.
    codes = torch.arange(1623).view(-1, 1) >> torch.arange(11) & 1
    images = torch.zeros(1623, 2, 28, 28, dtype=torch.uint8)
    images[:, :, 0, :11] = (255 * codes).to(torch.uint8).unsqueeze(1)
    images[:, :, 0, 20] = 255  # no character is nothing
    np.savez(
        tmp_path / "omniglot-28x28.npz", images=images.numpy(), evaluation=np.arange(1623) >= 964,
        alphabet=np.zeros(1623, dtype=np.int64), character=np.arange(1623),
    )  # fmt: skip
    parts = load_tasks("omniglot", str(tmp_path), ways=5, shots=1, query_shots=1)
    assert all(isinstance(part, FewShot) for part in parts)
    assert [len(part.images) for part in parts] == [4400, 400, 4 * 423]
    rows = [{row.numpy().tobytes() for row in part.images.flatten(1)} for part in parts]
    assert [len(found) for found in rows] == [4400, 400, 4 * 423]
    assert len(set().union(*rows)) == 4 * 1623
    support, _, query, labels = parts.train(2, torch.Generator().manual_seed(0))
    assert support.shape == query.shape == (2, 5, 1, 28, 28)
    assert labels.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_omniglot_without_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"^data_root: none, but data omniglot needs one; give --data_root DIR$"):
        load_tasks("omniglot", None, ways=5, shots=1, query_shots=1)
