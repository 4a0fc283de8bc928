import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lightning_custom.errors import NonFiniteError
from lightning_custom.metrics import ROWS, STEPS_PER_SECOND, MetricLogger, read_rows
from lightning_custom.testing import in_processes, single_process


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    name: str = "tiny"
    betas: tuple[float, float] = (0.0, 0.9)


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def points(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def without_time(row):
    return {tag: value for tag, value in row.items() if tag != STEPS_PER_SECOND}


@pytest.fixture
def fabric():
    return single_process()


@pytest.fixture
def logger(fabric, tmp_path):
    return MetricLogger(fabric, tmp_path)


def run(fabric, folder, first, last, *, flush_every=3, logger=None):
    """Log a value a step from ``first`` to ``last`` and flush every few; returns the logger."""
    if logger is None:
        logger = MetricLogger(fabric, folder, hyperparameters=Settings(), headline=["val/score"])
        logger.resume_at(None)
    for step in range(first, last + 1):
        logger.update({"loss/a": torch.tensor(0.1) * step, "b": 1 / step}, weight=step)
        if step % flush_every == 0:
            logger.flush(step)
        if step % 5 == 0:
            logger.record(step, {"val/score": step / 7})
            logger.image(step, "samples", torch.zeros(1, 4, 4))
    return logger


def test_a_row_is_the_mean_since_the_last_flush(logger):
    values = [0.1, 0.2, 0.7]
    for value in values:
        logger.update({"loss/a": torch.tensor(value, requires_grad=True), "b": value * 2})
    row = logger.flush(3)
    exact = sum(float(torch.tensor(value)) for value in values) / 3  # float32 values, summed in float64
    assert row["loss/a"] == pytest.approx(exact, rel=1e-15)
    assert row["b"] == pytest.approx(2 / 3, rel=1e-15)
    logger.update({"b": 5})
    assert without_time(logger.flush(4)) == {"b": 5.0}
    assert logger.latest["loss/a"] == row["loss/a"]


def test_weights_count(logger):
    logger.update({"a": 1.0}, weight=3)
    logger.update({"a": torch.tensor([[5.0]])}, weight=1)
    assert logger.flush(1)["a"] == 2.0
    logger.update({"a": 1.0}, weight=0)
    assert math.isnan(logger.flush(2)["a"])


def test_many_small_values_do_not_lose_digits(logger):
    value = torch.tensor(0.1)
    for _ in range(10_000):
        logger.update({"a": value})
    assert logger.flush(1)["a"] == pytest.approx(float(value), rel=1e-12)
    total = torch.zeros(())
    for _ in range(10_000):
        total += value
    assert abs(total.item() / 10_000 - float(value)) > 1e-6  # what float32 sums would report


def test_a_value_that_is_no_number_is_named(logger):
    with pytest.raises(ValueError, match=r"metrics: loss/a has shape \(3,\); log one number, such as its mean"):
        logger.update({"loss/a": torch.zeros(3)})


def test_nothing_to_log_writes_the_speed_alone(logger):
    logger.update({})
    assert set(logger.flush(10)) == {STEPS_PER_SECOND}
    assert logger.record(10, {}) == {}


def test_rows_keep_every_digit_and_tensorboard_has_the_same_points(fabric, tmp_path):
    run(fabric, tmp_path, 1, 7)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [3, 5, 6]
    assert rows[1] == {"step": 5, "val/score": 5 / 7}
    means = [sum(float(torch.tensor(0.1) * s) * s for s in part) / sum(part) for part in ([1, 2, 3], [4, 5, 6])]
    assert [rows[0]["loss/a"], rows[2]["loss/a"]] == pytest.approx(means, rel=1e-14)
    assert [rows[0]["b"], rows[2]["b"]] == pytest.approx([3 / 6, 3 / 15], rel=1e-14)
    assert points(tmp_path, "loss/a") == [(3, pytest.approx(means[0])), (6, pytest.approx(means[1]))]
    assert points(tmp_path, "val/score") == [(5, pytest.approx(5 / 7))]


def test_known_values_join_the_row(logger, tmp_path):
    logger.update({"a": 1.0})
    logger.flush(2, {"lr": 0.25})
    assert without_time(read_rows(tmp_path)[0]) == {"step": 2, "a": 1.0, "lr": 0.25}


def test_one_event_a_flush(logger, tmp_path):
    logger.update({f"tag/{i}": float(i) for i in range(8)})
    logger.flush(1)
    logger.record(2, {"val/a": 1.0, "val/b": 2.0})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    accumulator = read(tmp_path)
    times = {event.wall_time for tag in accumulator.Tags()["scalars"] for event in accumulator.Scalars(tag)}
    assert len(times) == 2
    assert path.stat().st_size > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_a_row_and_itself_in_tensorboard(logger, tmp_path, value):
    logger.update({"a": value})
    logger.flush(1)
    line = (tmp_path / ROWS).read_text().splitlines()[0]
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict["a"] is None
    ((_, point),) = points(tmp_path, "a")
    assert point == value or (math.isnan(point) and math.isnan(value))


def test_a_loss_that_is_not_finite_stops_the_run_before_its_row_is_written(logger, tmp_path):
    logger.update({"loss/a": math.nan})
    with pytest.raises(NonFiniteError, match="step 4: loss/a is nan"):
        logger.flush(4)
    assert not (tmp_path / ROWS).exists()


@pytest.mark.parametrize("stop, restored", [(8, 7), (8, 8), (11, 4), (10, 0)])
def test_a_resumed_run_has_the_rows_and_events_of_a_straight_one(fabric, tmp_path, stop, restored):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(fabric, straight, 1, 15)
    run(fabric, resumed, 1, restored) if restored else run(fabric, resumed, 1, 0)
    state = run(fabric, tmp_path / "copy", 1, restored).item_state_dict()
    run(fabric, resumed, 1, stop)
    again = MetricLogger(fabric, resumed, hyperparameters=Settings(), headline=["val/score"])
    again.load_item_state_dict(state)
    again.resume_at(restored)
    run(fabric, resumed, restored + 1, 15, logger=again)
    assert [without_time(row) for row in read_rows(resumed)] == [without_time(row) for row in read_rows(straight)]
    for tag in ("loss/a", "b", "val/score"):
        assert points(resumed, tag) == points(straight, tag)
    assert [image.step for image in read(resumed).Images("samples")] == [5, 10, 15]


def test_open_sums_resume_to_the_bit(fabric, tmp_path):
    straight = run(fabric, None, 1, 14, flush_every=100)
    half = run(fabric, None, 1, 9, flush_every=100)
    resumed = MetricLogger(fabric, None)
    resumed.load_item_state_dict(half.item_state_dict())
    resumed.resume_at(9)
    run(fabric, None, 10, 14, flush_every=100, logger=resumed)
    assert without_time(resumed.flush(14)) == without_time(straight.flush(14))
    assert not (tmp_path / ROWS).exists()


def test_a_resumed_run_knows_the_last_value_of_every_tag_on_every_process(fabric, tmp_path):
    """So that what is done with the last loss at the end of a loop does not depend on where the loop began."""
    logger = MetricLogger(fabric, tmp_path)
    logger.record(1, {"a": 1.0, "b": 2.0})
    logger.record(2, {"a": 3.0, "c": math.nan})
    logger.record(9, {"d": 4.0})
    for rank in (1, 0):
        again = MetricLogger(SimpleNamespace(global_rank=rank, device=fabric.device, loggers=[]), tmp_path)
        again.resume_at(5)
        assert str(again.latest) == "{'a': 3.0, 'b': 2.0, 'c': nan}"
        assert again.resumed_from == 5
    again.resume_at(None)
    assert (again.latest, again.resumed_from) == ({}, 0)


def test_a_tag_that_is_not_logged_again_leaves_no_ghost(fabric, tmp_path):
    logger = MetricLogger(fabric, tmp_path)
    logger.record(2, {"early": 1.0})
    logger.record(9, {"late": 1.0})
    again = MetricLogger(fabric, tmp_path)
    again.resume_at(5)
    assert again.latest == {"early": 1.0}
    again.record(6, {"early": 2.0})
    assert read(tmp_path).Tags()["scalars"] == ["early"]
    assert points(tmp_path, "early") == [(2, 1.0), (6, 2.0)]


def test_a_fresh_start_in_a_used_directory_leaves_nothing_of_before(fabric, tmp_path):
    run(fabric, tmp_path, 1, 6)
    run(fabric, tmp_path, 1, 3)
    assert [row["step"] for row in read_rows(tmp_path)] == [3]
    assert [step for step, _ in points(tmp_path, "loss/a")] == [3]


def hyperparameters(folder):
    content = read(folder).summary_metadata
    return {tag: HParamsPluginData.FromString(content[tag].plugin_data.content) for tag in content if "hparams" in tag}


def test_hyperparameters_and_their_metrics_are_written_once_and_survive_a_cut(fabric, tmp_path):
    run(fabric, tmp_path, 1, 6)
    for _ in range(2):
        MetricLogger(fabric, tmp_path, hyperparameters=Settings(lr=9.0)).resume_at(4)
        stored = hyperparameters(tmp_path)
        values = stored[SESSION_START_INFO_TAG].session_start_info.hparams
        assert values["lr"].number_value == 0.1
        assert values["name"].string_value == "tiny"
        assert values["betas"].string_value == "(0.0, 0.9)"
        (metric,) = stored[EXPERIMENT_TAG].experiment.metric_infos
        assert metric.name.tag == "val/score"
        assert SESSION_END_INFO_TAG not in stored


class Listener(Logger):
    name, version, experiment = "listener", 0, None

    def __init__(self):
        self.heard = []

    def log_metrics(self, metrics, step=None):
        self.heard.append({"step": step, **metrics})

    def log_hyperparams(self, params):
        raise AssertionError("not asked for")


def test_the_loggers_of_fabric_get_every_row(tmp_path):
    listeners = [Listener(), Listener()]
    run(Fabric(accelerator="cpu", devices=1, loggers=listeners), tmp_path, 1, 6)
    assert listeners[0].heard == listeners[1].heard == read_rows(tmp_path)
    assert [row["step"] for row in listeners[0].heard] == [3, 5, 6]


def test_the_layout_is_written_once_and_survives_a_cut(fabric, tmp_path):
    charts = {"losses": ["loss/a", "loss/b"], "score": ["val/score$"]}
    run(fabric, tmp_path, 1, 6, logger=(logger := MetricLogger(fabric, tmp_path, layout=charts)))
    assert "custom_scalars__config__" not in read(tmp_path).Tags()["tensors"]
    logger.resume_at(None)
    for _ in range(2):
        MetricLogger(fabric, tmp_path, layout={"other": ["x"]}).resume_at(4)
        (event,) = read(tmp_path).Tensors("custom_scalars__config__")
        (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
        assert {chart.title: list(chart.multiline.tag) for chart in category.chart} == charts


def test_a_line_cut_short_by_a_crash_is_left_out_and_cut_off(fabric, tmp_path):
    run(fabric, tmp_path, 1, 6)
    path = tmp_path / ROWS
    whole = path.read_text()
    for length in range(1, 40, 3):
        path.write_text(whole[:-length])
        assert [row["step"] for row in read_rows(tmp_path)] == [3, 5]
    MetricLogger(fabric, tmp_path).resume_at(100)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])


