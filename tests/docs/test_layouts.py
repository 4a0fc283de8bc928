"""The charts of each recipe's Custom Scalars tab have curves to show."""

import dataclasses
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_custom.metrics import read_rows
from lightning_custom.testing import single_process
from tests.recipes.cases import CASES

LAID_OUT = {"adversarial_training", "classification", "gan", "maml", "multitask"}


def charts(run_dir):
    """Title to expressions, as the run's event file has them."""
    accumulator = EventAccumulator(str(run_dir))
    accumulator.Reload()
    (event,) = accumulator.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in LAID_OUT], ids=lambda case: case.name)
def test_every_chart_of_a_recipe_finds_tags_that_it_writes(case, tmp_path):
    config = dataclasses.replace(case.config, run_dir=str(tmp_path / "run"), accelerator="cpu", steps=12)
    case.run(single_process(), config)
    tags = {tag for row in read_rows(tmp_path / "run") for tag in row}
    found = charts(tmp_path / "run")
    assert 2 <= len(found) <= 4
    for title, expressions in found.items():
        assert any(re.match(expression, tag) for expression in expressions for tag in tags), f"{title}: {tags}"
