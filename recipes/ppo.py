"""Proximal policy optimisation: updates that keep near the policy that played (Schulman et al. 2017, algorithm 1).

    python -m recipes.ppo                                                     # CartPole, half a minute
    python -m recipes.ppo --preset acrobot
    python -m recipes.ppo enjoy --run_dir DIR --out agent.gif

A step plays a rollout with the policy as it is, estimates advantages, and updates policy and value on it for some
epochs. An interrupted run goes on in the middle of its episodes. `--compile true` compiles an update.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_custom.action_distributions import ActionDistribution, action_distribution
from lightning_custom.animation import ONE_PROCESS, EnjoyConfig, show_episodes
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.compiled_update import CompiledUpdate
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.distributed import mean_gradients_, share, sum_over_processes
from lightning_custom.environments.arrays import single_precision
from lightning_custom.environments.batched import BatchedEnvironments
from lightning_custom.environments.episodes import log_episodes
from lightning_custom.environments.evaluation import MakeEnv
from lightning_custom.environments.makers import MakeEnvironment, MakeVector, warn_if_inexact
from lightning_custom.environments.normalisation import ObservationNormaliser, RewardScaler
from lightning_custom.environments.scores import print_test, return_scores
from lightning_custom.environments.vector import EnvironmentVector
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.flat_adam import FlatAdam, flattened
from lightning_custom.gradients import clip_norm_
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger
from lightning_custom.numpy_network import acting_network, to_tensors
from lightning_custom.policies import ActorCritic, actor_critic, check_outputs, require_actor
from lightning_custom.precision import bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.reinforcement import explained_variance, following_values, generalised_advantages
from lightning_custom.rollout import Rollout, flatten_steps, gather_environments, take_rows
from lightning_custom.run import config_of_run
from lightning_custom.schedules import Constant, Linear, set_learning_rate


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Settings of the loop, and of the environment and networks that the command line builds."""

    steps: int = 400
    """Rollouts, each with its updates; the schedules read it."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    validate_every: int = 100
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    env: str = "CartPole-v1"
    """Environment, by its name in gymnasium's registry."""
    num_envs: int = 8
    """Environments, over all processes."""
    rollout_steps: int = 32
    """Steps of every environment in a rollout."""
    epochs: int = 20
    """Passes over a rollout."""
    minibatches: int = 1
    """Updates of a pass, each on an equal part of the rollout."""
    lr: float = 1e-3
    """Learning rate (Adam)."""
    anneal_lr: bool = True
    """Bring the learning rate down to 0 in a straight line."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    discount: float = 0.98
    """Weight of the next step's return."""
    gae_decay: float = 0.8
    """Decay of the advantage estimates, the papers' lambda."""
    normalise_advantages: bool = True
    """Give the advantages of a minibatch mean 0 and standard deviation 1."""
    clip: float = 0.2
    """How far the probability ratio may move before its gradient ends."""
    anneal_clip: bool = True
    """Bring the clip range down to 0 in a straight line."""
    clip_value: bool = False
    """Clip the value's move likewise."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    value_coefficient: float = 0.5
    """Weight of the value loss, which is half the squared error."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient; 0: no clipping."""
    target_kl: float | None = None
    """End a rollout's updates after a pass whose approximate KL divergence is above; none: never."""
    normalise_observations: bool = False
    """By the mean and standard deviation of all observations so far."""
    normalise_rewards: bool = False
    """By the standard deviation of all discounted returns so far."""
    shared: bool = False
    """Policy and value on one trunk; pictures always have one."""
    width: int = 64
    """Units of a hidden layer."""
    log_std: float = 0.0
    """Logarithm of the standard deviation that a policy over numbers starts from."""
    vectorised: bool = False
    """Step all environments by gymnasium's vector entry point, for many environments."""
    compile: bool = False
    """Compile an update."""
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
        require_at_least(self, {"lr": 0, "adam_eps": 0, "clip": 0, "max_grad_norm": 0, "val_episodes": 2})
        require_at_least(self, {"entropy_coefficient": 0, "value_coefficient": 0, "test_episodes": 2})
        for name in ("discount", "gae_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; give a number from 0 to 1")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ConfigError(f"target_kl: {self.target_kl}; give a number above 0, or none to make all updates")
        if self.num_envs * self.rollout_steps % self.minibatches:
            raise ConfigError(
                f"minibatches: {self.minibatches} do not divide {self.num_envs} x {self.rollout_steps} steps; "
                "choose a divisor"
            )