def test_histograms_hold_every_finite_entry(fabric, tmp_path):
    logger = MetricLogger(fabric, tmp_path)
    logger.histogram(1, "weights", torch.tensor([[1.0, 2.0], [math.nan, 4.0]]))
    logger.histogram(1, "broken", torch.tensor([math.nan]))
    weights = read(tmp_path).Histograms("weights")[0].histogram_value
    assert (weights.num, weights.min, weights.max, weights.sum, weights.sum_squares) == (3, 1, 4, 7, 21)
    filled = [limit for limit, count in zip(weights.bucket_limit, weights.bucket, strict=True) if count == 1]
    assert filled == [1 + 3 / 64, 1 + 22 * 3 / 64, 4]  # 64 equal buckets from 1 to 4
    assert read(tmp_path).Histograms("broken")[0].histogram_value.num == 0


def work(fabric, folder):
    rank, results = fabric.global_rank, {}
    logger = MetricLogger(fabric, folder)
    # Uneven parts: three samples on process 0 and one on process 1.
    for value in ([1.0, 2.0, 3.0], [10.0])[rank]:
        logger.update({"weighted": value}, weight=1)
    results["weighted"] = logger.flush(1)["weighted"]
    logger.update({"mean": float(rank)})
    results["mean"] = logger.flush(2)["mean"]
    logger.update({f"tag/{i:03d}": float(i + rank) for i in range(150)})
    row = logger.flush(3)
    results["many"] = [row[f"tag/{i:03d}"] for i in range(150)]
    results["stored"] = logger.item_state_dict()
    for name, tags in {
        "other": ["a"] if rank == 0 else ["b"],
        "more": ["a"] if rank == 0 else ["a", "b"],
        "none": ["a"] if rank == 0 else [],
        "many more": [f"{i}" for i in range(200 if rank == 0 else 3)],
    }.items():
        broken = MetricLogger(fabric, None)
        broken.update(dict.fromkeys(tags, 1.0))
        try:
            broken.flush(1)
        except ValueError as error:
            results[name] = str(error)
    open_sums = MetricLogger(fabric, None)
    open_sums.update({"a": 1.0 + rank}, weight=2.0)
    results["items"] = open_sums.item_state_dict()
    one = {"process-00000": {"sums": {"a": torch.tensor(6.0)}, "weights": {"a": 2.0}}}
    open_sums.load_item_state_dict(one)
    results["from one"] = open_sums.flush(1)["a"]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    return in_processes(work, 2, str(folder)), folder


