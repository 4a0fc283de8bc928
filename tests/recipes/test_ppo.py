"""The loss against sums written out, what a value learns about ends, and the recipe's own commands."""

import math
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from lightning_custom.action_distributions import action_distribution
from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.environments.makers import MakeEnvironment, MakeVector
from lightning_custom.environments.normalisation import RunningMoments
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.numpy_network import to_tensors
from lightning_custom.policies import actor_critic
from lightning_custom.precision import unwrap
from lightning_custom.state import capture
from lightning_custom.testing import (
    assert_resumes_exactly,
    first_difference,
    in_processes,
    largest_difference,
    single_process,
)
from recipes import ppo

B = 40


def config(**fields):
    return ppo.PPOConfig(
        **{"num_envs": 4, "rollout_steps": 16, "epochs": 2, "minibatches": 2, "width": 8, "steps": 4, "log_every": 1}
        | {"validate_every": 0, "checkpoint_every": 0, "val_episodes": 2, "accelerator": "cpu"}
        | fields
    )


@pytest.fixture
def minibatch():
    torch.manual_seed(0)
    observations = torch.randn(B, 3, dtype=torch.float64)
    distribution = action_distribution(spaces.Discrete(4))
    agent = actor_critic(spaces.Box(-1, 1, (3,)), distribution, width=8, policy_gain=1.0).double()
    with torch.no_grad():
        parameters, values = agent(observations)
        actions = torch.randint(0, 4, (B,))
        log_probabilities, _ = distribution.log_probability_and_entropy(parameters, actions)
    # As after some updates: the ratios are spread around 1, some past the clip range.
    log_probabilities += 0.3 * torch.randn(B, dtype=torch.float64)
    advantages, returns = torch.randn(2, B, dtype=torch.float64)
    weights = torch.full((B,), 1 / B, dtype=torch.float64)
    batch = (observations, actions, log_probabilities, advantages, returns, values + 0.1, weights)
    return agent, distribution, batch, torch.tensor(0.2, dtype=torch.float64)


@pytest.mark.parametrize("clip_value", [False, True])
def test_loss_is_the_papers_written_out_for_each_sample(minibatch, clip_value):
    agent, distribution, batch, clip = minibatch
    settings = config(clip_value=clip_value, entropy_coefficient=0.03, value_coefficient=0.7)
    total, values = ppo.ppo_loss(settings, distribution, agent, *batch, clip)
    observations, actions, before, advantages, returns, old_values, _ = batch
    probabilities, expected = torch.softmax(agent(observations)[0], 1).tolist(), []
    for i, new_value in enumerate(agent(observations)[1].tolist()):
        row, advantage = probabilities[i], float(advantages[i])
        ratio = row[actions[i]] / math.exp(float(before[i]))
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        error = (new_value - float(returns[i])) ** 2
        if clip_value:
            moved = float(old_values[i]) + min(max(new_value - float(old_values[i]), -0.2), 0.2)
            error = max(error, (moved - float(returns[i])) ** 2)
        entropy = -sum(p * math.log(p) for p in row)
        kl = ratio - 1 - math.log(ratio)
        expected.append((surrogate, error / 2, entropy, kl, float(abs(ratio - 1) > 0.2)))
    surrogate, error, entropy, kl, clipped = np.mean(expected, 0)
    assert float(total.detach()) == pytest.approx(-surrogate + 0.7 * error - 0.03 * entropy, rel=1e-12)
    tags = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac")
    found = [float(values[f"losses/{tag}"]) for tag in tags]
    assert found == pytest.approx([-surrogate, error, entropy, kl, clipped], rel=1e-12)
    assert 0 < clipped < 1