# Sources: rl-baselines3-zoo's tuned settings (zoo), CleanRL's defaults, and the 37 details of Huang et al. 2022.
CONTINUOUS: dict[str, Any] = {
    "normalise_observations": True, "normalise_rewards": True, "anneal_clip": False, "num_envs": 1,
    "rollout_steps": 2048, "epochs": 10, "minibatches": 32, "lr": 3e-4, "discount": 0.99, "gae_decay": 0.95,
    "steps": 488, "log_every": 4, "validate_every": 50, "checkpoint_every": 50, "clip_value": True,
}  # fmt: skip
PIXELS: dict[str, Any] = {
    "num_envs": 8, "rollout_steps": 128, "epochs": 4, "minibatches": 4, "lr": 2.5e-4, "discount": 0.99,
    "gae_decay": 0.95, "clip": 0.1, "anneal_clip": False, "clip_value": True, "entropy_coefficient": 0.01,
    "steps": 9765, "log_every": 10, "validate_every": 500, "checkpoint_every": 500, "threads": None,
    "val_episodes": 10, "test_episodes": 30, "greedy": False,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "acrobot": {
        "env": "Acrobot-v1", "num_envs": 16, "rollout_steps": 256, "epochs": 4, "minibatches": 64, "lr": 3e-4,
        "anneal_lr": False, "anneal_clip": False, "discount": 0.99, "gae_decay": 0.94, "normalise_observations": True,
        "steps": 244, "validate_every": 40, "checkpoint_every": 40, "log_every": 4,
    },
    "lunarlander": {
        "env": "LunarLander-v3", "num_envs": 16, "rollout_steps": 1024, "epochs": 4, "minibatches": 256, "lr": 3e-4,
        "anneal_lr": False, "anneal_clip": False, "discount": 0.999, "gae_decay": 0.98, "entropy_coefficient": 0.01,
        "steps": 61, "validate_every": 10, "checkpoint_every": 10, "log_every": 1,
    },
    "pendulum": {
        "env": "Pendulum-v1", "num_envs": 4, "rollout_steps": 1024, "epochs": 10, "minibatches": 64, "lr": 1e-3,
        "anneal_lr": False, "anneal_clip": False, "discount": 0.9, "gae_decay": 0.95,
        "steps": 25, "validate_every": 5, "checkpoint_every": 5, "log_every": 1,
    },
    "halfcheetah": {"env": "HalfCheetah-v5", **CONTINUOUS},
    "hopper": {"env": "Hopper-v5", **CONTINUOUS},
    "pong": {"env": "ALE/Pong-v5", **PIXELS},
    "breakout": {"env": "ALE/Breakout-v5", **PIXELS},
}  # fmt: skip


@dataclass
class PPOState:
    """What changes while training; a checkpoint is exactly these fields."""

    agent: nn.Module
    optimizer: Optimizer
    envs: EnvironmentVector | BatchedEnvironments
    observation_normaliser: ObservationNormaliser | None
    reward_scaler: RewardScaler | None
    metrics: MetricLogger
    step: int = 0
    """Rollouts done, with their updates."""


