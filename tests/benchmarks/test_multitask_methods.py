import json

import pytest

from tests.benchmarks import multitask_methods
from tests.benchmarks.multitask_methods import Lines, row, run, tuned_rate

FIELDS = {"steps": 4, "width": 2, "validate_every": 2, "checkpoint_every": 2}
ALONE = {"left": 0.8, "right": 0.5}


def test_a_run_is_scored_on_the_tasks_that_it_has():
    both = run("digits", "equal", 0, FIELDS)
    alone = run("digits", "only right", 0, FIELDS)
    assert set(both["test"]) == set(both["val"]) == {"left", "right"}
    assert set(alone["test"]) == {"right"}
    assert both["best"] in (2, 4)


def test_what_is_in_the_file_is_not_run_again_and_a_failure_is_a_result(tmp_path, monkeypatch):
    runs = []

    def fake(preset, method, seed, fields):
        runs.append((method, fields["lr"]))
        if method == "mgda":
            raise multitask_methods.SolverError("no")
        return {"val": {"left": -abs(fields["lr"] - 3e-3), "right": 0.0}, "test": {}}

    monkeypatch.setattr(multitask_methods, "run", fake)
    for _ in range(2):
        lines = Lines(tmp_path / "lines.jsonl")
        assert tuned_rate("digits", {"data_root": "here"}, lines) == 3e-3
        assert lines.get("digits", "mgda", 0, {"lr": 3e-3, "data_root": "there"})["error"] == "no"
    assert runs == [("equal", 1e-3), ("equal", 3e-3), ("equal", 1e-2), ("mgda", 3e-3)]
    keys = [json.loads(line)["run"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert keys[-1] == ["digits", "mgda", 0, {"lr": 3e-3}]


def test_rows_are_means_over_seeds_with_delta_m_over_the_tasks_alone():
    found = [{"test": {"left": 0.88, "right": 0.5}}, {"test": {"left": 0.8, "right": 0.4}}]
    delta, text = row("mgda", found, ALONE)
    assert delta == pytest.approx((5 - 10) / 2)
    assert text == "| `mgda` | 84.00% | 45.00% | -2.50 | -10.00 to +5.00 |"
    assert row("only right", [{"test": {"right": 0.5}}], ALONE)[1] == "| only right |  | 50.00% | | |"
    assert "gave up on 1 of 2 seeds" in row("mgda", [found[0], {"error": "no"}], ALONE)[1]
