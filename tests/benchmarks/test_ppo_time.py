"""The parts that are timed are those of the loop, and together all of it."""

import pytest

from tests.benchmarks.ppo_time import read


@pytest.mark.parametrize("vectorised", [False, True])
def test_the_parts_take_all_of_the_time(vectorised):
    found = read(2, 2, 1, vectorised=vectorised, compiled=False)
    total = found.pop("all")
    assert found.keys() == {
        "environments", "policy", "keeping what happened", "values and advantages", "minibatches", "loss",
        "backward pass", "gradient norm", "Adam", "rest",
    }  # fmt: skip
    assert min(found.values()) > 0
    assert sum(found.values()) == pytest.approx(total)
