"""Deep Q-learning: values of actions, learned from what was played before (Mnih et al. 2015, algorithm 1).

    python -m recipes.dqn                                                     # CartPole, about a minute
    python -m recipes.dqn --double true --dueling true --n_step 3 --prioritised true
    python -m recipes.dqn --preset lunarlander
    python -m recipes.dqn enjoy --run_dir DIR --out agent.gif

A step plays some steps of every environment, greedily but for random actions, keeps them, and then updates the network
on transitions drawn from all that is kept. An interrupted run goes on in the middle of its episodes, with the same
transitions. Nothing here compiles.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torch.optim import Adam, Optimizer

from lightning_custom.action_values import q_network
from lightning_custom.animation import ONE_PROCESS, EnjoyConfig, show_episodes
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, with_run_dir
from lightning_custom.distributed import mean_gradients_
from lightning_custom.environments.arrays import single_precision
from lightning_custom.environments.episodes import log_episodes
from lightning_custom.environments.evaluation import MakeEnv
from lightning_custom.environments.makers import MakeEnvironment, warn_if_inexact
from lightning_custom.environments.scores import print_test, return_scores
from lightning_custom.environments.vector import EnvironmentVector, Episode
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.gradients import clip_norm_
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, seed_step
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger
from lightning_custom.numpy_network import acting_network
from lightning_custom.policies import check_outputs
from lightning_custom.precision import Bare, bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.replay_buffer import ReplayBuffer, Transitions, check_learning_starts
from lightning_custom.run import config_of_run
from lightning_custom.schedules import Linear
from lightning_custom.target_network import TargetNetwork


@dataclass(frozen=True, kw_only=True)
class DQNConfig(RunConfig):
    """Settings of the loop, and of the environment and network that the command line builds."""

    steps: int = 196
    """Times that environments are played and the network is updated."""
    log_every: int = 4
    """Steps between two rows of metrics."""
    validate_every: int = 20
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 20
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    env: str = "CartPole-v1"
    """Environment, by its name in gymnasium's registry."""
    num_envs: int = 1
    """Environments, over all processes."""
    train_every: int = 256
    """Steps of every environment in a step."""
    updates: int = 128
    """Updates of the network in a step."""
    learning_starts: int = 1000
    """Environment steps with random actions before the first update."""
    capacity: int = 100000
    """Transitions that are kept, over all environments."""
    batch_size: int = 64
    """Transitions of an update, over all processes."""
    lr: float = 2.3e-3
    """Learning rate (Adam)."""
    discount: float = 0.99
    """Weight of the next step's return."""
    target_every: int = 1
    """Steps between two copies of the network to the target network."""
    double: bool = False
    """Let the network choose the action that the target network values (double Q-learning)."""
    dueling: bool = False
    """Value of the state and advantages of actions in streams of their own."""
    n_step: int = 1
    """Rewards that are summed before the target network's value."""
    prioritised: bool = False
    """Draw transitions by their temporal-difference error."""
    priority_exponent: float = 0.6
    """How much the error counts: 0 not at all, 1 in proportion."""
    importance_exponent: float = 0.4
    """How much importance weights undo of it at first."""
    importance_steps: int = 50000
    """Environment steps until they undo all of it."""
    epsilon: float = 0.04
    """Share of random actions in the end."""
    epsilon_steps: int = 8000
    """Environment steps in which it falls from 1 to that, in a straight line."""
    max_grad_norm: float = 10.0
    """Largest norm of the gradient; 0: no clipping."""
    width: int = 256
    """Units of a hidden layer."""
    threads: int | None = 1
    """CPU threads of each process: one is fastest for small networks."""
    val_episodes: int = 20
    """Episodes of a validation."""
    test_episodes: int = 100
    """Episodes of the test at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"num_envs": 1, "train_every": 1, "updates": 1, "learning_starts": 0, "capacity": 1})
        require_at_least(self, {"batch_size": 1, "lr": 0, "target_every": 1, "n_step": 1, "max_grad_norm": 0})
        require_at_least(self, {"priority_exponent": 0, "importance_exponent": 0, "importance_steps": 1})
        require_at_least(self, {"epsilon_steps": 1, "width": 1, "val_episodes": 2, "test_episodes": 2})
        for name in ("discount", "epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; give a number from 0 to 1")
        # Not importance_steps, which goes with the length of a preset's run.
        uniform = not self.prioritised and "transitions are drawn alike; set prioritised"
        refuse_unread(self, {"priority_exponent": uniform, "importance_exponent": uniform})
        check_learning_starts(self.learning_starts, self.steps * self.train_every * self.num_envs)


# Source: the tuned settings of rl-baselines3-zoo, whose benchmark reports 500 and 154 +- 79, one run each.
PRESETS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "lunarlander": {
        "env": "LunarLander-v3", "steps": 25000, "train_every": 4, "updates": 4, "learning_starts": 0,
        "capacity": 50000, "batch_size": 128, "lr": 6.3e-4, "target_every": 62, "epsilon": 0.1,
        "epsilon_steps": 12000, "importance_steps": 100000,
        "log_every": 500, "validate_every": 2500, "checkpoint_every": 2500,
    },
}  # fmt: skip


@dataclass
class DQNState:
    """What changes while training; a checkpoint is exactly these fields."""

    q_network: nn.Module
    optimizer: Optimizer
    target: TargetNetwork
    envs: EnvironmentVector
    replay: ReplayBuffer
    metrics: MetricLogger
    step: int = 0
    """Times that environments were played and the network was updated."""


def train(
    fabric: Fabric,
    config: DQNConfig,
    *,
    make_env: MakeEnv,
    q_network: nn.Module | None = None,
    val_env: MakeEnv | None = None,
) -> DQNState:
    """Train ``q_network(observations) -> values [B, A]`` of the actions in the environments of ``make_env(index)``.

    Without a network it gets the usual one of the config's width. ``val_env`` is scored instead of ``make_env``.
    """
    refuse_loss_scale(fabric, "which this loop would clip and step along with the gradient")
    config = with_run_dir(fabric, config)
    envs = EnvironmentVector(fabric, make_env, config.num_envs, seed=config.seed)
    warn_if_inexact(fabric, envs)
    actions_from, num_actions = choices(envs.action_space)
    module = q_network if q_network is not None else network(config, envs.observation_space, num_actions)
    require_trainable("q_network", module)
    model, optimizer = fabric.setup(module, Adam(module.parameters(), config.lr, fused=True))
    replay = ReplayBuffer(
        fabric, config.run_dir, capacity=config.capacity, num_envs=config.num_envs,
        observation_space=envs.observation_space, action_space=envs.action_space,
        prioritised=config.prioritised, exponent=config.priority_exponent,
    )  # fmt: skip
    metrics = MetricLogger(
        fabric,
        config.run_dir,
        hyperparameters=config,
        headline=["val/episodic_return"],
        layout={"return": ["val/episodic_return$", "charts/episodic_return$"], "values": ["losses/q_values"]},
    )
    state = DQNState(model, cast("Optimizer", optimizer), TargetNetwork(model), envs, replay, metrics)

    values, target_values = bare(fabric, model), bare(fabric, state.target.module)
    act, own = acting_network(fabric, model), slice(envs.indices.start, envs.indices.stop)
    check_outputs(act, model, envs.observation_space, num_actions, name="q_network")
    importance = Linear(config.importance_exponent, 1.0, config.importance_steps)

    with (
        Checkpointer(fabric, config, best="val/episodic_return", mode="max") as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)
        replay.begin(envs.observations)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # Play: the best action, or with probability epsilon any. Drawn for all environments, whoever steps them.
            episodes: list[Episode] = []
            chances = torch.rand(config.train_every, config.num_envs, generator=rng.shared).numpy()[:, own]
            others = torch.randint(num_actions, (config.train_every, config.num_envs), generator=rng.shared).numpy()
            for t in range(config.train_every):
                best = act(single_precision(envs.observations)).argmax(1)
                explores = chances[t] < epsilon(config, (state.step * config.train_every + t) * config.num_envs)
                actions = actions_from + np.where(explores, others[t, own], best)
                envs.step(actions)
                replay.add(actions, envs)
                episodes += envs.episodes

            # Updates: transitions of all environments, drawn together; each process learns from those it holds.
            env_steps = (state.step + 1) * config.train_every * config.num_envs
            found = []
            for _ in range(config.updates if env_steps > config.learning_starts else 0):
                batch = replay.sample(
                    config.batch_size, rng.shared,
                    n_step=config.n_step, discount=config.discount, beta=importance(env_steps),
                )  # fmt: skip
                chosen, targets = predictions_and_targets(config, values, target_values, actions_from, batch)
                losses = smooth_l1_loss(chosen, targets, reduction="none")
                # mean_gradients_ divides the sum over processes by their number.
                loss = (batch.weights * losses).sum() * (fabric.world_size / config.batch_size)
                state.optimizer.zero_grad()
                fabric.backward(loss)
                mean_gradients_(fabric, state.q_network)
                if config.max_grad_norm:
                    clip_norm_(state.q_network.parameters(), config.max_grad_norm)
                state.optimizer.step()
                replay.update_priorities_(batch.places, targets - chosen)
                q_values = chosen.detach().sum() * (fabric.world_size / config.batch_size)
                found.append({"losses/td_loss": loss.detach(), "losses/q_values": q_values})

            state.step += 1
            if due(state.step, config.target_every):
                state.target.update_(1)
            if found:
                state.metrics.update({tag: torch.stack([row[tag] for row in found]).mean() for tag in found[0]})
            state.metrics.update({"charts/epsilon": epsilon(config, env_steps - config.num_envs)})
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


def epsilon(config: DQNConfig, env_steps: int) -> float:
    """The probability of a random action after so many steps of all environments together."""
    if env_steps < config.learning_starts:
        return 1.0
    return Linear(1.0, config.epsilon, config.epsilon_steps)(env_steps)


def predictions_and_targets(
    config: DQNConfig, values: Bare, target_values: Bare, actions_from: int, batch: Transitions
) -> tuple[Tensor, Tensor]:
    """What the network says of the actions that were taken, and what it should have said: two ``[b]``."""
    with torch.no_grad():
        following: Tensor = target_values(batch.next_observations)
        if config.double:
            best = values(batch.next_observations).argmax(1, keepdim=True)
            next_values = following.gather(1, best).squeeze(1)
        else:
            next_values = following.amax(1)
        targets = batch.rewards + batch.discounts * next_values
    predicted: Tensor = values(batch.observations)
    return predicted.gather(1, batch.actions.unsqueeze(1) - actions_from).squeeze(1), targets


def choices(space: Any) -> tuple[int, int]:
    """The first of the actions of ``space``, and their number; :class:`ConfigError` where they cannot be counted."""
    if not isinstance(space, spaces.Discrete):
        raise ConfigError(f"make_env: actions are in {space}; Q-learning needs Discrete; recipes.sac is for numbers")
    return int(space.start), int(space.n)


def evaluate(
    fabric: Fabric, config: DQNConfig, state: DQNState, make_env: MakeEnv, number: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` greedy episodes, always the same ones, with half its 95% interval."""
    act = player(fabric, state.q_network, state.envs.action_space)
    with evaluating(state.q_network):
        return return_scores(fabric, make_env, act, number, seed=config.seed, name=name)


