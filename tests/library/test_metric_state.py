import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    Metric,
    MetricCollection,
    MinMetric,
    PearsonCorrCoef,
    SumMetric,
)
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score
from torchmetrics.wrappers import MinMaxMetric

from lightning_custom.errors import ConfigError
from lightning_custom.metric_state import MetricState
from lightning_custom.state import capture_items
from lightning_custom.testing import in_processes, single_process


def process(rank=0, world_size=1):
    return SimpleNamespace(global_rank=rank, world_size=world_size, device=torch.device("cpu"))


class Average(Metric):
    """A state with a reduction that knows no parts."""

    def __init__(self):
        super().__init__()
        self.add_state("value", torch.zeros(()), dist_reduce_fx="mean")

    def update(self, value):
        self.value = torch.as_tensor(value)

    def compute(self):
        return self.value


def classification():
    return MetricCollection([MulticlassAccuracy(5), MulticlassF1Score(5)])


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(7, 5, generator=generator), torch.randint(0, 5, (7,), generator=generator)) for _ in range(6)]


def test_a_metrics_own_state_dict_leaves_its_sums_out():
    """Why there is an adapter."""
    metric = MeanMetric()
    metric.update(3.0)
    assert metric.state_dict() == {}


def test_a_collection_with_compute_groups_resumes_in_the_middle():
    straight, stopped = classification(), MetricState(classification(), process())
    for logits, labels in batches():
        straight.update(logits, labels)
    for logits, labels in batches()[:3]:
        stopped.metric.update(logits, labels)
    assert len(stopped.metric.compute_groups) == 1
    resumed = MetricState(classification(), process())
    resumed.load_item_state_dict(stopped.item_state_dict())
    for logits, labels in batches()[3:]:
        resumed.metric.update(logits, labels)
    expected, actual = straight.compute(), resumed.metric.compute()
    assert {name: value.item() for name, value in actual.items()} == {n: v.item() for n, v in expected.items()}
    assert all(metric.update_count == 6 for metric in resumed.metric.values())


def test_a_list_state_resumes_and_a_stored_value_is_not_kept():
    stopped = MetricState(BinaryAUROC(), process())
    first, second = torch.tensor([0.1, 0.8]), torch.tensor([0.9, 0.3])
    stopped.metric.update(first, torch.tensor([0, 1]))
    stored = stopped.item_state_dict()
    stopped.metric.update(second, torch.tensor([0, 1]))
    assert stopped.metric.compute() == 0.5
    stopped.load_item_state_dict(stored)
    assert stopped.metric.compute() == 1.0
    assert stopped.metric.update_count == 1
    assert [entry.tolist() for entry in stopped.metric.preds] == [first.tolist()]


def test_it_is_a_field_of_a_state():
    @dataclasses.dataclass
    class State:
        scores: MetricState
        step: int = 0

    state = State(MetricState(SumMetric(), process()))
    state.scores.metric.update(2.0)
    ((_, content),) = capture_items(state)["scores"].items()
    assert content[""]["states"]["sum_value"].item() == 2.0
    assert content[""]["updates"] == 1


MAKERS = {"sum": SumMetric, "mean": MeanMetric, "max": MaxMetric, "min": MinMetric, "cat": CatMetric}


def stored_by(world_size, make):
    """Items of ``world_size`` processes that saw 1, 2, 3, ... each, and the values of all."""
    items = {}
    for rank in range(world_size):
        state = MetricState(make(), process(rank, world_size))
        state.metric.update(float(rank + 1))
        state.metric.update(float(10 * (rank + 1)))
        items |= state.item_state_dict()
    return items


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stored", [1, 2, 3])
def test_parts_of_several_processes_join_on_one_by_their_reduction(name, stored):
    whole = MAKERS[name]()
    for rank in range(stored):
        whole.update(float(rank + 1))
        whole.update(float(10 * (rank + 1)))
    alone = MetricState(MAKERS[name](), process())
    alone.load_item_state_dict(stored_by(stored, MAKERS[name]))
    assert torch.equal(alone.metric.compute(), whole.compute())
    assert alone.metric.update_count == 2 * stored


def test_other_reductions_stay_on_their_number_of_processes():
    for make, state_name in ((Average, "value"), (PearsonCorrCoef, "mean_x")):
        states = [MetricState(make(), process(rank, 2)) for rank in range(2)]
        items = states[0].item_state_dict() | states[1].item_state_dict()
        states[1].load_item_state_dict(items)
        with pytest.raises(ConfigError, match=f"devices: {make.__name__} has a state '{state_name}'.*; resume on 2"):
            MetricState(make(), process()).load_item_state_dict(items)


def test_a_refused_restore_leaves_the_metric_as_it_was():
    live = MetricState(MetricCollection({"a": SumMetric(), "b": Average()}), process())
    live.metric["a"].update(5.0)
    items = {
        f"process-0000{rank}": MetricState(live.metric.clone(), process(rank, 2)).item_state_dict()[
            f"process-0000{rank}"
        ]
        for rank in range(2)
    }
    with pytest.raises(ConfigError, match="Average 'b' has a state 'value'"):
        live.load_item_state_dict(items)
    assert live.metric["a"].compute() == 5.0


def test_other_metrics_are_refused_by_name():
    items = MetricState(MetricCollection({"a": SumMetric(), "b": MaxMetric()}), process()).item_state_dict()
    with pytest.raises(ConfigError, match="metric: only one of checkpoint and state has b"):
        MetricState(MetricCollection({"a": SumMetric()}), process()).load_item_state_dict(items)


def test_a_wrapper_with_hidden_state_is_refused():
    with pytest.raises(ConfigError, match="metric: a MinMaxMetric keeps part of its state outside"):
        MetricState(MinMaxMetric(SumMetric()), process())


def work(fabric):
    """Two processes take over what one stored, and what three stored; torchmetrics itself joins them."""
    results = {}
    for stored in (1, 2, 3):
        for name, make in MAKERS.items():
            state = MetricState(make(), fabric)
            state.load_item_state_dict(stored_by(stored, make))
            results[f"{name} {stored}"] = state.metric.compute().sort().values
    auroc = MetricState(BinaryAUROC(), process())
    auroc.metric.update(torch.tensor([0.2, 0.6, 0.4]), torch.tensor([0, 1, 1]))
    state = MetricState(BinaryAUROC(), fabric)
    state.load_item_state_dict(auroc.item_state_dict())
    results["auroc"] = state.metric.compute()
    return results


@pytest.mark.distributed
def test_two_processes_go_on_with_what_one_or_three_stored():
    first, second = in_processes(work, 2)
    for stored in (1, 2, 3):
        for name, make in MAKERS.items():
            alone = MetricState(make(), single_process())
            alone.load_item_state_dict(stored_by(stored, make))
            expected = alone.metric.compute().sort().values
            assert torch.equal(first[f"{name} {stored}"], expected), (name, stored)
            assert torch.equal(second[f"{name} {stored}"], expected), (name, stored)
    assert first["auroc"] == second["auroc"] == 1.0
