"""Soft actor-critic: a random policy that gathers return and entropy, learned from what was played before.

    python -m recipes.sac                                                     # Pendulum, some minutes
    python -m recipes.sac --temperature 0.2
    python -m recipes.sac --preset halfcheetah
    python -m recipes.sac enjoy --run_dir DIR --out agent.gif

Haarnoja et al. 2018b, algorithm 1: a step plays, keeps what it played, and then updates two critics, the policy and
the temperature on transitions drawn from all that is kept. An interrupted run goes on in the middle of its episodes,
with the same transitions. Nothing here compiles.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from gymnasium import spaces
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_custom.action_values import TwinCritics, squashed_gaussian_policy
from lightning_custom.adversarial import frozen
from lightning_custom.animation import ONE_PROCESS, EnjoyConfig, show_episodes
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, require_at_least, with_run_dir
from lightning_custom.distributed import mean_gradients_
from lightning_custom.environments.arrays import single_precision
from lightning_custom.environments.episodes import log_episodes
from lightning_custom.environments.evaluation import MakeEnv
from lightning_custom.environments.makers import MakeEnvironment, warn_if_inexact
from lightning_custom.environments.scores import print_test, return_scores
from lightning_custom.environments.vector import EnvironmentVector, Episode
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger
from lightning_custom.numpy_network import acting_network
from lightning_custom.policies import check_outputs
from lightning_custom.precision import bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.replay_buffer import ReplayBuffer, check_learning_starts
from lightning_custom.run import config_of_run
from lightning_custom.squashed_gaussian import require_bounds, squashed_action, squashed_sample, to_bounds
from lightning_custom.target_network import TargetNetwork


@dataclass(frozen=True, kw_only=True)
class SACConfig(RunConfig):
    """Settings of the loop, and of the environment and networks that the command line builds."""

    steps: int = 20000
    """Times that environments are played and the networks are updated."""
    log_every: int = 500
    """Steps between two rows of metrics."""
    validate_every: int = 5000
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 5000
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    env: str = "Pendulum-v1"
    """Environment, by its name in gymnasium's registry."""
    num_envs: int = 1
    """Environments, over all processes."""
    train_every: int = 1
    """Steps of every environment in a step."""
    updates: int = 1
    """Updates of the networks in a step."""
    learning_starts: int = 100
    """Environment steps with random actions before the first update."""
    capacity: int = 1000000
    """Transitions that are kept, over all environments."""
    batch_size: int = 256
    """Transitions of an update, over all processes."""
    actor_lr: float = 1e-3
    """Learning rate of the policy (Adam)."""
    critic_lr: float = 1e-3
    """Learning rate of the critics (Adam)."""
    temperature_lr: float = 1e-3
    """Learning rate of the temperature (Adam)."""
    discount: float = 0.99
    """Weight of the next step's return."""
    target_share: float = 0.005
    """Share of the way that the target critics move at each update."""
    n_step: int = 1
    """Rewards that are summed before the target critics' value."""
    temperature: float | None = None
    """Weight of the entropy; none: learned, from 1 on."""
    target_entropy: float | None = None
    """Entropy that a learned temperature holds, in nats; none: minus the numbers of an action."""
    width: int = 256
    """Units of a hidden layer."""
    threads: int | None = 1
    """CPU threads of each process."""
    val_episodes: int = 20
    """Episodes of a validation."""
    test_episodes: int = 100
    """Episodes of the test at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"num_envs": 1, "train_every": 1, "updates": 1, "learning_starts": 0, "capacity": 1})
        require_at_least(self, {"batch_size": 1, "actor_lr": 0, "critic_lr": 0, "temperature_lr": 0, "n_step": 1})
        require_at_least(self, {"width": 1, "val_episodes": 2, "test_episodes": 2})
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"discount: {self.discount}; give a number from 0 to 1")
        if not 0 < self.target_share <= 1:
            raise ConfigError(f"target_share: {self.target_share}; give a number above 0, up to 1")
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature: {self.temperature}; give a number above 0, or none to learn it")
        if self.temperature is not None and self.target_entropy is not None:
            raise ConfigError(
                f"target_entropy: {self.target_entropy}, but the temperature is {self.temperature} and not learned; "
                "give one of them"
            )
        check_learning_starts(self.learning_starts, self.steps * self.train_every * self.num_envs)


# Source: the settings of rl-baselines3-zoo, whose benchmark reports -157 +- 89 and, on HalfCheetah-v3, 9,535 +- 100,
# one run each.
PRESETS: dict[str, dict[str, Any]] = {
    "pendulum": {},
    "halfcheetah": {
        "env": "HalfCheetah-v5", "steps": 1000000, "learning_starts": 10000,
        "actor_lr": 3e-4, "critic_lr": 3e-4, "temperature_lr": 3e-4,
        "log_every": 5000, "validate_every": 50000, "checkpoint_every": 50000, "val_episodes": 10, "threads": None,
    },
}  # fmt: skip


class Temperature(nn.Module):
    """The weight of the entropy, by its logarithm."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """The weight."""
        return self.logarithm.exp()


@dataclass
class SACState:
    """What changes while training; a checkpoint is exactly these fields."""

    actor: nn.Module
    critics: nn.Module
    temperature: nn.Module
    actor_optimizer: Optimizer
    critic_optimizer: Optimizer
    temperature_optimizer: Optimizer
    target: TargetNetwork
    envs: EnvironmentVector
    replay: ReplayBuffer
    metrics: MetricLogger
    step: int = 0
    """Times that environments were played and the networks were updated."""


def train(
    fabric: Fabric,
    config: SACConfig,
    *,
    make_env: MakeEnv,
    actor: nn.Module | None = None,
    critics: nn.Module | None = None,
    val_env: MakeEnv | None = None,
) -> SACState:
    """Train ``actor(observations) -> [B, 2 D]`` and ``critics(observations, actions [B, D]) -> [2, B]``.

    The actor gives means and logarithms of standard deviations of the ``D`` numbers of an action, before these are
    squashed into [-1, 1]; critics see them in there. Without networks both get the usual ones of the config's width.
    ``val_env`` is scored instead of the environments of ``make_env(index)``.
    """
    refuse_loss_scale(fabric, "which this loop would clip and step along with the gradient")
    config = with_run_dir(fabric, config)
    envs = EnvironmentVector(fabric, make_env, config.num_envs, seed=config.seed)
    warn_if_inexact(fabric, envs)
    space = require_bounds(envs.action_space)
    dimensions = math.prod(space.shape)
    usual = networks(config, envs.observation_space, dimensions)
    actor, critics = actor or usual[0], critics or usual[1]
    temperature = Temperature(config.temperature or 1.0)
    require_trainable("actor", actor)
    require_trainable("critics", critics)
    actor_optimizer = Adam(actor.parameters(), config.actor_lr, fused=True)
    critic_optimizer = Adam(critics.parameters(), config.critic_lr, fused=True)
    temperature_optimizer = Adam(temperature.parameters(), config.temperature_lr, fused=True)
    actor_module, actor_optimizer = cast("Any", fabric.setup(actor, actor_optimizer))
    critic_module, critic_optimizer = cast("Any", fabric.setup(critics, critic_optimizer))
    temperature_module, temperature_optimizer = cast("Any", fabric.setup(temperature, temperature_optimizer))
    state = SACState(
        actor=actor_module,
        critics=critic_module,
        temperature=temperature_module,
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        temperature_optimizer=temperature_optimizer,
        target=TargetNetwork(critics),
        envs=envs,
        replay=ReplayBuffer(
            fabric, config.run_dir, capacity=config.capacity, num_envs=config.num_envs,
            observation_space=envs.observation_space, action_space=spaces.Box(-1, 1, (dimensions,)),
        ),
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/episodic_return"],
            layout={
                "return": ["val/episodic_return$", "charts/episodic_return$"],
                "values": ["losses/q_values"],
                "entropy": ["losses/(entropy|alpha)"],
            },
        ),
    )  # fmt: skip

    policy, values, target_values = (bare(fabric, module) for module in (actor, critics, state.target.module))
    act, own = acting_network(fabric, actor), slice(envs.indices.start, envs.indices.stop)
    check_outputs(act, actor, envs.observation_space, 2 * dimensions, name="actor")
    target_entropy = -dimensions if config.target_entropy is None else config.target_entropy
    # mean_gradients_ divides the sum over processes by their number.
    weight = fabric.world_size / config.batch_size

    with (
        Checkpointer(fabric, config, best="val/episodic_return", mode="max") as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)
        state.replay.begin(envs.observations)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # Play: actions drawn from the policy, at first from all. The noise is that of all environments.
            episodes: list[Episode] = []
            noise = torch.randn(config.train_every, config.num_envs, dimensions, generator=rng.shared).numpy()[:, own]
            anything = torch.rand(noise.shape[0], config.num_envs, dimensions, generator=rng.shared).numpy()[:, own]
            for t in range(config.train_every):
                if (state.step * config.train_every + t) * config.num_envs < config.learning_starts:
                    actions = 2 * anything[t] - 1
                else:
                    actions = squashed_action(act(single_precision(envs.observations)), noise[t])
                envs.step(to_bounds(actions, space))
                state.replay.add(actions, envs)
                episodes += envs.episodes

            # Updates: transitions of all environments, drawn together; each process learns from those it holds.
            found = []
            env_steps = (state.step + 1) * config.train_every * config.num_envs
            for _ in range(config.updates if env_steps > config.learning_starts else 0):
                batch = state.replay.sample(
                    config.batch_size, rng.shared, n_step=config.n_step, discount=config.discount
                )
                draws = torch.randn(2, config.batch_size, dimensions, generator=rng.shared)
                next_noise, new_noise = fabric.to_device(draws)[:, batch.positions]

                # Critics: towards the reward and the lower of the targets' values, entropy included.
                with torch.no_grad():
                    alpha = state.temperature()
                    next_actions, next_logs = squashed_sample(policy(batch.next_observations), next_noise)
                    following = target_values(batch.next_observations, next_actions).amin(0) - alpha * next_logs
                    targets = batch.rewards + batch.discounts * following
                estimates = values(batch.observations, batch.actions)
                critic_loss = 0.5 * (estimates - targets).square().sum() * weight
                state.critic_optimizer.zero_grad()
                fabric.backward(critic_loss)
                mean_gradients_(fabric, state.critics)
                state.critic_optimizer.step()

                # Policy: towards actions that the lower critic values, and towards entropy.
                with frozen(state.critics):
                    new_actions, logs = squashed_sample(policy(batch.observations), new_noise)
                    actor_loss = (alpha * logs - values(batch.observations, new_actions).amin(0)).sum() * weight
                    state.actor_optimizer.zero_grad()
                    fabric.backward(actor_loss)
                mean_gradients_(fabric, state.actor)
                state.actor_optimizer.step()

                # Temperature: up where the entropy is below its target.
                excess = (logs.detach() + target_entropy).sum() * weight
                if config.temperature is None:
                    state.temperature_optimizer.zero_grad()
                    fabric.backward(-temperature.logarithm * excess)
                    mean_gradients_(fabric, state.temperature)
                    state.temperature_optimizer.step()
                state.target.update_(config.target_share)
                q_values = estimates.detach().sum() * (weight / 2)
                found.append((critic_loss.detach(), actor_loss.detach(), q_values, target_entropy - excess, alpha))

            state.step += 1
            if found:
                means = torch.stack([torch.stack(row) for row in found]).mean(0).unbind()
                state.metrics.update(dict(zip(TAGS, means, strict=True)))
            log_episodes(fabric, state.metrics, episodes)
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                row = state.metrics.flush(state.step)
                rate = row[STEPS_PER_SECOND] * config.train_every * config.num_envs
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


TAGS = ("losses/qf_loss", "losses/actor_loss", "losses/q_values", "losses/entropy", "losses/alpha")


def evaluate(
    fabric: Fabric, config: SACConfig, state: SACState, make_env: MakeEnv, number: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` episodes without noise, always the same ones, with half its 95% interval."""
    act = player(fabric, state.actor, state.envs.action_space)
    with evaluating(state.actor):
        return return_scores(fabric, make_env, act, number, seed=config.seed, name=name)