def player(fabric: Fabric, module: nn.Module, action_space: Any) -> Callable[[Any], Any]:
    """Observations ``[E, ...]`` to the best actions ``[E]``."""
    act, (start, _) = acting_network(fabric, module), choices(action_space)
    return lambda observations: start + act(single_precision(observations)).argmax(1)


def network(config: DQNConfig, observation_space: Any, num_actions: int) -> nn.Module:
    """The usual network, with weights from the config's seed."""
    torch.manual_seed(config.seed)
    return q_network(observation_space, num_actions, width=config.width, dueling=config.dueling)


def main(config: DQNConfig) -> str:
    """Train, test the best checkpoint on episodes of its own, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    make_env, test_env = MakeEnvironment(config.env), MakeEnvironment(config.env, evaluation=True)
    started = time.perf_counter()
    state = train(fabric, config, make_env=make_env, val_env=test_env)
    if state.step == config.steps:
        seconds = time.perf_counter() - started
        unwrap(state.q_network).load_state_dict(load_module(str(config.run_dir), "q_network"))
        scores = evaluate(fabric, config, state, test_env, config.test_episodes, "test")
        env_steps = config.steps * config.train_every * config.num_envs
        print_test(fabric, config, scores, episodes=config.test_episodes, seconds=seconds, env_steps=env_steps)
    state.envs.close()
    return str(config.run_dir)


def enjoy(request: EnjoyConfig) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    config = config_of_run(DQNConfig, request.run_dir, **ONE_PROCESS)
    make_env = MakeEnvironment(config.env, evaluation=True, render_mode="rgb_array")
    fabric, env = launch(config), make_env()
    module = network(config, env.observation_space, choices(env.action_space)[1])
    module.load_state_dict(load_module(request.run_dir, "q_network", which=request.which))
    act = player(fabric, module, env.action_space)
    show_episodes(request, env, act)


if __name__ == "__main__":
    sys.exit(command_line(DQNConfig, main, presets=PRESETS, verbs={"enjoy": (EnjoyConfig, enjoy)}, description=__doc__))