@pytest.mark.distributed
def test_means_are_over_all_processes_and_the_first_writes(results):
    (first, second), folder = results
    for result in (first, second):
        assert result["weighted"] == 4.0
        assert result["mean"] == 0.5
        assert result["many"] == [i + 0.5 for i in range(150)]
    assert [row["step"] for row in read_rows(folder)] == [1, 2, 3]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["other", "more", "none", "many more"])
def test_different_tags_on_two_processes_raise_on_both(results, case):
    for rank, result in enumerate(results[0]):
        assert f"processes updated different tags since the last flush; process {rank} updated" in result[case]


@pytest.mark.distributed
def test_open_sums_move_to_another_number_of_processes(results):
    first, second = results[0]
    alone = MetricLogger(single_process(), None)
    alone.load_item_state_dict({**first["items"], **second["items"]})
    assert alone.flush(1)["a"] == 1.5
    assert first["from one"] == second["from one"] == 3.0


def test_a_value_of_no_weight_counts_for_nothing_even_if_it_is_not_finite(tmp_path):
    metrics = MetricLogger(single_process(), tmp_path)
    metrics.update({"val/loss": torch.tensor(2.0)}, weight=3)
    metrics.update({"val/loss": torch.tensor(float("nan"))}, weight=0)
    assert metrics.means() == {"val/loss": 2.0}
