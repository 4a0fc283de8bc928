"""PPO for a policy that remembers, where observations do not say everything (Schulman et al. 2017, algorithm 1).

    python -m recipes.recurrent_ppo                                           # CartPole without velocities, a minute
    python -m recipes.recurrent_ppo --memory false                            # what it is without
    python -m recipes.recurrent_ppo --preset pendulum
    python -m recipes.recurrent_ppo enjoy --run_dir DIR --out agent.gif

Read recipes/ppo.py first. What is another order of operations: what the agent remembers of each environment goes from
step to step and from rollout to rollout; an update goes through whole sequences again, from what was remembered when
the rollout began, so that a minibatch is a set of environments with all their steps. Nothing is compiled.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_custom.action_distributions import ActionDistribution, action_distribution
from lightning_custom.animation import ONE_PROCESS, EnjoyConfig, show_episodes
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.distributed import mean_gradients_
from lightning_custom.environments.arrays import Array
from lightning_custom.environments.episodes import log_episodes
from lightning_custom.environments.evaluation import MakeEnv
from lightning_custom.environments.makers import MakeEnvironment, warn_if_inexact
from lightning_custom.environments.normalisation import RewardScaler
from lightning_custom.environments.scores import print_test, return_scores
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.gradients import clip_norm_
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger
from lightning_custom.numpy_network import to_tensors
from lightning_custom.precision import bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.recurrent import (
    EnvironmentMemory,
    RecurrentActor,
    RecurrentActorCritic,
    check_agent,
    recurrent_act,
    recurrent_actor_critic,
)
from lightning_custom.reinforcement import explained_variance, following_values, generalised_advantages
from lightning_custom.rollout import Rollout, gather_environments, take_environments
from lightning_custom.run import config_of_run
from lightning_custom.schedules import Constant, Linear, set_learning_rate

Forward = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOConfig(RunConfig):
    """Settings of the loop, and of the environment and networks that the command line builds."""

    steps: int = 250
    """Rollouts, each with its updates; the schedule reads it."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    validate_every: int = 25
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 25
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    env: str = "CartPole-v1"
    """Environment, by its name in gymnasium's registry."""
    hide: tuple[int, ...] | None = None
    """Components of the observation that the agent does not see; none: CartPole's velocities, [1, 3], and of another
    environment nothing."""
    num_envs: int = 16
    """Environments, over all processes."""
    rollout_steps: int = 32
    """Steps of every environment in a rollout, through which gradients go back."""
    epochs: int = 10
    """Passes over a rollout."""
    minibatches: int = 1
    """Updates of a pass, each on an equal part of the environments."""
    lr: float = 1e-3
    """Learning rate (Adam)."""
    anneal_lr: bool = True
    """Bring the learning rate down to 0 in a straight line."""
    discount: float = 0.98
    """Weight of the next step's return."""
    gae_decay: float = 0.8
    """Decay of the advantage estimates, the papers' lambda."""
    clip: float = 0.2
    """How far the probability ratio may move before its gradient ends."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: float = 0.5
    """Weight of the value loss, which is half the squared error."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient; 0: no clipping."""
    normalise_rewards: bool = True
    """By the standard deviation of all discounted returns so far: large values saturate a memory that both share."""
    cell: Literal["gru", "lstm"] = "gru"
    """What remembers."""
    memory: bool = True
    """Remember; otherwise begin every step with an empty memory, to see what memory is good for."""
    width: int = 64
    """Units of a hidden layer, and of the cell."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for small networks."""
    greedy: bool = True
    """Score the most probable actions; otherwise drawn ones."""
    val_episodes: int = 20
    """Episodes of a validation."""
    test_episodes: int = 100
    """Episodes of the test at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"num_envs": 1, "rollout_steps": 1, "epochs": 1, "minibatches": 1, "width": 1})
        require_at_least(self, {"lr": 0, "clip": 0, "max_grad_norm": 0, "val_episodes": 2, "test_episodes": 2})
        require_at_least(self, {"entropy_coefficient": 0, "value_coefficient": 0})
        for name in ("discount", "gae_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; give a number from 0 to 1")
        if self.num_envs % self.minibatches:
            raise ConfigError(
                f"minibatches: {self.minibatches} do not divide {self.num_envs} environments, which stay whole; "
                "choose a divisor"
            )


# After rl-baselines3-zoo's settings of RecurrentPPO for environments without velocities, with more environments.
PRESETS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "pendulum": {
        "env": "Pendulum-v1", "hide": (2,), "num_envs": 32, "minibatches": 4, "discount": 0.9, "gae_decay": 0.95,
        "steps": 100, "log_every": 5, "validate_every": 10, "checkpoint_every": 10,
    },
}  # fmt: skip


@dataclass
class RecurrentPPOState:
    """What changes while training; a checkpoint is exactly these fields."""

    agent: nn.Module
    optimizer: Optimizer
    envs: EnvironmentVector
    memory: EnvironmentMemory
    reward_scaler: RewardScaler | None
    metrics: MetricLogger
    step: int = 0
    """Rollouts done, with their updates."""


def train(
    fabric: Fabric,
    config: RecurrentPPOConfig,
    *,
    make_env: MakeEnv,
    agent: nn.Module | None = None,
    val_env: MakeEnv | None = None,
) -> RecurrentPPOState:
    """Train ``agent``, a policy and a value on a memory, on the environments of ``make_env(index)``.

    Without an agent it gets the usual networks of the config's width; lightning_custom/recurrent.py says what one is.
    ``val_env`` is scored instead of ``make_env``.
    """
    refuse_loss_scale(fabric, "which this loop would clip and step along with the gradient")
    size = config.num_envs // config.minibatches
    if size < fabric.world_size:
        raise ConfigError(f"minibatches: of {size} environments, for {fabric.world_size} processes; choose fewer")
    config = with_run_dir(fabric, config)
    envs = EnvironmentVector(fabric, make_env, config.num_envs, seed=config.seed)
    warn_if_inexact(fabric, envs)
    distribution = action_distribution(envs.action_space)
    agent = agent if agent is not None else networks(config, envs.observation_space, distribution)
    require_trainable("agent", agent)
    agent, optimizer = fabric.setup(agent, Adam(agent.parameters(), config.lr, eps=1e-5, fused=True))
    check_agent(fabric, cast("nn.Module", agent), envs.observation_space, distribution.size)
    memory = EnvironmentMemory(fabric, cast("nn.Module", agent), config.num_envs)
    scaler = RewardScaler(fabric, config.num_envs, discount=config.discount) if config.normalise_rewards else None
    metrics = MetricLogger(
        fabric,
        config.run_dir,
        hyperparameters=config,
        headline=["val/episodic_return"],
        layout={
            "return": ["val/episodic_return$", "charts/episodic_return$"],
            "losses": ["losses/(policy|value)_loss"],
            "how far an update goes": ["losses/(approx_kl|clipfrac)"],
        },
    )
    state = RecurrentPPOState(cast("nn.Module", agent), cast("Optimizer", optimizer), envs, memory, scaler, metrics)
    forward, act = bare(fabric, state.agent), recurrent_act(fabric, state.agent)
    lr = Linear(config.lr, 0.0, max(config.steps, 1)) if config.anneal_lr else Constant(config.lr)
    own, rollout = slice(envs.indices.start, envs.indices.stop), Rollout(config.rollout_steps)
    fixed = config.anneal_lr

    with (
        Checkpointer(fabric, config, best="val/episodic_return", mode="max", steps_fixed=fixed) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # Rollout: play with the policy as it is and what it remembers, which an episode's first step forgets.
            rollout.begin()
            remembered, begun = memory.values, envs.starts
            noise = distribution.noise((config.rollout_steps, config.num_envs), rng.shared)[:, own]
            for t in range(config.rollout_steps):
                parameters, memory.values = act(rollout.observe(envs), memory.values, envs.starts)
                actions = distribution.sample(parameters, noise[t])
                envs.step(distribution.to_environment(actions))
                rollout.record(actions, envs)

            # Advantages: from the values of everything seen, in one pass. From here on all processes have all.
            batch, explained = estimate(fabric, config, state, forward, distribution, rollout, remembered, begun)

            # Updates: each goes through the sequences of some environments, from what was remembered before them.
            set_learning_rate(state.optimizer, lr, state.step)
            found = []
            for _ in range(config.epochs):
                order = torch.randperm(config.num_envs, generator=rng.shared)
                for minibatch in minibatches(fabric, config, batch, order):
                    state.optimizer.zero_grad()
                    loss, values = ppo_loss(config, distribution, forward, *minibatch)
                    fabric.backward(loss)
                    mean_gradients_(fabric, state.agent)
                    if config.max_grad_norm:
                        clip_norm_(state.agent.parameters(), config.max_grad_norm)
                    state.optimizer.step()
                    found.append(values)

            state.step += 1
            state.metrics.update({tag: torch.stack([values[tag] for values in found]).mean() for tag in found[0]})
            state.metrics.update({"losses/explained_variance": explained, "charts/learning_rate": lr(state.step - 1)})
            log_episodes(fabric, state.metrics, rollout.episodes)
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                row = state.metrics.flush(state.step)
                rate = row[STEPS_PER_SECOND] * config.rollout_steps * config.num_envs
                progress.report(state.step, state.metrics.record(state.step, {"charts/SPS": rate}) | row)
            validation = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = evaluate(fabric, config, state, val_env or make_env, config.val_episodes, "val")
                progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def ppo_loss(
    config: RecurrentPPOConfig,
    distribution: ActionDistribution,
    agent: Forward,
    observations: Any,
    starts: Tensor,
    memory: Tensor,
    actions: Tensor,
    log_probabilities: Tensor,
    advantages: Tensor,
    returns: Tensor,
    weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective (eq. 7), the value loss and the entropy bonus (eq. 9) of the sequences ``[T, E]``.

    ``memory`` ``[1, E, S]`` is what was remembered before them, ``log_probabilities`` are of the agent that played;
    ``weight`` is that of a step in the mean. Returns the loss, and its parts by tag.
    """
    parameters, values, _ = agent(observations, memory[0], starts)
    new_log_probabilities, entropies = distribution.log_probability_and_entropy(
        parameters.flatten(0, 1), actions.flatten(0, 1)
    )
    log_ratios = new_log_probabilities.view_as(log_probabilities) - log_probabilities
    ratios = log_ratios.exp()
    objective = torch.minimum(advantages * ratios, advantages * torch.clamp(ratios, 1 - config.clip, 1 + config.clip))
    policy_loss = -weight * objective.sum()
    value_loss = weight * (values - returns).square().sum() / 2
    entropy = weight * entropies.sum()
    total = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
    return total, {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        "losses/approx_kl": weight * (ratios - 1 - log_ratios).detach().sum(),
        "losses/clipfrac": weight * ((ratios - 1).abs() > config.clip).sum().to(values.dtype),
    }


