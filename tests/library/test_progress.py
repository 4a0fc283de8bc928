import io
import sys
from types import SimpleNamespace

import pytest

from lightning_custom.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def process(rank=0):
    return SimpleNamespace(global_rank=rank)


def use_terminal(monkeypatch):
    """In the test itself: pytest puts its own streams back after every fixture."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_off_a_terminal_a_flush_is_one_plain_line(capsys):
    with Progress(process(), 100) as progress:
        for step in range(1, 11):
            progress.show(step)
        progress.report(10, {"loss/a": 0.123456, "lr": 1e-5, "big": 123456.0, "nan": float("nan")})
        progress.report(10, {})
    captured = capsys.readouterr()
    assert captured.out == "step 10/100  loss/a 0.1235  lr 1e-05  big 1.235e+05  nan nan\n"
    assert captured.err == ""


def test_other_processes_say_nothing(capsys, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with Progress(process(1), 100) as progress:
        progress.show(1)
        progress.report(1, {"loss/a": 1.0})
    assert capsys.readouterr().out == ""
    assert terminal.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_the_values_and_no_lines(capsys, monkeypatch):
    terminal = use_terminal(monkeypatch)
    with Progress(process(), 20, unit="update") as progress:
        for step in range(1, 21):
            progress.show(step)
            progress.report(step, {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    last = terminal.getvalue().rpartition("\r")[2]
    assert "20/20" in last
    assert "100%" in last
    assert "a 1  b 2  c 3" in last
    assert "d 4" not in last
    assert capsys.readouterr().out == ""


def test_a_resumed_run_counts_its_rate_from_where_it_goes_on(monkeypatch):
    use_terminal(monkeypatch)
    with Progress(process(), 1000) as progress:
        progress.show(901)
        bar = progress._bar
        assert (bar.initial, bar.n) == (900, 901)
        progress.show(902)
        assert bar.n == 902
        progress.show(902)
        assert bar.n == 902


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_resumed_run_says_where_it_goes_on_once(monkeypatch, capsys, is_terminal):
    if is_terminal:
        use_terminal(monkeypatch)
    for first, expected in ((901, "goes on from step 900\n"), (1, "")):
        with Progress(process(), 1000) as progress:
            progress.show(first)
            progress.show(first + 1)
        assert capsys.readouterr().out == expected
