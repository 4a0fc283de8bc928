"""REINFORCE with a baseline: actions that led to more than was expected become more probable (Williams 1992).

    python -m recipes.reinforce                                               # CartPole, half a minute
    python -m recipes.reinforce --baseline false
    python -m recipes.reinforce enjoy --run_dir DIR --out agent.gif

A step plays whole episodes and makes one update. The policy gradient in its plainest form, and the file to read before
recipes/ppo.py. Nothing is compiled.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_custom.action_distributions import ActionDistribution, action_distribution
from lightning_custom.animation import ONE_PROCESS, EnjoyConfig, show_episodes
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, with_run_dir
from lightning_custom.distributed import mean_gradients_, sum_over_processes
from lightning_custom.environments.arrays import Array, single_precision
from lightning_custom.environments.episodes import log_episodes
from lightning_custom.environments.evaluation import EpisodePlayer, MakeEnv, Played
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.environments.scores import print_test, return_scores
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.gradients import clip_norm_
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, hash_seed, seed_step
from lightning_custom.metrics import STEPS_PER_SECOND, MetricLogger
from lightning_custom.numpy_network import acting_network, to_tensors
from lightning_custom.policies import ActorCritic, actor_critic, check_outputs, require_actor
from lightning_custom.precision import Bare, bare, refuse_loss_scale, unwrap
from lightning_custom.progress import Progress
from lightning_custom.reinforcement import discounted_returns
from lightning_custom.run import config_of_run


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(RunConfig):
    """Settings of the loop, and of the environment and networks that the command line builds."""

    steps: int = 150
    """Updates, each by episodes of its own."""
    log_every: int = 5
    """Steps between two rows of metrics."""
    validate_every: int = 25
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 25
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    env: str = "CartPole-v1"
    """Environment, by its name in gymnasium's registry."""
    episodes: int = 16
    """Episodes of an update, over all processes."""
    lr: float = 5e-3
    """Learning rate (Adam)."""
    discount: float = 0.99
    """Weight of the next step's return."""
    baseline: bool = True
    """Compare returns with what a value network expects, else with nothing."""
    value_coefficient: float = 0.5
    """Weight of the baseline's loss, which is half the squared error."""
    normalise_advantages: bool = True
    """Give the advantages of an update mean 0 and standard deviation 1."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Largest norm of the gradient; 0: no clipping."""
    width: int = 64
    """Units of a hidden layer."""
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
        require_at_least(self, {"episodes": 1, "width": 1, "lr": 0, "max_grad_norm": 0})
        require_at_least(self, {"entropy_coefficient": 0, "value_coefficient": 0, "val_episodes": 2})
        require_at_least(self, {"test_episodes": 2})
        refuse_unread(self, {"value_coefficient": not self.baseline and "there is no baseline; set baseline"})
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"discount: {self.discount}; give a number from 0 to 1")


PRESETS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "acrobot": {"env": "Acrobot-v1", "steps": 100, "entropy_coefficient": 0.01},
}


@dataclass
class ReinforceState:
    """What changes while training; a checkpoint is exactly these fields."""

    agent: nn.Module
    optimizer: Optimizer
    metrics: MetricLogger
    step: int = 0
    """Updates done."""