def estimate(
    fabric: Fabric,
    config: RecurrentPPOConfig,
    state: RecurrentPPOState,
    forward: Forward,
    distribution: ActionDistribution,
    rollout: Rollout,
    remembered: Tensor,
    begun: Array,
) -> tuple[dict[str, Any], float]:
    """Everything the updates need, of all environments ``[T, N, ...]``, and the explained variance of the values.

    ``remembered`` ``[E, S]`` and ``begun`` ``[E]``, where an episode began, are of before the rollout.
    """
    seen, finals = (to_tensors(part, fabric.device) for part in rollout.sequences(state.envs.observations))
    actions, ended = torch.from_numpy(rollout.actions).to(fabric.device), rollout.ended
    # Where an episode ended, the next observation begins one; the last row is of the observations after the rollout.
    starts = torch.from_numpy(np.concatenate([begun[None], ended])).to(fabric.device)
    with torch.no_grad():
        parameters, all_values, memories = forward(seen, remembered, starts)
        log_probabilities, _ = distribution.log_probability_and_entropy(
            parameters[:-1].flatten(0, 1), actions.flatten(0, 1)
        )
        # An episode's last observation is valued with what was remembered of that episode.
        final = all_values[0, :0]
        if ended.any():
            remembered_then = memories[:-1][starts[1:]]
            none_begins = torch.zeros(1, len(remembered_then), dtype=torch.bool, device=fabric.device)
            _, (final,), _ = forward(finals, remembered_then, none_begins)
    values, last = np.split(all_values.cpu().numpy(), [len(actions)])
    rewards = rollout.rewards
    if state.reward_scaler is not None:
        state.reward_scaler.update_(rewards, ended)
        rewards = state.reward_scaler(rewards)
    advantages = generalised_advantages(
        rewards.astype(values.dtype),
        values,
        following_values(values, last[0], ended, final.cpu().numpy()),
        rollout.terminated,
        ended,
        discount=config.discount,
        decay=config.gae_decay,
    )
    batch = {
        "observations": to_tensors(rollout.observations, fabric.device),
        "starts": starts[:-1],
        "memory": remembered[None],
        "actions": actions,
        "log_probabilities": log_probabilities.view_as(starts[:-1]),
        "advantages": torch.from_numpy(advantages).to(fabric.device),
        "returns": torch.from_numpy(advantages + values).to(fabric.device),
    }
    explained = explained_variance(*(gather_environments(fabric, part) for part in (values, advantages + values)))
    return gather_environments(fabric, batch), explained


