"""Values of a rollout against episodes played through alone, the loss, and what memory is good for."""

from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from lightning_custom.action_distributions import action_distribution
from lightning_custom.animation import write_animation
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.policies import ActorCritic
from lightning_custom.precision import unwrap
from lightning_custom.recurrent import EnvironmentMemory, empty_memory, recurrent_actor_critic
from lightning_custom.state import capture
from lightning_custom.testing import (
    assert_resumes_exactly,
    first_difference,
    in_processes,
    largest_difference,
    single_process,
)
from recipes import ppo, recurrent_ppo

CARTPOLE = MakeEnvironment("CartPole-v1", hide=(1, 3))


def config(**fields):
    return recurrent_ppo.RecurrentPPOConfig(
        **{"num_envs": 4, "rollout_steps": 16, "epochs": 2, "minibatches": 2, "width": 8, "steps": 4, "log_every": 1}
        | {"validate_every": 0, "checkpoint_every": 0, "val_episodes": 2, "accelerator": "cpu"}
        | fields
    )


def kept_of(name, settings, make_env, precision="64-true"):
    """What a run's last call of a function of the recipe got and gave, and the state that it ended with."""
    kept, function = {}, getattr(recurrent_ppo, name)

    def keep(*arguments, **named):
        kept["arguments"], kept["result"] = arguments, function(*arguments, **named)
        return kept["result"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_ppo, name, keep)
        state = recurrent_ppo.train(single_process(precision), settings, make_env=make_env)
    return kept["arguments"], kept["result"], state


def short_pendulum(index):
    """Truncated after 5 steps, and after 9, so that episodes begin everywhere in a rollout."""
    return gym.wrappers.TimeLimit(MakeEnvironment("Pendulum-v1", hide=(2,))(), 5 if index % 2 else 9)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_values_of_a_rollout_are_those_of_its_episodes_played_through_alone(cell, tmp_path):
    # Two rollouts: the second begins in the middle of episodes. The learning rate of 0 keeps the agent.
    settings = config(steps=2, lr=0.0, cell=cell, run_dir=str(tmp_path), precision="64-true")
    rollouts, following = [], []
    estimate, following_values = recurrent_ppo.estimate, recurrent_ppo.following_values

    def keep(*arguments):
        found, (state, rollout) = estimate(*arguments), (arguments[2], arguments[5])
        rollouts.append((*rollout.sequences(state.envs.observations), rollout.ended, found[0]))
        return found

    def keep_values(values, *others):
        following.append((values, following_values(values, *others)))
        return following[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_ppo, "estimate", keep)
        patch.setattr(recurrent_ppo, "following_values", keep_values)
        state = recurrent_ppo.train(single_process("64-true"), settings, make_env=short_pendulum)
    agent, distribution = unwrap(state.agent), action_distribution(state.envs.action_space)
    seen = np.concatenate([part[0][:-1] for part in rollouts])
    finals, ended = np.concatenate([part[1][0] for part in rollouts]), np.concatenate([part[2] for part in rollouts])
    actions, log_probabilities = (
        torch.cat([part[3][name] for part in rollouts]) for name in ("actions", "log_probabilities")
    )
    values, next_values = map(np.concatenate, zip(*following, strict=True))
    assert ended.sum() > 12
    which = np.cumsum(ended).reshape(ended.shape) - 1  # the place of an end among all ends
    for e in range(4):
        begins = [0, *(np.flatnonzero(ended[:, e]) + 1)]
        for begin, end in zip(begins, [*begins[1:], len(seen)], strict=True):
            whole = [*seen[begin:end, e], finals[which[end - 1, e]] if ended[end - 1, e] else None]
            whole = torch.from_numpy(np.stack([part for part in whole if part is not None]))[:, None].double()
            starts = torch.zeros(len(whole), 1, dtype=torch.bool)
            parameters, expected, _ = agent(whole, torch.zeros(1, agent.memory_size).double(), starts)
            expected, steps = expected.detach()[:, 0].numpy(), end - begin
            np.testing.assert_allclose(values[begin:end, e], expected[:steps], rtol=1e-9, atol=1e-12)
            # The last of an episode that goes on is known where the next rollout begins.
            known = len(expected) - 1
            np.testing.assert_allclose(next_values[begin : begin + known, e], expected[1:], rtol=1e-9, atol=1e-12)
            logs, _ = distribution.log_probability_and_entropy(parameters[:steps, 0], actions[begin:end, e])
            torch.testing.assert_close(log_probabilities[begin:end, e], logs.detach(), rtol=1e-9, atol=1e-12)