def train(
    fabric: Fabric,
    config: ReinforceConfig,
    *,
    make_env: MakeEnv,
    agent: ActorCritic | None = None,
    val_env: MakeEnv | None = None,
) -> ReinforceState:
    """Train ``agent``, a policy and a baseline, on the environments of ``make_env(index)``.

    Without an agent it gets the usual networks of the config's width. ``val_env`` is scored instead of ``make_env``.
    """
    refuse_loss_scale(fabric, "which this loop would clip and step along with the gradient")
    if config.episodes < fabric.world_size:
        raise ConfigError(f"episodes: {config.episodes}, for {fabric.world_size} processes; give each at least one")
    config = with_run_dir(fabric, config)
    player, space = EpisodePlayer(make_env), make_env(0)
    distribution = action_distribution(space.action_space)
    agent = agent if agent is not None else networks(config, space.observation_space, distribution)
    require_actor(agent)
    require_trainable("agent", agent)
    # A larger epsilon than Adam's own, so that a gradient which cancels to rounding is not blown up.
    agent, optimizer = fabric.setup(agent, Adam(agent.parameters(), config.lr, eps=1e-5, fused=True))
    metrics = MetricLogger(
        fabric,
        config.run_dir,
        hyperparameters=config,
        headline=["val/episodic_return"],
        layout={
            "return": ["val/episodic_return$", "charts/episodic_return$"],
            "losses": ["losses/(policy|value)_loss"],
            "entropy": ["losses/entropy"],
        },
    )
    state = ReinforceState(cast("nn.Module", agent), cast("Optimizer", optimizer), metrics)
    forward, act = bare(fabric, state.agent), acting_network(fabric, cast("ActorCritic", unwrap(state.agent)).actor)
    check_outputs(act, state.agent, space.observation_space, distribution.size, name="agent")
    own = np.array_split(np.arange(config.episodes), fabric.world_size)[fabric.global_rank].tolist()

    with (
        Checkpointer(fabric, config, best="val/episodic_return", mode="max") as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)

            # Play whole episodes with the policy as it is. One depends on its seed alone, whoever plays it.
            seeds = [hash_seed(config.seed, "episode", state.step, episode) for episode in own]
            noise = partial(own_noise, config, distribution, rng.shared, own)
            played = player.played(partial(draw, distribution, act, noise), seeds, distribution.to_environment, own)

            # Advantages: the discounted return from each step on, less what the baseline expects.
            parameters, values = forward(to_tensors(single_precision(played.observations), fabric.device))
            returns = returns_to_go(fabric, config, forward, played).to(values)
            log_probabilities, entropies = distribution.log_probability_and_entropy(
                parameters, torch.from_numpy(played.actions).to(fabric.device)
            )
            advantages = returns - values.detach() if config.baseline else returns
            number = int(sum_over_processes(fabric, torch.tensor(len(returns), device=fabric.device)))
            if config.normalise_advantages:
                advantages = normalised(fabric, advantages, number)

            # Update. mean_gradients_ divides the sum over processes by their number.
            weight = fabric.world_size / number
            policy_loss = -weight * (advantages * log_probabilities).sum()
            value_loss = weight * (values - returns).square().sum() / 2
            entropy = weight * entropies.sum()
            loss = policy_loss - config.entropy_coefficient * entropy
            if config.baseline:
                loss = loss + config.value_coefficient * value_loss
            state.optimizer.zero_grad()
            fabric.backward(loss)
            mean_gradients_(fabric, state.agent)
            if config.max_grad_norm:
                clip_norm_(state.agent.parameters(), config.max_grad_norm)
            state.optimizer.step()

            state.step += 1
            state.metrics.update({"losses/policy_loss": policy_loss, "losses/entropy": entropy})
            state.metrics.update({"losses/value_loss": value_loss, "charts/env_steps": number})
            log_episodes(fabric, state.metrics, played.episodes)
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                row = state.metrics.flush(state.step)
                rate = row[STEPS_PER_SECOND] * row["charts/env_steps"]
                progress.report(state.step, state.metrics.record(state.step, {"charts/SPS": rate}) | row)
            validation = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = evaluate(fabric, config, state, val_env or make_env, config.val_episodes, "val")
                progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    player.close()
    return state


def own_noise(
    config: ReinforceConfig, distribution: ActionDistribution, generator: torch.Generator, own: Sequence[int]
) -> Array:
    """The noise of this process's episodes in their next step: drawn for all, in the same order everywhere."""
    return distribution.noise((config.episodes,), generator)[list(own)]


def draw(
    distribution: ActionDistribution,
    act: Callable[[Any], Array],
    noise: Callable[[], Array],
    observations: Any,
    episodes: Sequence[int],
    _: int,
) -> Array:
    """An action for each of ``episodes``, which are those that have not ended."""
    return distribution.sample(act(single_precision(observations)), noise()[list(episodes)])