def player(fabric: Fabric, actor: nn.Module, action_space: Any) -> Callable[[Any], Any]:
    """Observations ``[E, ...]`` to the squashed means, in the bounds of the environment ``[E, ...]``."""
    act, space = acting_network(fabric, actor), require_bounds(action_space)
    return lambda observations: to_bounds(squashed_action(act(single_precision(observations))), space)


def networks(config: SACConfig, observation_space: Any, dimensions: int) -> tuple[nn.Module, nn.Module]:
    """The usual actor and critics, with weights from the config's seed."""
    torch.manual_seed(config.seed)
    actor = squashed_gaussian_policy(observation_space, dimensions, width=config.width)
    return actor, TwinCritics(observation_space, dimensions, width=config.width)


def main(config: SACConfig) -> str:
    """Train, test the best checkpoint on episodes of its own, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    make_env, test_env = MakeEnvironment(config.env), MakeEnvironment(config.env, evaluation=True)
    started = time.perf_counter()
    state = train(fabric, config, make_env=make_env, val_env=test_env)
    if state.step == config.steps:
        seconds = time.perf_counter() - started
        unwrap(state.actor).load_state_dict(load_module(str(config.run_dir), "actor"))
        scores = evaluate(fabric, config, state, test_env, config.test_episodes, "test")
        env_steps = config.steps * config.train_every * config.num_envs
        print_test(fabric, config, scores, episodes=config.test_episodes, seconds=seconds, env_steps=env_steps)
    state.envs.close()
    return str(config.run_dir)


def enjoy(request: EnjoyConfig) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    config = config_of_run(SACConfig, request.run_dir, **ONE_PROCESS)
    make_env = MakeEnvironment(config.env, evaluation=True, render_mode="rgb_array")
    fabric, env = launch(config), make_env()
    actor, _ = networks(config, env.observation_space, math.prod(require_bounds(env.action_space).shape))
    actor.load_state_dict(load_module(request.run_dir, "actor", which=request.which))
    act = player(fabric, actor, env.action_space)
    show_episodes(request, env, act)


if __name__ == "__main__":
    sys.exit(command_line(SACConfig, main, presets=PRESETS, verbs={"enjoy": (EnjoyConfig, enjoy)}, description=__doc__))