def train(
    fabric: Fabric,
    config: PPOConfig,
    *,
    make_env: MakeEnv,
    agent: ActorCritic | None = None,
    make_vector: Callable[[int], Any] | None = None,
    val_env: MakeEnv | None = None,
) -> PPOState:
    """Train ``agent``, a policy and a value function, on the environments of ``make_env(index)``.

    Without an agent it gets the usual networks of the config's width. ``make_vector(number)`` steps its environments
    all at once in their place. ``val_env`` is scored instead of ``make_env``, for example without a life's end.
    """
    refuse_loss_scale(fabric, "which this loop would clip and step along with the gradient")
    size = config.num_envs * config.rollout_steps // config.minibatches
    if size < fabric.world_size:
        raise ConfigError(f"minibatches: of {size} steps, for {fabric.world_size} processes; choose a smaller number")
    config = with_run_dir(fabric, config)
    share(config.num_envs, fabric, "num_envs")
    envs: Any = (
        EnvironmentVector(fabric, make_env, config.num_envs, seed=config.seed)
        if make_vector is None
        else BatchedEnvironments(fabric, make_vector, config.num_envs, seed=config.seed)
    )
    warn_if_inexact(fabric, envs)
    distribution = action_distribution(envs.action_space)
    agent = agent if agent is not None else networks(config, envs.observation_space, distribution)
    require_actor(agent)
    require_trainable("agent", agent)
    optimizer = FlatAdam(agent.parameters(), config.lr, eps=config.adam_eps)
    agent, optimizer = fabric.setup(agent, optimizer)
    flat = flattened(optimizer)  # parameters and gradients as one vector each: the same update in fewer calls
    normaliser, scaler = normalisers(fabric, config, envs)
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
    state = PPOState(cast("nn.Module", agent), cast("Optimizer", optimizer), envs, normaliser, scaler, metrics)

    loss: Callable[..., Any] = partial(ppo_loss, config, distribution)
    update = CompiledUpdate(fabric, loss, state.agent, flat, max_norm=config.max_grad_norm) if config.compile else None
    forward, act = bare(fabric, state.agent), acting_network(fabric, cast("ActorCritic", unwrap(state.agent)).actor)
    check_outputs(act, state.agent, envs.observation_space, distribution.size, name="agent")
    lr = Linear(config.lr, 0.0, max(config.steps, 1)) if config.anneal_lr else Constant(config.lr)
    clip = Linear(config.clip, 0.0, max(config.steps, 1)) if config.anneal_clip else Constant(config.clip)
    own, rollout = slice(envs.indices.start, envs.indices.stop), Rollout(config.rollout_steps, normaliser)
    fixed = config.anneal_lr or config.anneal_clip

    with (
        Checkpointer(fabric, config, best="val/episodic_return", mode="max", steps_fixed=fixed) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # Rollout: play with the policy as it is. The noise is that of all environments, whoever steps them.
            rollout.begin()
            noise = distribution.noise((config.rollout_steps, config.num_envs), rng.shared)[:, own]
            for t in range(config.rollout_steps):
                actions = distribution.sample(act(rollout.observe(envs)), noise[t])
                envs.step(distribution.to_environment(actions))
                rollout.record(actions, envs)

            # Advantages: from the values of everything seen, computed at once. From here on all processes have all.
            batch, explained = estimate(fabric, config, state, forward, distribution, rollout)
            if normaliser is not None:
                normaliser.update_(rollout.raw_observations)

            # Updates: each epoch goes through the rollout in an order of its own.
            set_learning_rate(state.optimizer, lr, state.step)
            clip_range, found = torch.tensor(clip(state.step), device=fabric.device), []
            for _ in range(config.epochs):
                order = torch.randperm(config.num_envs * config.rollout_steps, generator=rng.shared)
                for minibatch in minibatches(fabric, config, batch, order):
                    if update is not None:
                        found.append(update(*minibatch, clip_range))  # the lines below, compiled
                        continue
                    state.optimizer.zero_grad()
                    total, values = loss(forward, *minibatch, clip_range)
                    fabric.backward(total)
                    mean_gradients_(fabric, state.agent)
                    if config.max_grad_norm:
                        clip_norm_([flat.vector], config.max_grad_norm)
                    state.optimizer.step()
                    found.append(values)
                if config.target_kl is not None and mean_kl(fabric, found[-config.minibatches :]) > config.target_kl:
                    break

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
    config: PPOConfig,
    distribution: ActionDistribution,
    agent: Callable[[Any], tuple[Tensor, Tensor]],
    observations: Any,
    actions: Tensor,
    log_probabilities: Tensor,
    advantages: Tensor,
    returns: Tensor,
    values: Tensor,
    weights: Tensor,
    clip: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective (eq. 7), the value loss and the entropy bonus (eq. 9) of a minibatch ``[B]``.

    ``log_probabilities`` and ``values`` are of the agent that played; ``weights`` are those of the samples in the mean.
    Returns the loss, and its parts by tag.
    """
    parameters, new_values = agent(observations)
    new_log_probabilities, entropies = distribution.log_probability_and_entropy(parameters, actions)
    log_ratios = new_log_probabilities - log_probabilities
    ratios = log_ratios.exp()
    objective = torch.minimum(advantages * ratios, advantages * torch.clamp(ratios, 1 - clip, 1 + clip))
    errors = (new_values - returns).square()
    if config.clip_value:
        clipped = values + torch.clamp(new_values - values, -clip, clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    policy_loss, value_loss, entropy = -weights @ objective, weights @ errors / 2, weights @ entropies
    total = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
    return total, {
        "losses/policy_loss": policy_loss.detach(),
        "losses/value_loss": value_loss.detach(),
        "losses/entropy": entropy.detach(),
        # Schulman's estimator of the divergence from the policy that played: never negative, little variance.
        "losses/approx_kl": (weights @ (ratios - 1 - log_ratios)).detach(),
        "losses/clipfrac": (weights @ ((ratios - 1).abs() > clip).to(weights.dtype)).detach(),
    }


def estimate(
    fabric: Fabric,
    config: PPOConfig,
    state: PPOState,
    forward: Callable[[Any], tuple[Tensor, Tensor]],
    distribution: ActionDistribution,
    rollout: Rollout,
) -> tuple[dict[str, Any], float]:
    """Everything the updates need, of all environments ``[T * N, ...]``, and the explained variance of the values."""
    steps, number = rollout.rewards.shape
    with torch.no_grad():
        parameters, all_values = forward(to_tensors(rollout.all_observations(state.envs.observations), fabric.device))
        actions = torch.from_numpy(rollout.actions).to(fabric.device)
        log_probabilities, _ = distribution.log_probability_and_entropy(
            parameters[: steps * number], actions.flatten(0, 1)
        )
    values, last, final = np.split(all_values.cpu().numpy(), [steps * number, (steps + 1) * number])
    values, ended = values.reshape(steps, number), rollout.ended
    rewards = rollout.rewards
    if state.reward_scaler is not None:
        state.reward_scaler.update_(rewards, ended)
        rewards = state.reward_scaler(rewards)
    advantages = generalised_advantages(
        rewards.astype(values.dtype),
        values,
        following_values(values, last, ended, final),
        rollout.terminated,
        ended,
        discount=config.discount,
        decay=config.gae_decay,
    )
    batch = {
        "observations": to_tensors(rollout.observations, fabric.device),
        "actions": actions,
        "log_probabilities": log_probabilities.view(steps, number),
        **{
            name: torch.from_numpy(part).to(fabric.device)
            for name, part in (("advantages", advantages), ("returns", advantages + values), ("values", values))
        },
        "weights": torch.from_numpy(rollout.valid.astype(values.dtype)).to(fabric.device),
    }
    batch = gather_environments(fabric, batch)
    valid = batch["weights"].bool()
    explained = explained_variance(batch["values"][valid].cpu().numpy(), batch["returns"][valid].cpu().numpy())
    return flatten_steps(batch), explained


def minibatches(fabric: Fabric, config: PPOConfig, batch: dict[str, Any], order: Tensor) -> Iterator[tuple[Any, ...]]:
    """This process's share of each minibatch, in the order of :func:`ppo_loss`'s arguments.

    Advantages are normalised over the whole minibatch, whatever part of it is here.
    """
    shuffled = take_rows(batch, order.to(fabric.device))
    advantages, weights = (shuffled[name].view(config.minibatches, -1) for name in ("advantages", "weights"))
    number = weights.sum(1, keepdim=True)
    weights = weights / number.clamp_min(1)  # all may be ignored
    if config.normalise_advantages:
        centred = advantages - (weights * advantages).sum(1, keepdim=True)
        variance = (weights * centred.square()).sum(1, keepdim=True) * number / (number - 1).clamp_min(1)
        advantages = centred / (variance.sqrt() + 1e-8)
    # mean_gradients_ divides the sum over processes by their number.
    weights = weights * fabric.world_size
    shuffled |= {"advantages": advantages.flatten(), "weights": weights.flatten()}
    rows = torch.arange(len(order)).view(config.minibatches, -1).tensor_split(fabric.world_size, 1)[fabric.global_rank]
    for first, last in zip(rows[:, 0].tolist(), rows[:, -1].tolist(), strict=True):
        yield tuple(take_rows(part, slice(first, last + 1)) for part in shuffled.values())


def mean_kl(fabric: Fabric, found: list[dict[str, Tensor]]) -> float:
    """The mean of the approximate divergences ``found``, over all processes, so that all decide alike."""
    kl = torch.stack([values["losses/approx_kl"] for values in found]).mean()
    return float(sum_over_processes(fabric, kl)) / fabric.world_size


def normalisers(
    fabric: Fabric, config: PPOConfig, envs: Any
) -> tuple[ObservationNormaliser | None, RewardScaler | None]:
    """Those that the config asks for."""
    shape = envs.observation_space.shape
    if config.normalise_observations and (shape is None or envs.observation_space.dtype.kind != "f"):
        raise ConfigError(
            f"normalise_observations: true, but observations are in {envs.observation_space}; they must be real numbers"
        )
    return (
        ObservationNormaliser(fabric, shape) if config.normalise_observations else None,
        RewardScaler(fabric, config.num_envs, discount=config.discount) if config.normalise_rewards else None,
    )


def evaluate(
    fabric: Fabric, config: PPOConfig, state: PPOState, make_env: MakeEnv, number: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` episodes, always the same ones, with half its 95% interval."""
    act = player(fabric, config, unwrap(state.agent), state.observation_normaliser, state.envs.action_space)
    with evaluating(state.agent):
        return return_scores(fabric, make_env, act, number, seed=config.seed, name=name)


def player(
    fabric: Fabric, config: PPOConfig, agent: Any, normaliser: ObservationNormaliser | None, action_space: Any
) -> Callable[[Any], Any]:
    """Observations ``[E, ...]`` to what the environment takes; the normaliser's statistics stay as they are."""
    distribution, act = action_distribution(action_space), acting_network(fabric, agent.actor)
    generator = torch.Generator().manual_seed(config.seed)

    def play(observations: Any) -> Any:
        parameters = act(single_precision(observations) if normaliser is None else normaliser(observations))
        if config.greedy:
            return distribution.to_environment(distribution.mode(parameters))
        noise = distribution.noise((len(parameters),), generator)
        return distribution.to_environment(distribution.sample(parameters, noise))

    return play


def networks(config: PPOConfig, observation_space: Any, distribution: ActionDistribution) -> ActorCritic:
    """The usual networks, with weights from the config's seed."""
    torch.manual_seed(config.seed)
    return actor_critic(
        observation_space, distribution, width=config.width, shared=config.shared, log_std=config.log_std
    )


def main(config: PPOConfig) -> str:
    """Train, test the best checkpoint on episodes of its own, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    make_env, test_env = MakeEnvironment(config.env), MakeEnvironment(config.env, evaluation=True)
    make_vector = MakeVector(config.env) if config.vectorised else None
    started = time.perf_counter()
    state = train(fabric, config, make_env=make_env, make_vector=make_vector, val_env=test_env)
    if state.step == config.steps:
        seconds = time.perf_counter() - started
        restore_player_(str(config.run_dir), "best", unwrap(state.agent), state.observation_normaliser)
        scores = evaluate(fabric, config, state, test_env, config.test_episodes, "test")
        env_steps = config.steps * config.rollout_steps * config.num_envs
        print_test(fabric, config, scores, episodes=config.test_episodes, seconds=seconds, env_steps=env_steps)
    state.envs.close()
    return str(config.run_dir)


def restore_player_(run_dir: str, which: Literal["best", "last"], agent: nn.Module, normaliser: Any) -> None:
    """Give ``agent`` the weights of a run's checkpoint, and the normaliser its statistics."""
    agent.load_state_dict(load_module(run_dir, "agent", which=which))
    if normaliser is not None:
        normaliser.load_state_dict(load_module(run_dir, "observation_normaliser", which=which))


def enjoy(request: EnjoyConfig) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    config = config_of_run(PPOConfig, request.run_dir, seed=request.seed, **ONE_PROCESS)
    make_env = MakeEnvironment(config.env, evaluation=True, render_mode="rgb_array")
    fabric, env = launch(config), make_env()
    agent = networks(config, env.observation_space, action_distribution(env.action_space))
    shape = env.observation_space.shape
    normaliser = ObservationNormaliser(fabric, shape) if config.normalise_observations and shape is not None else None
    restore_player_(request.run_dir, request.which, agent, normaliser)
    act = player(fabric, config, agent, normaliser, env.action_space)
    show_episodes(request, env, act)


if __name__ == "__main__":
    sys.exit(command_line(PPOConfig, main, presets=PRESETS, verbs={"enjoy": (EnjoyConfig, enjoy)}, description=__doc__))