def returns_to_go(fabric: Fabric, config: ReinforceConfig, forward: Bare, played: Played) -> Tensor:
    """The discounted return from each step on, ``[S]``; what a time limit cut off is worth what the baseline says."""
    last = np.zeros(len(played.episodes))
    if config.baseline and played.truncated.any():
        with torch.no_grad():
            _, values = forward(to_tensors(single_precision(played.final_observations), fabric.device))
        last = np.where(played.truncated, values.double().cpu().numpy(), 0.0)
    returns = np.empty(len(played.rewards))
    for episode, value in enumerate(last):
        of_it = played.episode_of == episode
        returns[of_it] = discounted_returns(played.rewards[of_it], discount=config.discount, last=float(value))
    return torch.from_numpy(returns)


def normalised(fabric: Fabric, advantages: Tensor, number: int) -> Tensor:
    """``advantages`` of all processes together with mean 0 and standard deviation 1; ``number`` is how many."""
    centred = advantages - sum_over_processes(fabric, advantages.sum()) / number
    deviation = (sum_over_processes(fabric, centred.square().sum()) / number).sqrt()
    return centred / (deviation + 1e-8)


def evaluate(
    fabric: Fabric, config: ReinforceConfig, state: ReinforceState, make_env: MakeEnv, number: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` episodes, always the same ones, with half its 95% interval."""
    act = policy(fabric, config, unwrap(state.agent), action_distribution(make_env(0).action_space))
    with evaluating(state.agent):
        return return_scores(fabric, make_env, act, number, seed=config.seed, name=name)


def policy(fabric: Fabric, config: ReinforceConfig, agent: Any, distribution: ActionDistribution) -> Any:
    """Observations ``[E, ...]`` to what the environment takes."""
    act, generator = acting_network(fabric, agent.actor), torch.Generator().manual_seed(config.seed)

    def play(observations: Any) -> Array:
        parameters = act(single_precision(observations))
        if config.greedy:
            return distribution.to_environment(distribution.mode(parameters))
        noise = distribution.noise((len(parameters),), generator)
        return distribution.to_environment(distribution.sample(parameters, noise))

    return play


def networks(config: ReinforceConfig, observation_space: Any, distribution: ActionDistribution) -> ActorCritic:
    """The usual networks, with weights from the config's seed."""
    torch.manual_seed(config.seed)
    return actor_critic(observation_space, distribution, width=config.width)


def main(config: ReinforceConfig) -> str:
    """Train, test the best checkpoint on episodes of its own, and print what came out; returns the run's directory."""
    fabric = launch(config)
    config = with_run_dir(fabric, config)
    make_env, test_env = MakeEnvironment(config.env), MakeEnvironment(config.env, evaluation=True)
    started = time.perf_counter()
    state = train(fabric, config, make_env=make_env, val_env=test_env)
    if state.step == config.steps:
        seconds = time.perf_counter() - started
        unwrap(state.agent).load_state_dict(load_module(str(config.run_dir), "agent"))
        scores = evaluate(fabric, config, state, test_env, config.test_episodes, "test")
        print_test(fabric, config, scores, episodes=config.test_episodes, seconds=seconds)
    return str(config.run_dir)


def enjoy(request: EnjoyConfig) -> None:
    """Write the picture that ``request`` asks for, and print the returns."""
    config = config_of_run(ReinforceConfig, request.run_dir, **ONE_PROCESS)
    env, fabric = MakeEnvironment(config.env, evaluation=True, render_mode="rgb_array")(), launch(config)
    distribution = action_distribution(env.action_space)
    agent = networks(config, env.observation_space, distribution)
    agent.load_state_dict(load_module(request.run_dir, "agent", which=request.which))
    act = policy(fabric, config, agent, distribution)
    show_episodes(request, env, act)


if __name__ == "__main__":
    sys.exit(
        command_line(ReinforceConfig, main, presets=PRESETS, verbs={"enjoy": (EnjoyConfig, enjoy)}, description=__doc__)
    )
