"""What TensorBoard shows of each recipe: charts that have curves, settings beside scores that are written."""

import dataclasses
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_custom.metrics import read_rows
from lightning_custom.testing import single_process
from tests.recipes.cases import CASES


def charts(events):
    """Title to expressions, as the run's event file has them."""
    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def hyperparameters(events):
    """Names of settings, and tags of the scores beside them."""
    content = events.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    return {info.name for info in experiment.hparam_infos}, {info.name.tag for info in experiment.metric_infos}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_chart_and_score_of_a_recipe_finds_tags_that_it_writes(case, tmp_path):
    config = dataclasses.replace(case.config, run_dir=str(tmp_path / "run"), accelerator="cpu", steps=12)
    case.run(single_process(), config)
    tags = {tag for row in read_rows(tmp_path / "run") for tag in row}
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    found = charts(events)
    assert 2 <= len(found) <= 4
    for title, expressions in found.items():
        assert any(re.match(expression, tag) for expression in expressions for tag in tags), f"{title}: {tags}"
    settings, scores = hyperparameters(events)
    assert {"seed", "steps"} <= settings <= {field.name for field in dataclasses.fields(config)}
    assert scores
    assert scores <= tags