def test_a_ratio_past_the_clip_range_on_the_better_side_has_no_gradient(minibatch):
    agent, distribution, batch, clip = minibatch
    observations, actions, _, _, *rest = batch
    with torch.no_grad():
        now, _ = distribution.log_probability_and_entropy(agent(observations)[0], actions)
    for shift, advantage, is_zero in ((-0.5, 1.0, True), (-0.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False)):
        given = (observations, actions, now + shift, torch.full_like(now, advantage), *rest)
        total, _ = ppo.ppo_loss(config(value_coefficient=0.0), distribution, agent, *given, clip)
        gradients = torch.autograd.grad(total, list(agent.policy.parameters()))
        assert (max(float(gradient.abs().max()) for gradient in gradients) == 0) == is_zero


def test_the_first_update_of_a_rollout_is_that_of_a2c(minibatch):
    agent, distribution, batch, clip = minibatch
    observations, actions, _, advantages, returns, *rest = batch
    log_probabilities, entropies = distribution.log_probability_and_entropy(agent(observations)[0], actions)
    given = (observations, actions, log_probabilities.detach(), advantages, returns, *rest)
    settings = config(entropy_coefficient=0.02)
    found = torch.autograd.grad(ppo.ppo_loss(settings, distribution, agent, *given, clip)[0], [*agent.parameters()])
    errors = agent(observations)[1] - returns
    loss = (-advantages * log_probabilities + 0.5 * 0.5 * errors.square() - 0.02 * entropies).mean()
    for one, other in zip(found, torch.autograd.grad(loss, [*agent.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_compiled_gradient_is_the_eager_one(minibatch):
    agent, distribution, batch, clip = minibatch
    parameters = dict(agent.named_parameters())

    def loss(given, *minibatch):
        return ppo.ppo_loss(
            config(clip_value=True, entropy_coefficient=0.01), distribution,
            lambda inputs: torch.func.functional_call(agent, given, (inputs,)), *minibatch,
        )  # fmt: skip

    expected = torch.autograd.grad(loss(parameters, *batch, clip)[0], list(parameters.values()))
    total, _ = CompiledGradient(loss)(parameters, *batch, clip)
    found = torch.autograd.grad(total, list(parameters.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_is_the_eager_one_and_resumes_exactly(tmp_path):
    settings, make_env = config(compile=True, steps=6, precision="64-true"), MakeEnvironment("CartPole-v1")

    def run(fabric, settings):
        return ppo.train(fabric, settings, make_env=make_env)

    assert_resumes_exactly(run, settings, stop_at=3, folder=tmp_path, precision="64-true")
    compiled, eager = (
        capture(run(single_process("64-true"), replace(settings, compile=is_on, run_dir=str(tmp_path / f"{is_on}"))))
        for is_on in (True, False)
    )
    assert largest_difference(compiled, eager) <= 1e-9


class Tick(gym.Env):
    """Reward 1 a step; the observation is always the same; ends after 5 steps."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, is_terminated):
        self.is_terminated, self.count = is_terminated, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.count += 1
        ends = self.count == 5
        return np.ones(1, np.float32), 1.0, ends and self.is_terminated, ends and not self.is_terminated, {}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def value_of(is_terminated, folder):
    settings = config(
        steps=150, rollout_steps=20, minibatches=1, epochs=4, lr=0.02, discount=0.9, gae_decay=1.0, anneal_lr=True,
        max_grad_norm=0.0, run_dir=str(folder),
    )  # fmt: skip
    state = ppo.train(single_process(), settings, make_env=lambda index: Tick(is_terminated))
    return float(unwrap(state.agent)(torch.ones(1, 1))[1].detach())


def test_a_value_sees_past_a_truncation_and_not_past_a_termination(tmp_path):
    # 1 + 0.9 + 0.81 + ... and the mean over the steps of an episode of what is left of it.
    assert value_of(False, tmp_path / "truncated") == pytest.approx(10, rel=0.05)
    left = [sum(0.9**t for t in range(5 - step)) for step in range(5)]
    assert value_of(True, tmp_path / "terminated") == pytest.approx(np.mean(left), rel=0.05)


def test_estimates_of_a_rollout_are_of_the_agent_that_played_and_leave_ignored_steps_out(tmp_path):
    kept = {}
    estimate = ppo.estimate

    def keep(*arguments):
        kept["rollout"], kept["batch"] = arguments[-1], estimate(*arguments)[0]
        return kept["batch"], 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "estimate", keep)
        settings = config(rollout_steps=64, steps=1, lr=0.0, run_dir=str(tmp_path))
        state = ppo.train(
            single_process(), settings, make_env=MakeEnvironment("CartPole-v1"), make_vector=MakeVector("CartPole-v1")
        )
    batch, rollout = kept["batch"], kept["rollout"]
    parameters, values = unwrap(state.agent)(to_tensors(batch["observations"].numpy(), torch.device("cpu")))
    torch.testing.assert_close(batch["values"], values.detach(), rtol=1e-5, atol=1e-6)
    expected = torch.log_softmax(parameters, 1).gather(1, batch["actions"][:, None])[:, 0]
    torch.testing.assert_close(batch["log_probabilities"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(batch["weights"].bool(), torch.from_numpy(rollout.valid).flatten())
    assert not batch["weights"].all()


def test_minibatches_have_normalised_advantages_and_weights_of_sum_one():
    settings = config(minibatches=4)
    batch = {name: torch.randn(64) for name in ("observations", "actions", "log_probabilities", "advantages")}
    batch |= {"returns": torch.randn(64), "values": torch.randn(64), "weights": (torch.rand(64) > 0.2).float()}
    order = torch.randperm(64)
    seen = []
    for part in ppo.minibatches(single_process(), settings, dict(batch), order):
        observations, *_, advantages, _, _, weights = part
        seen += observations.tolist()
        assert float(weights.sum()) == pytest.approx(1, rel=1e-6)
        valid = advantages[weights > 0]
        assert float(valid.mean()) == pytest.approx(0, abs=1e-6)
        assert float(valid.std()) == pytest.approx(1, rel=1e-5)
    assert seen == batch["observations"][order].tolist()


def test_a_minibatch_of_ignored_steps_only_weighs_nothing():
    batch = {name: torch.randn(8) for name in ("observations", "actions", "log_probabilities", "advantages")}
    batch |= {"returns": torch.randn(8), "values": torch.randn(8), "weights": torch.tensor([0.0] * 4 + [1.0] * 4)}
    ignored, valid = ppo.minibatches(single_process(), config(minibatches=2), batch, torch.arange(8))
    assert ignored[-1].tolist() == [0.0] * 4
    assert torch.isfinite(ignored[3]).all()
    assert valid[-1].tolist() == [0.25] * 4


def test_updates_end_once_the_policy_has_moved_past_the_target(tmp_path):
    calls = []
    loss = ppo.ppo_loss

    def counted(*arguments):
        calls.append(1)
        return loss(*arguments)

    numbers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "ppo_loss", counted)
        for name, target in (("none", None), ("far", 1e9), ("near", 1e-30)):
            calls.clear()
            settings = config(epochs=6, steps=2, lr=1e-2, target_kl=target, run_dir=str(tmp_path / name))
            ppo.train(single_process(), settings, make_env=MakeEnvironment("CartPole-v1"))
            numbers.append(len(calls))
    assert numbers == [24, 24, 4]


def test_a_run_of_a_vector_of_gymnasiums_resumes_exactly(tmp_path):
    def run(fabric, settings):
        make_vector = MakeVector("CartPole-v1")
        return ppo.train(fabric, settings, make_env=MakeEnvironment("CartPole-v1"), make_vector=make_vector)

    assert_resumes_exactly(run, config(steps=8), stop_at=3, folder=tmp_path)


def test_the_rows_have_the_tags_that_the_field_expects(tmp_path):
    settings = config(steps=6, rollout_steps=32, validate_every=6, run_dir=str(tmp_path))
    ppo.train(single_process(), settings, make_env=MakeEnvironment("CartPole-v1"))
    tags = {tag for row in read_rows(tmp_path) for tag in row}
    assert tags >= {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate", "losses/policy_loss",
        "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance",
        "val/episodic_return", "val/episodic_return_interval",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"minibatches": 3}, "minibatches: 3 do not divide 4 x 16 steps"),
        ({"discount": 1.5}, "discount: 1.5; give a number from 0 to 1"),
        ({"num_envs": 0}, "num_envs: 0; it must be at least 1"),
        ({"target_kl": 0.0}, "target_kl: 0.0; give a number above 0, or none"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_normalised_observations_that_are_no_numbers_are_refused(tmp_path):
    settings = replace(config(), normalise_observations=True, run_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"normalise_observations: true, but observations are in Discrete"):
        ppo.train(single_process(), settings, make_env=MakeEnvironment("FrozenLake-v1"))


def test_a_trained_agent_is_shown(tmp_path, capsys):
    settings = config(
        num_envs=2, rollout_steps=8, epochs=1, steps=2, test_episodes=2, normalise_observations=True,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert ppo.main(settings) == str(tmp_path / "run")
    assert "32 environment steps" in capsys.readouterr().out
    ppo.enjoy(ppo.EnjoyConfig(run_dir=str(tmp_path / "run"), out=str(tmp_path / "agent.gif"), episodes=2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("returns ")
    with Image.open(tmp_path / "agent.gif") as picture:
        assert picture.n_frames > 5


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="env: CartPol-v1 cannot be made"):
        ppo.main(config(env="CartPol-v1", run_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="holds no run; check the path"):
        ppo.enjoy(ppo.EnjoyConfig(run_dir=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"out: agent.txt does not end in .gif; choose another with --out"):
        ppo.EnjoyConfig(run_dir=str(tmp_path / "run"), out="agent.txt")


# Two processes: what they share, and what becomes of the run where they do not


def run_normalised(fabric, folder, name):
    """The state that a run with every statistic ends with."""
    settings = config(
        normalise_observations=True, normalise_rewards=True, minibatches=1, epochs=1, max_grad_norm=0.0,
        run_dir=str(Path(folder) / name),
    )  # fmt: skip
    return capture(ppo.train(fabric, settings, make_env=MakeEnvironment("CartPole-v1")))


def normalised_alone(fabric, settings, batch, order, whole=ppo.minibatches):
    """Minibatches whose advantages have mean 0 and deviation 1 in each process's part."""
    for *parts, advantages, returns, values, weights in whole(fabric, settings, batch, order):
        alone = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        yield (*parts, alone, returns, values, weights)


def shared_and_alone(fabric, folder):
    """The state with everything shared, and with each statistic of the processes' own; both divergences' mean."""
    found = {"shared": run_normalised(fabric, folder, "shared")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningMoments, "_sum", lambda self, part, count: (part, count))
        found["moments alone"] = run_normalised(fabric, folder, "moments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "minibatches", normalised_alone)
        found["advantages alone"] = run_normalised(fabric, folder, "advantages")
    divergences = [
        {"losses/approx_kl": torch.tensor(value)} for value in ((0.01, 0.03), (0.05, 0.07))[fabric.global_rank]
    ]
    return found, ppo.mean_kl(fabric, divergences)


@pytest.mark.distributed
def test_two_processes_share_normalisers_advantage_statistics_and_the_end_of_the_updates(tmp_path):
    one = run_normalised(single_process("64-true"), tmp_path, "one")
    (first, kl), (second, other_kl) = in_processes(shared_and_alone, 2, str(tmp_path / "two"), precision="64-true")
    assert first_difference(first["shared"], second["shared"]) is None
    assert largest_difference(one, first["shared"]) <= 1e-9
    for name in ("moments alone", "advantages alone"):
        assert largest_difference(one, first[name]) > 1e-4
    # Of a target of 0.03, the first process alone would go on and the second would not.
    assert kl == other_kl == pytest.approx(0.04)
