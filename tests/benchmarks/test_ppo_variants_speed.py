"""The contenders do the same work: otherwise their times say nothing."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from lightning_custom.environments.makers import MakeEnvironment
from recipes import ppo, recurrent_ppo
from tests.benchmarks.ppo_variants_speed import (
    PONG,
    RECURRENT,
    memory_by_sb3_contrib,
    pong_by_stable_baselines3,
    recipe,
)

SMALL = {"num_envs": 4, "rollout_steps": 8, "steps": 3, "log_every": 1}
PONG_SMALL, RECURRENT_SMALL = replace(PONG, **SMALL), replace(RECURRENT, **SMALL)


def backward_passes(run):
    """How many updates a run makes: each has one."""
    passes, backward = [], torch.Tensor.backward

    def counting(loss, *args, **kwargs):
        passes.append(1)
        return backward(loss, *args, **kwargs)

    with patch.object(torch.Tensor, "backward", counting):
        assert run() > 0
    return len(passes)


def test_the_recipe_makes_the_updates_of_its_config_on_pong():
    pytest.importorskip("ale_py")
    run = lambda: recipe(ppo.train, PONG_SMALL, MakeEnvironment(PONG_SMALL.env))  # noqa: E731
    assert backward_passes(run) == 3 * 4 * 4


def test_stable_baselines3_makes_as_many_on_pong():
    pytest.importorskip("ale_py")
    pytest.importorskip("stable_baselines3")
    assert backward_passes(lambda: pong_by_stable_baselines3(PONG_SMALL)) == 3 * 4 * 4


def test_the_recipe_makes_the_updates_of_its_config_with_memory():
    make_env = MakeEnvironment(RECURRENT.env, hide=RECURRENT.hide)
    assert backward_passes(lambda: recipe(recurrent_ppo.train, RECURRENT_SMALL, make_env)) == 3 * 10


def test_sb3_contrib_makes_as_many_with_memory():
    pytest.importorskip("sb3_contrib")
    assert backward_passes(lambda: memory_by_sb3_contrib(RECURRENT_SMALL)) == 3 * 10
