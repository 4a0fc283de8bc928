"""Policies and values that remember: what a network keeps of each environment from step to step.

A recurrent agent is any module with ``memory_size``, the numbers S that it keeps of an environment, and

    parameters, values, memories = agent(observations, memory, starts)

for the observations ``[T, E, ...]`` of T steps, what was remembered before them ``[E, S]``, and where an episode
begins, bool ``[T, E]``: there nothing is remembered. It gives the action distribution's parameters ``[T, E, P]``,
values ``[T, E]``, and what is remembered after each step ``[T, E, S]``. :class:`RecurrentActorCritic` is one.

Shapes: T steps, E environments or episodes, S numbers of a memory, F features, H units of a cell, P parameters.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_custom.action_distributions import ActionDistribution, Gaussian
from lightning_custom.distributed import share
from lightning_custom.environments.arrays import Array, Observations, single_precision
from lightning_custom.environments.vector import check_number, environment_item
from lightning_custom.errors import CheckpointError, ConfigError
from lightning_custom.numpy_network import to_tensors
from lightning_custom.policies import Features, GaussianPolicy, check_outputs, mlp, orthogonal
from lightning_custom.precision import bare, unwrap
from lightning_custom.rollout import flatten_steps, one_step

ActWithMemory = Callable[[Observations, Tensor, Array], tuple[Array, Tensor]]
"""``(observations [E, ...], memory [E, S], starts [E]) -> parameters [E, P], memory [E, S]``."""


def unroll(cell: nn.GRUCell | nn.LSTMCell, features: Tensor, memory: Tensor, starts: Tensor) -> Tensor:
    """What ``cell`` remembers after each of ``features`` ``[T, E, F]``: ``[T, E, S]``.

    ``memory`` ``[E, S]`` is from before the first; where ``starts``, bool ``[T, E]``, it is zero, and no gradient goes
    past. Of a GRU, S is H and the memory its output; of an LSTM, 2 H: first the output, then the cell's state.
    """
    memories = []
    for seen, begins in zip(features, starts, strict=True):
        memory = memory.masked_fill(begins.unsqueeze(1), 0.0)
        if isinstance(cell, nn.LSTMCell):
            output, inside = memory.chunk(2, 1)
            memory = torch.cat(cell(seen, (output, inside)), 1)
        else:
            memory = cell(seen, memory)
        memories.append(memory)
    return torch.stack(memories)


class RecurrentActorCritic(nn.Module):
    """A policy and a value on one memory.

    ``encoder`` makes features ``[B, F]`` of observations ``[B, ...]``, ``cell`` remembers them, and its output goes to
    ``policy``, for the action distribution's parameters ``[B, P]``, and ``value``, ``[B]`` or ``[B, 1]``. One that
    ``forgets`` begins every step with an empty memory, for comparison.
    """

    def __init__(
        self,
        encoder: nn.Module,
        cell: nn.GRUCell | nn.LSTMCell,
        policy: nn.Module,
        value: nn.Module,
        *,
        forgets: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.cell, self.policy, self.value, self.forgets = encoder, cell, policy, value, forgets
        self.memory_size = cell.hidden_size * (2 if isinstance(cell, nn.LSTMCell) else 1)

    def forward(self, observations: Any, memory: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters ``[T, E, P]``, values ``[T, E]`` and memories ``[T, E, S]``; see the top of this file."""
        if self.forgets:
            starts = torch.ones_like(starts)
        # All but the memory goes through all steps at once.
        features = self.encoder(flatten_steps(observations)).unflatten(0, starts.shape)
        memories = unroll(self.cell, features, memory, starts)
        outputs = memories[..., : self.cell.hidden_size].flatten(0, 1)
        return self.policy(outputs).unflatten(0, starts.shape), self.value(outputs).view(starts.shape), memories


def recurrent_actor_critic(
    observation_space: gym.Space[Any],
    distribution: ActionDistribution,
    *,
    cell: Literal["gru", "lstm"] = "gru",
    width: int = 64,
    forgets: bool = False,
) -> RecurrentActorCritic:
    """The usual networks, for any observations but pictures: a layer, a cell of ``width`` units, a layer for each head.

    Orthogonal weights and zero biases, as in :func:`~lightning_custom.policies.mlp`.
    """
    if observation_space.shape is not None and len(observation_space.shape) == 3:
        raise ConfigError(
            f"observations of shape {observation_space.shape}: give an agent whose encoder is for pictures"
        )
    features = Features(observation_space)
    encoder = nn.Sequential(features, orthogonal(nn.Linear(features.size, width), math.sqrt(2)), nn.Tanh())
    memory = nn.GRUCell(width, width) if cell == "gru" else nn.LSTMCell(width, width)
    for weight in (memory.weight_ih, memory.weight_hh):
        nn.init.orthogonal_(weight)
    for bias in (memory.bias_ih, memory.bias_hh):
        nn.init.zeros_(bias)
    continuous = isinstance(distribution, Gaussian)
    outputs = distribution.size // 2 if continuous else distribution.size
    policy: nn.Module = mlp(width, outputs, width=width, layers=1, gain=0.01)
    if continuous:
        policy = GaussianPolicy(policy, outputs)
    value = mlp(width, 1, width=width, layers=1, gain=1.0)
    return RecurrentActorCritic(encoder, memory, policy, value, forgets=forgets)


