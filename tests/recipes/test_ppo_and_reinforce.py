"""What holds for every recipe that plays: the observations and networks that it takes, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import nn

from lightning_custom.animation import EnjoyConfig
from lightning_custom.errors import ConfigError
from lightning_custom.policies import ActorCritic
from lightning_custom.precision import unwrap
from lightning_custom.recurrent import RecurrentActorCritic
from lightning_custom.testing import single_process
from recipes import dqn, ppo, recurrent_ppo, reinforce, sac
from tests.library.tiny_environments import Counted

COMMON = {"width": 8, "steps": 3, "val_episodes": 2, "log_every": 0, "validate_every": 0, "checkpoint_every": 0}
OFF_POLICY = {"train_every": 8, "updates": 2, "learning_starts": 4, "capacity": 64, "batch_size": 8}
CONFIGS = {
    ppo: (ppo.PPOConfig, {"num_envs": 2, "rollout_steps": 8, "epochs": 2}),
    recurrent_ppo: (recurrent_ppo.RecurrentPPOConfig, {"num_envs": 2, "rollout_steps": 8, "epochs": 2}),
    reinforce: (reinforce.ReinforceConfig, {"episodes": 2}),
    dqn: (dqn.DQNConfig, OFF_POLICY),
    sac: (sac.SACConfig, OFF_POLICY),
}
every_recipe = pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.__name__.rpartition(".")[2])


class Steps(Counted):
    """Shows how many steps were made, as a member of ``space``; ends after ``length``."""

    def __init__(self, space, action_space, length=4):
        self.observation_space, self.action_space, self.length = space, action_space, length

    def step(self, action):
        self.count += 1
        reward = float(np.asarray(action).sum()) / 4
        return self._observation(), reward, self.count == self.length, False, {}

    def _observation(self):
        return self._member(self.observation_space)

    def _member(self, space):
        if isinstance(space, spaces.Dict):
            return {key: self._member(part) for key, part in space.spaces.items()}
        return np.full(space.shape, self.count, space.dtype)


def actions_of(recipe):
    return spaces.Box(-1, 1, (1,), np.float32) if recipe is sac else spaces.Discrete(2)


def config_of(recipe, folder, **fields):
    kind, own = CONFIGS[recipe]
    return kind(**COMMON | own | {"run_dir": str(folder), "accelerator": "cpu"} | fields)


def trained(recipe, folder, space, precision="32-true"):
    """The parameters of an agent that saw ``space``."""
    state = recipe.train(
        single_process(precision),
        config_of(recipe, folder, precision=precision),
        make_env=lambda index: Steps(space, actions_of(recipe)),
    )
    module = {dqn: "q_network", sac: "actor"}.get(recipe, "agent")
    return [part.detach() for part in unwrap(getattr(state, module)).parameters()]


SPACES = {
    "float64": spaces.Box(0, 9, (1,), np.float64),
    "int64": spaces.Box(0, 9, (1,), np.int64),
    "uint8": spaces.Box(0, 255, (1,), np.uint8),
    "one number": spaces.Box(0, 9, (), np.float32),
    "dict of float64": spaces.Dict(part=spaces.Box(0, 9, (1,), np.float64)),
}


@every_recipe
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_the_same_numbers_teach_the_same_whatever_they_come_in(recipe, precision, tmp_path):
    expected = trained(recipe, tmp_path / "float32", spaces.Box(0, 9, (1,), np.float32), precision)
    assert expected[0].dtype == (torch.float64 if precision == "64-true" else torch.float32)
    for name, space in SPACES.items():
        found = trained(recipe, tmp_path / name, space, precision)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_recipe
def test_a_loss_scale_is_refused_before_anything_is_written(recipe, tmp_path):
    scaler = torch.amp.GradScaler("cpu")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    with pytest.raises(ConfigError, match=r"^precision: 16-mixed has a loss scale, .* use bf16-mixed$"):
        recipe.train(fabric, config_of(recipe, tmp_path / "run"), make_env=lambda index: None)
    assert not (tmp_path / "run").exists()


@every_recipe
def test_a_run_of_several_machines_is_shown_on_one(recipe, tmp_path, capsys):
    env = {"env": "Pendulum-v1"} if recipe is sac else {}
    recipe.main(config_of(recipe, tmp_path / "run", test_episodes=2, **env))
    stored = tmp_path / "run" / "config.yaml"
    fields = stored.read_text().replace("num_nodes: 1", "num_nodes: 2").replace("strategy: auto", "strategy: ddp")
    assert "num_nodes: 2" in fields
    assert "strategy: ddp" in fields
    stored.write_text(fields)
    capsys.readouterr()
    recipe.enjoy(EnjoyConfig(run_dir=str(tmp_path / "run"), out=str(tmp_path / "agent.gif"), max_frames=3))
    assert capsys.readouterr().out.startswith("returns ")


@pytest.mark.parametrize("name", ["episodes", "max_frames"])
def test_a_picture_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"^{name}: 0; it must be at least 1$"):
        EnjoyConfig(run_dir="run", **{name: 0})


def own_networks(recipe, inputs, outputs):
    """What ``train`` takes as its own networks, the one that acts with so many outputs."""
    if recipe is recurrent_ppo:
        encoder = nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.5))
        return {"agent": RecurrentActorCritic(encoder, nn.GRUCell(8, 8), nn.Linear(8, outputs), nn.Linear(8, 1))}
    acts = nn.Sequential(nn.Linear(inputs, 8), nn.Dropout(0.5), nn.Linear(8, outputs))
    if recipe in (ppo, reinforce):
        return {"agent": ActorCritic(acts, nn.Linear(inputs, 1))}
    return {"q_network" if recipe is dqn else "actor": acts}


@every_recipe
def test_networks_whose_outputs_do_not_fit_the_actions_are_refused(recipe, tmp_path):
    space = spaces.Box(0, 9, (3,), np.float32)
    for outputs in (1, 3):
        with pytest.raises(ConfigError, match=rf"gives numbers of shape \(2, {outputs}\) .* the actions need \(2, 2\)"):
            recipe.train(
                single_process(),
                config_of(recipe, tmp_path / str(outputs)),
                make_env=lambda index: Steps(space, actions_of(recipe)),
                **own_networks(recipe, 3, outputs),
            )


@pytest.mark.parametrize("recipe", [ppo, reinforce])
def test_an_agent_that_cannot_act_alone_is_refused(recipe, tmp_path):
    with pytest.raises(ConfigError, match="agent: Linear has no actor, a module that acts; give an ActorCritic"):
        recipe.train(
            single_process(),
            config_of(recipe, tmp_path),
            make_env=lambda index: Steps(spaces.Box(0, 9, (3,), np.float32), spaces.Discrete(2)),
            agent=nn.Linear(3, 2),
        )


@every_recipe
def test_scoring_is_in_evaluation_mode_and_training_goes_on_in_its_own(recipe, tmp_path):
    space, networks, modes = spaces.Box(0, 9, (3,), np.float32), own_networks(recipe, 3, 2), []
    (module,) = networks.values()
    dropout = next(part for part in module.modules() if isinstance(part, nn.Dropout))

    def make_env(index):
        modes.append(dropout.training)
        return Steps(space, actions_of(recipe))

    state = recipe.train(single_process(), config_of(recipe, tmp_path), make_env=make_env, **networks)
    assert dropout.training
    modes.clear()
    recipe.evaluate(single_process(), config_of(recipe, tmp_path), state, make_env, 2, "val")
    assert modes[-2:] == [False, False]
    assert dropout.training


@pytest.mark.parametrize(
    "recipe, fields, message",
    [
        (ppo, {"minibatches": 16}, "^minibatches: of 1 steps, for 2 processes; choose a smaller number$"),
        (reinforce, {"episodes": 1}, "^episodes: 1, for 2 processes; give each at least one$"),
    ],
)
def test_work_that_does_not_reach_every_process_is_refused(recipe, fields, message, tmp_path):
    fabric = single_process()
    fabric._strategy = SimpleNamespace(world_size=2, precision=None)
    with pytest.raises(ConfigError, match=message):
        recipe.train(fabric, config_of(recipe, tmp_path, **fields), make_env=lambda index: None)
