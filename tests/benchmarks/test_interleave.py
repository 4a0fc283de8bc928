import pytest

from tests.benchmarks.interleave import interleave, stopwatch, table


class FakeClock:
    """A clock that only work moves, on a machine that slows down from call to call."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def read(self):
        return self.now

    def contender(self, name, seconds, slowness=lambda call: 1.0, steps=1):
        def work():
            self.order.append(name)
            self.now += steps * seconds * slowness(self.order.count(name))

        return stopwatch(work, steps, self.read)


def test_contenders_run_in_turn_and_a_first_round_does_not_count():
    clock = FakeClock()
    contenders = {
        "first": clock.contender("first", 2.0, lambda call: 100.0 if call == 1 else 1.0),
        "second": clock.contender("second", 3.0),
    }
    first, second = interleave(contenders, 4)
    assert clock.order == ["first", "second"] * 5
    assert (first.seconds, first.ratio, first.extra_seconds) == (2.0, 1.0, 0.0)
    assert (second.seconds, second.ratio, second.ratio_quartiles, second.extra_seconds) == (3.0, 1.5, (1.5, 1.5), 1.0)


def test_a_machine_that_slows_down_changes_no_ratio():
    clock = FakeClock()
    contenders = {
        name: clock.contender(name, seconds, lambda call: 1.5**call) for name, seconds in (("a", 1.0), ("b", 1.25))
    }
    b = interleave(contenders, 7)[1]
    assert b.ratio == pytest.approx(1.25)
    # Round 0 does not count, so the middle one of seven is the fifth call.
    assert b.seconds == pytest.approx(1.25 * 1.5**5)


def test_the_median_is_of_ratios_and_not_a_ratio_of_medians():
    times = {"a": iter([9.0, 1.0, 2.0, 10.0]), "b": iter([9.0, 2.0, 6.0, 10.0])}
    contenders = {name: lambda own=own: next(own) for name, own in times.items()}
    b = interleave(contenders, 3)[1]
    assert b.ratio == 2.0  # of 2, 3 and 1
    assert b.seconds / 2.0 == 3.0  # the ratio of medians, 6 by 2
    assert b.ratio_quartiles == (1.5, 2.5)
    assert b.extra_seconds == 1.0  # of 1, 4 and 0


def test_one_disturbed_round_moves_neither_ratio_nor_time():
    clock = FakeClock()
    contenders = {
        "a": clock.contender("a", 1.0),
        "b": clock.contender("b", 1.02, lambda call: 50.0 if call == 3 else 1.0),
    }
    b = interleave(contenders, 9)[1]
    assert (b.seconds, b.ratio) == pytest.approx((1.02, 1.02))


def test_stopwatch_gives_seconds_a_step():
    assert FakeClock().contender("a", 0.25, steps=8)() == 0.25


def test_the_table_says_whether_a_target_is_met():
    times = {"a": lambda: 0.005, "met": lambda: 0.005, "missed": lambda: 0.0052}
    lines = table("title", interleave(times, 2, targets={"met": 1.02, "missed": 1.02})).splitlines()
    assert lines[2].split() == ["met", "5.000", "1.000", "1.000-1.000", "0.0", "1.02", "met"]
    assert lines[3].split() == ["missed", "5.200", "1.040", "1.040-1.040", "200.0", "1.02", "MISSED"]


def test_one_round_has_no_quartiles():
    with pytest.raises(ValueError, match="rounds: 1"):
        interleave({"a": lambda: 1.0}, 1)
