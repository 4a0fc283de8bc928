"""A model while it is judged, and as it was before afterwards."""

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import computed, evaluating
from lightning_custom.testing import single_process


def model():
    frozen = nn.BatchNorm1d(4).eval()
    return nn.Sequential(nn.Linear(3, 4), frozen, nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)))


def modes(module):
    return [part.training for part in module.modules()]


def test_every_part_is_in_evaluation_mode_without_a_graph():
    module = model()
    with evaluating(module):
        assert not any(modes(module))
        outputs = [module(torch.ones(2, 3)) for _ in range(2)]
    assert torch.equal(*outputs)
    assert not outputs[0].requires_grad
    assert module(torch.ones(2, 3)).requires_grad


def test_each_part_returns_to_the_mode_that_it_was_in():
    modules = [model(), model().eval()]
    before = [modes(module) for module in modules]
    assert before[0] == [True, True, False, True, True, True]
    with evaluating(*modules):
        pass
    assert [modes(module) for module in modules] == before


def test_modes_return_after_an_error_too():
    module = model()
    before = modes(module)
    with pytest.raises(ZeroDivisionError), evaluating(module):
        raise ZeroDivisionError
    assert modes(module) == before
    assert torch.is_grad_enabled()


def test_a_module_that_fabric_wrapped_is_reached():
    module = model()
    wrapped = single_process().setup_module(module)
    with evaluating(wrapped):
        assert not any(modes(module))
    assert any(modes(module))


def test_metrics_give_their_numbers_by_name_and_begin_anew():
    metric = MeanMetric()
    for value in (2.0, 3.0):
        metric.update(value)
        assert computed(metric) == {"MeanMetric": value}
    several = MetricCollection({"mean": MeanMetric(), "sum": MeanSquaredError()})
    several["mean"].update(1.0)
    several["sum"].update(torch.ones(2), torch.zeros(2))
    assert computed(several) == {"mean": 1.0, "sum": 1.0}


def test_a_metric_that_gives_several_numbers_is_named():
    metric = MulticlassAccuracy(3, average=None)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="metrics: MulticlassAccuracy gives 3 numbers; give one that is averaged"):
        computed(metric)
