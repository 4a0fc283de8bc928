import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_custom.errors import ConfigError
from lightning_custom.loop import due, hash_seed, parse_duration, seed_step


def rank(number):
    return SimpleNamespace(global_rank=number)


def draws_of_defaults():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_due_every_and_last():
    assert [step for step in range(1, 8) if due(step, 3, last=7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 0, last=7)] == [7]
    assert [step for step in range(1, 8) if due(step, 0)] == []


def test_seeds_of_a_grid_do_not_collide():
    seeds = [hash_seed(seed, step, name) for seed in range(20) for step in range(300) for name in ("train", "order")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_sums_and_shifts_of_seed_and_step_collide():
    """Why seeds are hashed: what a sum or a shift of seed and step gives on torch's CPU generator."""

    def draw(seed):
        return torch.rand(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3 + 4), draw(4 + 3))
    assert torch.equal(draw((3 << 32) + 4), draw((7 << 32) + 4))
    assert not torch.equal(draw(hash_seed(3, 4)), draw(hash_seed(4, 3)))
    assert not torch.equal(draw(hash_seed(3 << 32, 4)), draw(hash_seed(7 << 32, 4)))


def test_a_step_draws_the_same_whatever_came_before():
    first = seed_step(1, 10, rank(0))
    expected = torch.rand(2, generator=first.shared), torch.rand(2, generator=first.local), draws_of_defaults()
    torch.rand(1000), np.random.rand(7), random.random()
    again = seed_step(1, 10, rank(0))
    actual = torch.rand(2, generator=again.shared), torch.rand(2, generator=again.local), draws_of_defaults()
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1])
    assert expected[2] == actual[2]


@pytest.mark.parametrize("other", [(2, 10, "train"), (1, 11, "train"), (1, 10, "validation")])
def test_another_seed_step_or_stream_draws_other_numbers(other):
    seed, step, stream = other
    one, two = seed_step(1, 10, rank(0)), seed_step(seed, step, rank(0), stream=stream)
    assert not torch.equal(torch.rand(4, generator=one.shared), torch.rand(4, generator=two.shared))
    assert not torch.equal(torch.rand(4, generator=one.local), torch.rand(4, generator=two.local))


def test_shared_is_equal_and_local_different_on_every_process():
    shared, local, defaults = [], [], []
    for number in range(3):
        generators = seed_step(1, 10, rank(number))
        shared.append(tuple(torch.rand(4, generator=generators.shared).tolist()))
        local.append(tuple(torch.rand(4, generator=generators.local).tolist()))
        defaults.append(str(draws_of_defaults()))
    assert len(set(shared)) == 1
    assert len(set(local)) == 3
    assert len(set(defaults)) == 3


def test_the_local_generator_and_the_default_one_are_not_the_same_stream():
    generators = seed_step(1, 10, rank(0))
    assert not torch.equal(torch.rand(4, generator=generators.local), torch.rand(4))


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("45", 45.0), ("90s", 90.0), ("2m", 120.0), ("1h30m", 5400.0), ("2d", 172800.0), ("1d2h3m4s", 93784.0),
        ("01:30:00", 5400.0), ("1-00:00:01", 86401.0),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "soon", "1x", "30m1h", "-5", "1:30"])
def test_what_is_no_duration_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=r"max_time: .* is not a duration; write for example 90s"):
        parse_duration(text)
