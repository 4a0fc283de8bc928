import importlib.metadata

import pytest

from tests.benchmarks import __main__ as all_of_them
from tests.benchmarks.__main__ import Reading, main, page, suites, summary


def test_every_module_that_reports_is_run():
    assert {"classification_step", "gan_alternation", "import_time", "layer_overhead", "maml_step"} <= set(suites())
    assert {"multitask_step", "ppo_speed"} <= set(suites())
    assert not {"interleave", "__main__", "test_every_comparison"} & set(suites())
    assert set(all_of_them.PEERS) <= set(suites())


def test_the_table_names_versions_what_is_missing_and_what_failed():
    readings = [Reading("classification_step", 0, 61.6, "a\n"), Reading("gan_alternation", 1, 2, "b\n")]
    lightning = importlib.metadata.version("lightning")
    lines = summary(readings).splitlines()
    assert f"lightning {lightning}" in lines[2]
    assert lines[2].endswith("| 62 s |  |")
    assert lines[3] == "| `gan_alternation` | raw PyTorch | 2 s | failed, status 1 |"
    assert all_of_them.version("no-distribution-of-this-name") == "no-distribution-of-this-name not installed"


def test_a_comparison_runs_in_its_own_process_and_is_written_to_a_page(tmp_path, monkeypatch, capsys):
    package = tmp_path / "tests" / "benchmarks"
    package.mkdir(parents=True)
    # Before a package of this name that some other project has installed.
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    body = "def report(): ...\n"
    (package / "good.py").write_text(f"\n{body}print('12.5 ms')\n")
    (package / "bad.py").write_text(f"\n{body}raise SystemExit(3)\n")
    (package / "interleave.py").write_text("x = 1\n")
    monkeypatch.setattr(all_of_them, "FOLDER", package)
    assert suites() == ["bad", "good"]
    out = tmp_path / "pages" / "day.md"
    assert main(["--only", "good", "--out", str(out)]) == 0
    assert "12.5 ms" in out.read_text()
    assert "python -m tests.benchmarks.good" in out.read_text()
    assert main([]) == 1
    assert "| `bad` | raw PyTorch | " in capsys.readouterr().out


def test_a_page_begins_with_date_and_machine():
    lines = page([Reading("gan_alternation", 0, 1, "ratio 1.02\n")], "2026-01-31").splitlines()
    assert lines[0] == "# Reading of 2026-01-31"
    assert "Python" in lines[2]


def test_a_wrong_name_is_refused():
    with pytest.raises(SystemExit) as end:
        main(["--only", "nothing_of_this_name"])
    assert end.value.code == 2