def empty_memory(fabric: Fabric, agent: nn.Module, number: int) -> Tensor:
    """What ``agent`` remembers of ``number`` environments that it has not seen: zeros ``[number, S]``.

    In the dtype of its outputs: that of its parameters, or float32 where they are in half precision.
    """
    module = unwrap(agent)
    dtype = torch.promote_types(next(module.parameters()).dtype, torch.float32)
    return torch.zeros(number, int(module.memory_size), dtype=dtype, device=fabric.device)  # type: ignore[arg-type]


class EnvironmentMemory:
    """What an agent remembers of each environment of this process, stored by environment.

        memory = EnvironmentMemory(fabric, agent, config.num_envs)                    # a field of the state
        ...
        parameters, memory.values = act(envs.observations, memory.values, envs.starts)

    ``num_envs`` is global, and each process has its contiguous share E, as ``EnvironmentVector`` has.
    """

    def __init__(self, fabric: Fabric, agent: nn.Module, num_envs: int) -> None:
        count = share(num_envs, fabric, "num_envs")
        self.num_envs = num_envs
        self.indices = range(fabric.global_rank * count, (fabric.global_rank + 1) * count)
        self.values = empty_memory(fabric, agent, count)
        """``[E, S]``, replaced at every step and never written over."""

    def item_state_dict(self) -> dict[str, Any]:
        """The memory of each environment of this process, under its index among all."""
        # A copy: a part of a tensor is stored with the whole.
        return {environment_item(index): row.clone() for index, row in zip(self.indices, self.values, strict=True)}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over those of this process's environments; :class:`CheckpointError` for memories of another size."""
        check_number(items, self.num_envs)
        values = torch.stack([items[environment_item(index)] for index in self.indices])
        if values.shape != self.values.shape:
            raise CheckpointError(
                f"memory: stored are {values.shape[1]} numbers of an environment, this agent keeps "
                f"{self.values.shape[1]}; use the agent of the run that stored it"
            )
        self.values = values.to(self.values)


def recurrent_act(fabric: Fabric, agent: nn.Module) -> ActWithMemory:
    """``agent`` for acting, a step at a time and without a gradient; observations as the agent is to see them."""
    run = bare(fabric, agent)

    def act(observations: Observations, memory: Tensor, starts: Array) -> tuple[Array, Tensor]:
        # Not in inference mode: what was remembered is an input of the updates, whose backward pass keeps it.
        with torch.no_grad():
            seen = to_tensors(one_step(observations), fabric.device)
            parameters, _, memories = run(seen, memory, torch.from_numpy(starts[None]).to(fabric.device))
        return parameters[0].cpu().numpy(), memories[0]

    return act


class RecurrentActor:
    """Acts in episodes by an agent that remembers each of them until it ends, whichever have ended already.

    ``choose`` makes what the environment takes of parameters ``[E, P]``.
    """

    def __init__(self, fabric: Fabric, agent: nn.Module, choose: Callable[[Array], Array]) -> None:
        self._fabric, self._agent, self._choose, self._act = fabric, agent, choose, recurrent_act(fabric, agent)
        self._memory = empty_memory(fabric, agent, 0)

    def in_episodes(self, observations: Observations, episodes: Sequence[int], steps: int) -> Array:
        """Actions ``[E, ...]`` for those of the episodes that go on, ``steps`` after their start."""
        if steps == 0:
            self._memory = empty_memory(self._fabric, self._agent, len(episodes))
        rows, starts = torch.as_tensor(episodes, device=self._memory.device), np.full(len(episodes), steps == 0)
        parameters, self._memory[rows] = self._act(single_precision(observations), self._memory[rows], starts)
        return self._choose(parameters)


def check_agent(fabric: Fabric, agent: nn.Module, space: gym.Space[Any], size: int) -> None:
    """:class:`ConfigError` unless ``agent`` remembers, and gives ``size`` parameters for observations of ``space``."""
    module, others = unwrap(agent), []
    if not isinstance(getattr(module, "memory_size", None), int):
        raise ConfigError(
            f"agent: {type(module).__name__} has no memory_size, the numbers that it keeps of an environment; "
            "give a RecurrentActorCritic"
        )
    run, memory = bare(fabric, agent), empty_memory(fabric, agent, 2)

    def first_step(observations: Observations) -> Array:
        starts = torch.ones(1, 2, dtype=torch.bool, device=fabric.device)
        parameters, *rest = run(to_tensors(one_step(observations), fabric.device), memory, starts)
        others.extend(rest)
        found: Array = parameters[0].cpu().numpy()
        return found

    check_outputs(first_step, module, space, size, name="agent")
    for name, found, shape in zip(("values", "memories"), others, ((1, 2), (1, *memory.shape)), strict=True):
        if found.shape != shape:
            raise ConfigError(
                f"agent: gives {name} of shape {tuple(found.shape)} for one step of 2 environments; give {shape}"
            )
