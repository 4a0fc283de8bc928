"""Scores of an agent: what a validation returns, and what a finished run says."""

from collections.abc import Mapping

from lightning.fabric import Fabric

from lightning_custom.config import RunConfig, recipe_name
from lightning_custom.environments.evaluation import Actor, MakeEnv, episodic_returns, mean_and_interval


def return_scores(
    fabric: Fabric, make_env: MakeEnv, act: Actor, number: int, *, seed: int, name: str
) -> dict[str, float]:
    """The mean return of ``number`` episodes of ``act``, always the same ones, and half its 95% interval.

    As ``NAME/episodic_return`` and ``NAME/episodic_return_interval``, on every process alike. Those of a ``test`` are
    others than those of a validation, by which the checkpoint was chosen.
    """
    purpose = "test" if name == "test" else "evaluation"
    mean, interval = mean_and_interval(episodic_returns(fabric, make_env, act, number, seed=seed, purpose=purpose))
    return {f"{name}/episodic_return": mean, f"{name}/episodic_return_interval": interval}


def print_test(
    fabric: Fabric,
    config: RunConfig,
    scores: Mapping[str, float],
    *,
    episodes: int,
    seconds: float,
    env_steps: int | None = None,
) -> None:
    """Print what the best checkpoint of a run reached in its test, where the run is, and how to look at it."""
    if fabric.global_rank > 0:
        return
    steps = "" if env_steps is None else f"{env_steps:,} environment steps   "
    print(
        f"\nreturn {scores['test/episodic_return']:.1f} +- {scores['test/episodic_return_interval']:.1f}   "
        f"mean and 95% interval over {episodes} episodes, best checkpoint\n"
        f"{steps}{seconds:.1f} s\n"
        f"run: {config.run_dir}\n"
        f"look: tensorboard --logdir {config.run_dir}\n"
        f"watch: python -m recipes.{recipe_name(type(config))} enjoy --run_dir {config.run_dir} --out agent.gif",
        flush=True,
    )
