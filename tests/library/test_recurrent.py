"""A memory goes from step to step and not into another episode, in learning as in playing."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from lightning_custom.action_distributions import action_distribution
from lightning_custom.environments.evaluation import EpisodePlayer, as_act
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.recurrent import (
    EnvironmentMemory,
    RecurrentActor,
    RecurrentActorCritic,
    check_agent,
    empty_memory,
    recurrent_act,
    recurrent_actor_critic,
    unroll,
)
from lightning_custom.testing import single_process
from tests.library.tiny_environments import Countdown, stored

T, E, F, H = 7, 3, 2, 4
CELLS = {"gru": (nn.GRUCell, nn.GRU, H), "lstm": (nn.LSTMCell, nn.LSTM, 2 * H)}
every_cell = pytest.mark.parametrize("name", CELLS)


def sequences(name, seed=0):
    """A cell, features, a memory, and no start."""
    torch.manual_seed(seed)
    make, _, size = CELLS[name]
    cell, features, memory = make(F, H).double(), torch.randn(T, E, F).double(), torch.randn(E, size).double()
    return cell, features, memory, torch.zeros(T, E, dtype=torch.bool)


@every_cell
def test_without_starts_a_sequence_is_that_of_torchs_own_network(name):
    cell, features, memory, starts = sequences(name)
    whole = CELLS[name][1](F, H).double()
    whole.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    begin = memory[None] if name == "gru" else tuple(part[None].contiguous() for part in memory.chunk(2, 1))
    outputs, last = whole(features, begin)
    found = unroll(cell, features, memory, starts)
    torch.testing.assert_close(found[..., :H], outputs, rtol=1e-12, atol=1e-12)
    last = last[0] if name == "gru" else torch.cat([part[0] for part in last], 1)
    torch.testing.assert_close(found[-1], last, rtol=1e-12, atol=1e-12)


@every_cell
def test_a_sequence_is_its_steps_one_after_another(name):
    cell, features, memory, starts = sequences(name)
    starts[2, 0] = starts[5, 2] = starts[0, 1] = True
    whole = unroll(cell, features, memory, starts)
    for t in range(T):
        memory = unroll(cell, features[t : t + 1], memory, starts[t : t + 1])[0]
        torch.testing.assert_close(memory, whole[t], rtol=1e-12, atol=1e-12)


@every_cell
def test_from_a_start_on_an_episode_is_as_if_nothing_had_been_before(name):
    cell, features, memory, starts = sequences(name)
    starts[3, 1] = True
    found = unroll(cell, features, memory, starts)
    fresh = unroll(cell, features[3:, 1:2], torch.zeros(1, memory.shape[1]).double(), starts[3:, :1])
    torch.testing.assert_close(found[3:, 1:2], fresh, rtol=1e-12, atol=1e-12)
    # What the others remember they keep.
    kept = unroll(cell, features, memory, torch.zeros_like(starts))
    torch.testing.assert_close(found[:, [0, 2]], kept[:, [0, 2]], rtol=1e-12, atol=1e-12)
    assert (found[3:, 1] - kept[3:, 1]).abs().max() > 1e-3


@every_cell
def test_no_gradient_goes_past_a_start(name):
    cell, features, memory, starts = sequences(name)
    starts[3, 1] = True
    features.requires_grad_(), memory.requires_grad_()
    after = unroll(cell, features, memory, starts)[-1]
    of_features, of_memory = torch.autograd.grad(after.square().sum(), (features, memory))
    assert of_features[:3, 1].abs().max() == of_memory[1].abs().max() == 0
    assert of_features[3:, 1].abs().amin() > 0
    assert min(of_features[:3, 0].abs().amin(), of_memory[0].abs().max()) > 0


def test_a_start_clears_what_is_not_finite():
    cell, features, memory, starts = sequences("gru")
    memory[:] = torch.nan
    starts[0] = True
    assert unroll(cell, features, memory, starts).isfinite().all()


def agent_for(space=None, actions=None, **fields):
    torch.manual_seed(0)
    space = space or spaces.Box(-1, 1, (3,), np.float32)
    return recurrent_actor_critic(space, action_distribution(actions or spaces.Discrete(4)), width=8, **fields)


@every_cell
def test_acting_step_by_step_gives_the_parameters_of_the_whole_sequence(name):
    fabric, agent = single_process(), agent_for(cell=name)
    observations, starts = torch.randn(T, E, 3), torch.zeros(T, E, dtype=torch.bool)
    starts[4, 1] = starts[0] = True
    memory = empty_memory(fabric, agent, E)
    assert memory.shape == (E, agent.memory_size) == (E, 8 if name == "gru" else 16)
    parameters, values, memories = agent(observations, memory, starts)
    assert (parameters.shape, values.shape, memories.shape) == ((T, E, 4), (T, E), (T, E, agent.memory_size))
    act = recurrent_act(fabric, agent)
    for t in range(T):
        found, memory = act(observations[t].numpy(), memory, starts[t].numpy())
        np.testing.assert_allclose(found, parameters[t].detach().numpy(), rtol=1e-5, atol=1e-6)
        assert not memory.requires_grad
        assert not memory.is_inference()
        torch.testing.assert_close(memory, memories[t].detach(), rtol=1e-5, atol=1e-6)


def test_an_agent_that_forgets_answers_to_the_observation_alone():
    observations, starts, memory = torch.randn(T, E, 3), torch.zeros(T, E, dtype=torch.bool), torch.randn(E, 8)
    turned = observations.flip(0)
    for forgets in (True, False):
        agent = agent_for(forgets=forgets)
        found = agent(observations, memory, starts)[1]
        same = torch.allclose(found, agent(turned, -memory, starts)[1].flip(0), rtol=1e-5)
        assert same == forgets


MIXED = spaces.Dict(choice=spaces.Discrete(3), picture=spaces.Box(0, 255, (2, 2), np.uint8))


@pytest.mark.parametrize("actions", [spaces.Discrete(4), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (5,), np.float32), spaces.Discrete(7), MIXED])
def test_the_usual_networks_take_what_environments_show_and_begin_nearly_indifferent(space, actions):
    agent, distribution = agent_for(space, actions), action_distribution(actions)
    check_agent(single_process(), agent, space, distribution.size)
    zeros = {key: torch.zeros(T, E, *part.shape, dtype=torch.uint8) for key, part in MIXED.spaces.items()}
    seen = zeros if space is MIXED else torch.zeros(T, E, *space.shape)
    parameters, _, _ = agent(seen, torch.randn(E, 8), torch.zeros(T, E, dtype=torch.bool))
    assert parameters.abs().max() < 0.1


class Wrong(RecurrentActorCritic):
    """Its outputs are as ``change`` makes them."""

    def __init__(self, change):
        agent = agent_for()
        super().__init__(agent.encoder, agent.cell, agent.policy, agent.value)
        self.change = change

    def forward(self, *inputs):
        return self.change(*super().forward(*inputs))


@pytest.mark.parametrize(
    "agent, message",
    [
        (lambda: nn.Linear(3, 4), "agent: Linear has no memory_size, .*; give a RecurrentActorCritic"),
        (lambda: Wrong(lambda p, v, m: (p[..., :3], v, m)), r"gives numbers of shape \(2, 3\) .* need \(2, 4\)"),
        (lambda: Wrong(lambda p, v, m: (p, v[..., None], m)), r"gives values of shape \(1, 2, 1\) .*; give \(1, 2\)"),
        (lambda: Wrong(lambda p, v, m: (p, v, m[-1])), r"gives memories of shape \(2, 8\) .*; give \(1, 2, 8\)"),
    ],
)
def test_an_agent_that_does_not_fit_is_refused(agent, message):
    with pytest.raises(ConfigError, match=message):
        check_agent(single_process(), agent(), spaces.Box(-1, 1, (3,), np.float32), 4)


def test_pictures_need_an_encoder_of_ones_own():
    with pytest.raises(ConfigError, match=r"observations of shape \(4, 84, 84\): give an agent"):
        agent_for(spaces.Box(0, 255, (4, 84, 84), np.uint8))


# By environment


def memory_of(rank, processes, num_envs=6):
    fabric = SimpleNamespace(global_rank=rank, world_size=processes, device=torch.device("cpu"))
    return EnvironmentMemory(fabric, agent_for(), num_envs)


def test_memories_belong_to_environments_and_not_to_processes():
    one = memory_of(0, 1)
    one.values = torch.randn(6, 8)
    items = stored(one.item_state_dict())
    assert all(len(item.untyped_storage()) == 8 * 4 for item in items.values())
    two = [memory_of(rank, 2) for rank in range(2)]
    for part in two:
        part.load_item_state_dict(items)
    assert torch.equal(torch.cat([part.values for part in two]), one.values)
    again = memory_of(0, 1)
    again.load_item_state_dict(two[0].item_state_dict() | two[1].item_state_dict())
    assert torch.equal(again.values, one.values)


def test_memories_that_do_not_fit_are_refused():
    items = memory_of(0, 1).item_state_dict()
    with pytest.raises(ConfigError, match="num_envs: 4, but the checkpoint holds 6 environments; use 6"):
        memory_of(0, 1, num_envs=4).load_item_state_dict(items)
    with pytest.raises(CheckpointError, match="memory: stored are 5 numbers of an environment, this agent keeps 8"):
        memory_of(0, 1).load_item_state_dict({name: item[:5] for name, item in items.items()})


@pytest.mark.parametrize(
    "parameters, expected",
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_a_memory_is_in_the_dtype_of_an_agents_outputs(parameters, expected):
    assert empty_memory(single_process(), agent_for().to(parameters), 2).dtype == expected


# Episodes that end at different times


class CountsCalls(nn.Module):
    """Its parameters say how often it has seen the episode, and which one that is."""

    memory_size = 2

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, observations, memory, starts):
        assert len(observations) == 1
        memory = memory.masked_fill(starts[0, :, None], 0.0)
        count, index = memory[:, 0] + 1, observations[0, :, 0]
        # Once an episode is remembered it is the same one ever after.
        assert torch.equal(torch.where(starts[0], index, memory[:, 1]), index)
        memories = torch.stack([count, index], 1)[None]
        return memories, count[None], memories


def test_an_actor_remembers_each_episode_until_it_ends():
    lengths, seen = [4, 1, 3, 2], []

    def choose(parameters):
        seen.append(parameters.tolist())
        return np.zeros(len(parameters), dtype=np.int64)

    actor = RecurrentActor(single_process(), CountsCalls(), choose)
    player = EpisodePlayer(lambda index: Countdown(index, lengths[index]))
    for _ in range(2):  # the second time nothing is left of the first
        seen.clear()
        list(player.play(as_act(actor), [0, 1, 2, 3]))
        assert seen == [
            [[1, 0], [1, 1], [1, 2], [1, 3]],
            [[2, 0], [2, 2], [2, 3]],
            [[3, 0], [3, 2]],
            [[4, 0]],
        ]


def test_episodes_played_together_are_those_played_alone():
    agent = agent_for(gym.make("CartPole-v1").observation_space, spaces.Discrete(2))
    for part in agent.policy.parameters():
        part.data.mul_(30)  # indifferent policies balance alike

    def returns(seeds):
        actor = RecurrentActor(single_process(), agent, lambda parameters: parameters.argmax(1))
        player, totals = EpisodePlayer(lambda index: gym.make("CartPole-v1")), np.zeros(len(seeds))
        for step in player.play(as_act(actor), seeds):
            totals[list(step.episodes)] += step.rewards
        return totals.tolist()

    together = returns(range(12))
    assert together == [returns([seed])[0] for seed in range(12)]
    assert len(set(together)) > 3