def minibatches(
    fabric: Fabric, config: RecurrentPPOConfig, batch: dict[str, Any], order: Tensor
) -> Iterator[tuple[Any, ...]]:
    """This process's share of each minibatch, in the order of :func:`ppo_loss`'s arguments: environments, all steps.

    Advantages are normalised over the whole minibatch, whatever part of it is here.
    """
    for environments in order.to(fabric.device).chunk(config.minibatches):
        advantages = batch["advantages"][:, environments]
        part = take_environments(batch, environments.tensor_split(fabric.world_size)[fabric.global_rank])
        part["advantages"] = (part["advantages"] - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        # mean_gradients_ divides the sum over processes by their number.
        yield *part.values(), fabric.world_size / advantages.numel()


def evaluate(
    fabric: Fabric, config: RecurrentPPOConfig, state: RecurrentPPOState, make_env: MakeEnv, number: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` episodes, always the same ones, with half its 95% interval."""
    actor = player(fabric, config, state.agent, state.envs.action_space)
    with evaluating(state.agent):
        return return_scores(fabric, make_env, actor, number, seed=config.seed, name=name)


def player(fabric: Fabric, config: RecurrentPPOConfig, agent: nn.Module, action_space: Any) -> RecurrentActor:
    """What acts in episodes, each remembered on its own."""
    distribution, generator = action_distribution(action_space), torch.Generator().manual_seed(config.seed)

    def choose(parameters: Array) -> Array:
        if config.greedy:
            return distribution.to_environment(distribution.mode(parameters))
        noise = distribution.noise((len(parameters),), generator)
        return distribution.to_environment(distribution.sample(parameters, noise))

    return RecurrentActor(fabric, agent, choose)


def networks(
    config: RecurrentPPOConfig, observation_space: Any, distribution: ActionDistribution
) -> RecurrentActorCritic:
    """The usual networks, with weights from the config's seed."""
    torch.manual_seed(config.seed)
    return recurrent_actor_critic(
        observation_space, distribution, cell=config.cell, width=config.width, forgets=not config.memory
    )


def hidden(config: RecurrentPPOConfig) -> tuple[int, ...]:
    """The components that the agent does not see."""
    if config.hide is None:
        return (1, 3) if config.env.startswith("CartPole-") else ()
    return tuple(config.hide)


def main(config: RecurrentPPOConfig) -> str:
    """Train, test the best checkpoint on episodes of its own, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    make_env, test_env = (MakeEnvironment(config.env, evaluation, hide=hidden(config)) for evaluation in (False, True))
    if hidden(config) and fabric.global_rank == 0:
        print(f"hide: components {', '.join(map(str, hidden(config)))} of the observations of {config.env}", flush=True)
    started = time.perf_counter()
    state = train(fabric, config, make_env=make_env, val_env=test_env)
    if state.step == config.steps:
        seconds = time.perf_counter() - started
        unwrap(state.agent).load_state_dict(load_module(str(config.run_dir), "agent"))
        scores = evaluate(fabric, config, state, test_env, config.test_episodes, "test")
        env_steps = config.steps * config.rollout_steps * config.num_envs
        print_test(fabric, config, scores, episodes=config.test_episodes, seconds=seconds, env_steps=env_steps)
    state.envs.close()
    return str(config.run_dir)


def enjoy(request: EnjoyConfig) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    config = config_of_run(RecurrentPPOConfig, request.run_dir, seed=request.seed, **ONE_PROCESS)
    env = MakeEnvironment(config.env, evaluation=True, render_mode="rgb_array", hide=hidden(config))()
    fabric, agent = launch(config), networks(config, env.observation_space, action_distribution(env.action_space))
    agent.load_state_dict(load_module(request.run_dir, "agent", which=request.which))
    show_episodes(request, env, player(fabric, config, agent, env.action_space))


if __name__ == "__main__":
    sys.exit(
        command_line(
            RecurrentPPOConfig, main, presets=PRESETS, verbs={"enjoy": (EnjoyConfig, enjoy)}, description=__doc__
        )
    )