def test_actions_are_drawn_from_the_probabilities_that_updates_begin_with(tmp_path):
    acted = []
    recurrent_act = recurrent_ppo.recurrent_act

    def noted(*arguments):
        act = recurrent_act(*arguments)
        return lambda *inputs: acted.append(act(*inputs)) or acted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_ppo, "recurrent_act", noted)
        settings = config(steps=3, run_dir=str(tmp_path), precision="64-true")
        _, (batch, _), state = kept_of("estimate", settings, CARTPOLE)
    logits = np.stack([parameters for parameters, _ in acted[-settings.rollout_steps :]])
    expected = torch.log_softmax(torch.from_numpy(logits), 2).gather(2, batch["actions"][..., None])[..., 0]
    torch.testing.assert_close(batch["log_probabilities"], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(state.memory.values, acted[-1][1])


def test_the_loss_of_sequences_is_that_of_ppo_for_their_steps(tmp_path):
    settings = config(steps=3, minibatches=1, entropy_coefficient=0.03, run_dir=str(tmp_path), precision="64-true")
    _, (batch, _), state = kept_of("estimate", settings, CARTPOLE)
    agent, distribution = unwrap(state.agent), action_distribution(spaces.Discrete(2))
    (minibatch,) = recurrent_ppo.minibatches(single_process(), settings, batch, torch.arange(4))
    observations, starts, memory, actions, log_probabilities, advantages, returns, weight = minibatch
    total, values = recurrent_ppo.ppo_loss(
        settings, distribution, lambda *inputs: agent(inputs[0].double(), *inputs[1:]), *minibatch
    )
    assert starts.any()
    assert not starts.all()
    assert memory.abs().max() > 0

    # PPO's own, for the same outputs one step beside another.
    parameters, new_values, _ = agent(observations.double(), memory[0], starts)
    flat = (parameters.flatten(0, 1), new_values.flatten())
    plain = ppo.PPOConfig(entropy_coefficient=0.03)
    parts = (part.flatten() for part in (actions, log_probabilities, advantages, returns, returns))
    weights, clip = torch.full((64,), weight, dtype=torch.float64), torch.tensor(settings.clip)
    expected, tags = ppo.ppo_loss(plain, distribution, lambda _: flat, None, *parts, weights, clip)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert {tag: float(value) for tag, value in values.items()} == pytest.approx(
        {tag: float(value) for tag, value in tags.items()}, rel=1e-9, abs=1e-12
    )
    found, expected = (
        torch.autograd.grad(loss, [*agent.parameters()], retain_graph=True) for loss in (total, expected)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_first_ratio_of_a_rollout_is_one(tmp_path):
    settings = config(steps=3, epochs=1, minibatches=1, lr=0.01, run_dir=str(tmp_path), precision="64-true")
    _, (_, values), _ = kept_of("ppo_loss", settings, CARTPOLE)
    assert float(values["losses/approx_kl"]) == pytest.approx(0, abs=1e-12)
    settings = replace(settings, epochs=2, run_dir=str(tmp_path / "two"))
    _, (_, values), _ = kept_of("ppo_loss", settings, CARTPOLE)
    assert float(values["losses/approx_kl"]) > 1e-6


def test_minibatches_are_environments_with_all_their_steps_and_normalised_advantages():
    settings, order = config(num_envs=6, minibatches=3), torch.randperm(6)
    batch = {"observations": torch.arange(6.0).expand(16, 6), "starts": torch.zeros(16, 6).bool()}
    batch |= {"memory": torch.arange(6.0).view(1, 6, 1), "actions": torch.arange(16).view(16, 1).expand(16, 6)}
    batch |= {name: torch.randn(16, 6) for name in ("log_probabilities", "advantages", "returns")}
    seen = []
    for part in recurrent_ppo.minibatches(single_process(), settings, batch, order):
        observations, _, memory, actions, _, advantages, _, weight = part
        seen += memory.flatten().tolist()
        assert torch.equal(observations, memory[:, :, 0].expand(16, 2))
        assert torch.equal(actions, torch.arange(16).view(16, 1).expand(16, 2))
        assert weight * advantages.numel() == 1
        assert float(advantages.mean()) == pytest.approx(0, abs=1e-6)
        assert float(advantages.std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert seen == order.tolist()


# What memory is good for


class Recall(gym.Env):
    """Shows a sign, then nothing for two steps; the last action is rewarded where it is the sign's."""

    observation_space, action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign, self.count = int(self.np_random.integers(2)), 0
        return np.array([2 * self.sign - 1], np.float32), {}

    def step(self, action):
        self.count += 1
        ends = self.count == 3
        return np.zeros(1, np.float32), float(ends and action == self.sign), ends, False, {}

    def get_state(self):
        return {"sign": self.sign, "count": self.count}

    def set_state(self, state):
        self.sign, self.count = state["sign"], state["count"]


@pytest.mark.parametrize("cell", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])
def test_what_was_seen_steps_ago_is_remembered_and_not_without_memory(cell, tmp_path):
    found = {}
    for memory in (True, False):
        settings = config(
            cell=cell, memory=memory, num_envs=16, rollout_steps=9, epochs=4, steps=40, lr=1e-2, width=16,
            val_episodes=100, run_dir=str(tmp_path / str(memory)),
        )  # fmt: skip
        recurrent_ppo.train(single_process(), settings, make_env=lambda index: Recall())
        found[memory] = [row for row in read_rows(tmp_path / str(memory)) if "val/episodic_return" in row][-1]
    assert found[True]["val/episodic_return"] == 1
    assert found[False]["val/episodic_return"] == pytest.approx(0.5, abs=0.15)


# Resume and processes


def run(fabric, settings):
    return recurrent_ppo.train(fabric, settings, make_env=CARTPOLE)


def test_a_resumed_run_needs_what_was_remembered(tmp_path):
    settings = config(steps=8)
    assert_resumes_exactly(run, settings, stop_at=3, folder=tmp_path / "kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EnvironmentMemory, "load_item_state_dict", lambda self, items: None)
        with pytest.raises(AssertionError, match="differs by up to"):
            assert_resumes_exactly(run, settings, stop_at=3, folder=tmp_path / "forgotten")


def normalised_alone(fabric, settings, batch, order, whole=recurrent_ppo.minibatches):
    """Minibatches whose advantages have mean 0 and deviation 1 in each process's part."""
    for *parts, advantages, returns, weight in whole(fabric, settings, batch, order):
        yield (*parts, (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns, weight)


def shared_and_alone(fabric, folder):
    settings = config(max_grad_norm=0.0, num_envs=6, run_dir=f"{folder}/shared")
    found = {"shared": capture(run(fabric, settings))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_ppo, "minibatches", normalised_alone)
        found["alone"] = capture(run(fabric, replace(settings, run_dir=f"{folder}/alone")))
    return found


@pytest.mark.distributed
def test_two_processes_normalise_advantages_together(tmp_path):
    # Minibatches of three environments, which two processes do not divide.
    one = shared_and_alone(single_process("64-true"), tmp_path / "one")["shared"]
    first, second = in_processes(shared_and_alone, 2, str(tmp_path / "two"), precision="64-true")
    assert first_difference(first["shared"], second["shared"]) is None
    assert largest_difference(one, first["shared"]) <= 1e-9
    assert largest_difference(one, first["alone"]) > 1e-4


# What is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"minibatches": 3}, "minibatches: 3 do not divide 4 environments, which stay whole; choose a divisor"),
        ({"discount": 1.5}, "discount: 1.5; give a number from 0 to 1"),
        ({"num_envs": 0}, "num_envs: 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_minibatch_that_does_not_reach_every_process_is_refused(tmp_path):
    fabric = single_process()
    fabric._strategy = SimpleNamespace(world_size=4, precision=None)
    with pytest.raises(ConfigError, match=r"^minibatches: of 2 environments, for 4 processes; choose fewer$"):
        recurrent_ppo.train(fabric, config(run_dir=str(tmp_path)), make_env=CARTPOLE)


def test_an_agent_without_a_memory_is_refused(tmp_path):
    agent = ActorCritic(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"agent: ActorCritic has no memory_size, .*; give a RecurrentActorCritic"):
        recurrent_ppo.train(single_process(), config(run_dir=str(tmp_path)), make_env=CARTPOLE, agent=agent)


# The recipe's own commands


@pytest.mark.parametrize(
    "fields, components",
    [
        ({}, (1, 3)),
        ({"env": "CartPole-v0"}, (1, 3)),
        ({"env": "Acrobot-v1"}, ()),
        ({"env": "Acrobot-v1", "hide": [1, 3]}, (1, 3)),
        ({"hide": ()}, ()),
        (recurrent_ppo.PRESETS["pendulum"], (2,)),
    ],
)
def test_only_of_cartpole_something_is_hidden_unasked(fields, components):
    assert recurrent_ppo.hidden(recurrent_ppo.RecurrentPPOConfig(**fields)) == components


def test_a_trained_agent_is_shown(tmp_path, capsys):
    settings = config(num_envs=2, rollout_steps=8, epochs=1, steps=2, test_episodes=2, run_dir=str(tmp_path / "run"))
    assert recurrent_ppo.main(settings) == str(tmp_path / "run")
    out = capsys.readouterr().out
    assert "hide: components 1, 3 of the observations of CartPole-v1\n" in out
    assert "32 environment steps" in out
    request = recurrent_ppo.EnjoyConfig(run_dir=str(tmp_path / "run"), out=str(tmp_path / "agent.gif"), episodes=2)
    recurrent_ppo.enjoy(request)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("returns ")
    with Image.open(tmp_path / "agent.gif") as picture:
        assert picture.n_frames > 5


def test_what_is_shown_is_what_is_scored(tmp_path):
    """An episode of the picture has the return that the agent, remembering from step to step, gets by hand."""
    torch.manual_seed(0)
    env, fabric = MakeEnvironment("CartPole-v1", hide=(1, 3), render_mode="rgb_array")(), single_process()
    agent = recurrent_actor_critic(env.observation_space, action_distribution(env.action_space), width=8)
    for part in agent.policy.parameters():
        part.data.mul_(30)
    actor = recurrent_ppo.player(fabric, config(), agent, env.action_space)
    returns = write_animation(env, actor, str(tmp_path / "a.gif"), 2, seed=5, most=1)
    for seed, expected in zip((5, 6), returns, strict=True):
        observation, _ = env.reset(seed=seed)
        memory, total, ended = empty_memory(fabric, agent, 1), 0.0, False
        while not ended:
            seen = torch.from_numpy(observation)[None, None]
            parameters, _, (memory,) = agent(seen, memory, torch.zeros(1, 1, dtype=torch.bool))
            observation, reward, *ends, _ = env.step(int(parameters.argmax()))
            total, ended = total + reward, any(ends)
        assert total == expected
