"""The recipes as the conformance tests run them: small networks, little data, every variant a config.

A recipe joins by a ``run`` function and a row in :data:`CASES`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, multi_margin_loss
from torch.utils.data import Dataset, TensorDataset

from lightning_custom.config import RunConfig
from lightning_custom.datasets import Images, digits, overlaid
from lightning_custom.distributed import gather_shares, take_share
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.few_shot import Sampler
from lightning_custom.multitask.methods import Method
from lightning_custom.multitask.task_losses import MISSING
from lightning_custom.multitask.weighting import Weighting
from lightning_custom.networks import ConvClassifier, LeNetTrunk, mlp_head
from lightning_custom.task_norm import BatchStatisticsNorm
from lightning_custom.tasks import FewShot, Sinusoids
from recipes import (
    adversarial_training,
    classification,
    diffusion,
    dqn,
    gan,
    imaml,
    maml,
    maml_plus_plus,
    multitask,
    ppo,
    recurrent_ppo,
    reinforce,
    reptile,
    sac,
)
from tests.library.tiny_environments import Mixed


@dataclass(frozen=True)
class Case:
    name: str
    module: str
    """Where the recipe's ``train`` and its imports live."""
    run: Callable[[Fabric, Any], Any]
    """``run(fabric, config) -> state``; at the top of a module, so that other processes can import it."""
    config: RunConfig
    """The default variant: small, 30 steps, rows every 4, checkpoints every 8."""
    variants: dict[str, dict[str, Any]]
    """By name, the fields in which a variant differs from the default."""
    preset: RunConfig
    """The default preset in full size, 30 steps."""

    def configs(self) -> dict[str, Any]:
        """The config of each variant by name, the default first."""
        changed = {name: dataclasses.replace(self.config, **fields) for name, fields in self.variants.items()}
        return {"default": self.config, **changed}


def run_gan(fabric: Fabric, config: gan.GANConfig) -> gan.GANState:
    # A size that batches do not divide: passes end inside batches.
    images, labels, num_classes = digits()
    size = 11 * config.batch_size + 2
    data = Images(images[:size], labels[:size], num_classes)
    generator, discriminator = gan.networks(config, data)

    def scores(sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, float]:
        latents = torch.randn(20, config.latent_size, generator=torch.Generator().manual_seed(1))
        distance = sample(latents, data.labels[:20]).mean() - data.images.mean()
        return {"val/fid": float(distance.abs())}

    return gan.train(
        fabric, config, generator=generator, discriminator=discriminator, dataset=data.dataset(), scores=scores
    )


def run_diffusion(fabric: Fabric, config: diffusion.DiffusionConfig) -> diffusion.DiffusionState:
    # A size that batches do not divide, and a number of samples that two processes do not.
    images, labels, num_classes = digits()
    size = 11 * config.batch_size + 2
    data = Images(images[:size], labels[:size], num_classes)

    def scores(generate: diffusion.Generate) -> dict[str, float]:
        noise = torch.randn(21, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        samples = gather_shares(generate(noise, data.labels[:21]), fabric)
        return {"val/fid": float((samples.mean() - data.images.mean()).abs())}

    denoiser = diffusion.network(config, data.images.shape[1:])
    return diffusion.train(fabric, config, denoiser=denoiser, dataset=data.dataset(), scores=scores)


@dataclass(frozen=True, kw_only=True)
class ClassificationCase(classification.ClassificationConfig):
    """With what a user gives to ``train`` beside the config."""

    own: Literal["", "composite-loss", "loss-and-optimizer"] = ""


def two_losses(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"entropy": cross_entropy(logits, targets), "size": 1e-2 * logits.square().mean()}


def margin(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return multi_margin_loss(logits, targets)


class SignMomentum(torch.optim.Optimizer):
    """The sign of a running mean of gradients: an optimizer that torch has not."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.sub_(torch.tanh(1e3 * mean), alpha=group["lr"])


def run_classification(
    fabric: Fabric, config: classification.ClassificationConfig
) -> classification.ClassificationState:
    # A size that batches do not divide, and a validation whose last batch has another size than the first.
    images, labels, num_classes = digits()
    size = 11 * config.batch_size + 2
    train_data, val_data = TensorDataset(images[:size], labels[:size]), TensorDataset(images[-43:], labels[-43:])
    torch.manual_seed(config.seed)
    own = getattr(config, "own", "")
    return classification.train(
        fabric,
        config,
        model=ConvClassifier(1, 8, num_classes, config.width),
        train_data=train_data,
        val_data=val_data,
        num_classes=num_classes,
        loss={"composite-loss": two_losses, "loss-and-optimizer": margin}.get(own),
        optimizer=SignMomentum if own == "loss-and-optimizer" else None,
    )


def run_adversarial_training(
    fabric: Fabric, config: adversarial_training.AdversarialTrainingConfig
) -> adversarial_training.AdversarialTrainingState:
    data, _, _ = adversarial_training.load_data(config)
    size = 11 * config.batch_size + 2
    return adversarial_training.train(
        fabric,
        config,
        model=adversarial_training.network(config, data),
        dataset=TensorDataset(data.images[:size], data.labels[:size]),
        num_classes=data.num_classes,
        val_data=TensorDataset(data.images[-43:], data.labels[-43:]),
    )


@dataclass(frozen=True, kw_only=True)
class MAMLCase(maml.MAMLConfig):
    """With the tasks, and the network for them, that a user gives to ``train`` beside the config."""

    own: Literal["", "images", "stream"] = ""


def image_tasks(shots: int = 2, query_shots: int = 2) -> FewShot:
    """Three of six classes of noise around an image each."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 1, 8, 8, generator=draw) + 0.5 * torch.randn(6, 8, 1, 8, 8, generator=draw)
    return FewShot(images, ways=3, shots=shots, query_shots=query_shots)


class TaskStream:
    """An iterable of this process's part of each meta-batch, which knows its place."""

    def __init__(self, fabric: Fabric, sampler: Sampler, meta_batch_size: int) -> None:
        self.fabric, self.sampler, self.meta_batch_size, self.place = fabric, sampler, meta_batch_size, 0

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        while True:
            tasks = self.sampler(self.meta_batch_size, torch.Generator().manual_seed(self.place))
            self.place += 1
            yield [take_share(part, self.fabric) for part in tasks]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class SmallConvNet(nn.Module):
    """One block of convolution and normalisation: images ``[B, 1, 8, 8]`` of one task to logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.trunk = nn.Sequential(convolution, BatchStatisticsNorm(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(36, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(images))  # type: ignore[no-any-return]


def run_maml(fabric: Fabric, config: maml.MAMLConfig) -> maml.MAMLState:
    own = getattr(config, "own", "")
    # A function, not the family itself: a picture at every validation would take as long as the run.
    waves = Sinusoids(config.shots, config.query_shots).__call__
    torch.manual_seed(config.seed)
    if own == "images":
        return maml.train(fabric, config, model=SmallConvNet(), tasks=image_tasks())
    model = maml.network(config)
    if own == "stream":
        stream = TaskStream(fabric, waves, config.meta_batch_size)
        return maml.train(fabric, config, model=model, tasks=stream, val_tasks=waves)
    return maml.train(fabric, config, model=model, tasks=waves)


IMAGES: dict[str, Any] = {"own": "images", "ways": 3, "inner_lr": 0.1, "joint": False}


@dataclass(frozen=True, kw_only=True)
class MAMLPlusPlusCase(maml_plus_plus.MAMLPlusPlusConfig):
    """With the tasks, and the network for them, that a user gives to ``train`` beside the config."""

    own: Literal["", "images", "stream"] = ""


def run_maml_plus_plus(fabric: Fabric, config: maml_plus_plus.MAMLPlusPlusConfig) -> maml_plus_plus.MAMLPlusPlusState:
    own, waves = getattr(config, "own", ""), Sinusoids(config.shots, config.query_shots).__call__
    torch.manual_seed(config.seed)
    if own == "images":
        return maml_plus_plus.train(fabric, config, model=SmallConvNet(), tasks=image_tasks())
    model = maml_plus_plus.network(config)
    if own == "stream":
        stream = TaskStream(fabric, waves, config.meta_batch_size)
        return maml_plus_plus.train(fabric, config, model=model, tasks=stream, val_tasks=waves)
    return maml_plus_plus.train(fabric, config, model=model, tasks=waves)


NORMED: dict[str, Any] = {"own": "images", "ways": 3, "width": 4, "inner_lr": 0.1}


@dataclass(frozen=True, kw_only=True)
class ReptileCase(reptile.ReptileConfig):
    """With the tasks, and the network for them, that a user gives to ``train`` beside the config."""

    own: Literal["", "images", "stream"] = ""
    own_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class IMAMLCase(imaml.IMAMLConfig):
    """With the tasks, and the network for them, that a user gives to ``train`` beside the config."""

    own: Literal["", "images", "stream"] = ""


def run_reptile(fabric: Fabric, config: reptile.ReptileConfig) -> reptile.ReptileState:
    own_optimizer = torch.optim.Adam if getattr(config, "own_optimizer", False) else None
    return run_without_pictures(reptile, fabric, config, optimizer=own_optimizer)


def run_imaml(fabric: Fabric, config: imaml.IMAMLConfig) -> imaml.IMAMLState:
    return run_without_pictures(imaml, fabric, config)


def run_without_pictures(recipe: Any, fabric: Fabric, config: Any, **own_parts: Any) -> Any:
    own, waves = getattr(config, "own", ""), Sinusoids(config.shots, config.query_shots).__call__
    torch.manual_seed(config.seed)
    if own == "images":
        return recipe.train(fabric, config, model=SmallConvNet(), tasks=image_tasks(), **own_parts)
    tasks = TaskStream(fabric, waves, config.meta_batch_size) if own == "stream" else waves
    return recipe.train(fabric, config, model=recipe.network(config), tasks=tasks, val_tasks=waves, **own_parts)


FEW_SHOT: dict[str, Any] = {
    "steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "meta_batch_size": 5, "width": 8,
    "shots": 3, "query_shots": 4, "inner_steps": 2, "test_steps": 2, "val_tasks": 5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MultitaskCase(multitask.MultitaskConfig):
    """With what a user gives to ``train`` beside the config."""

    own: Literal["", "sets", "optimizer-and-method"] = ""


class OverlaidTargets(Dataset[Any]):
    """Two overlaid digits: the left one's class, the right one's class and parity, and how light the picture is.

    Half of the left labels are missing, and three quarters of the lightness: in some steps on one of two processes.
    """

    def __init__(self, data: Images) -> None:
        draws = torch.rand(2, len(data.labels), generator=torch.Generator().manual_seed(5))
        self.images, (self.known_left, self.right) = data.images, data.labels.unbind(1)
        self.left = torch.where(draws[0] < 0.5, MISSING, self.known_left)
        self.light = torch.where(draws[1] < 0.75, torch.nan, data.images.mean((1, 2, 3)) + 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        right = {"digit": self.right[index], "odd": (self.right[index] % 2).float()}
        return self.images[index], {"left": self.left[index], "right": right, "light": self.light[index]}

    def apart(self) -> dict[str, TensorDataset]:
        """A data set a task, of different sizes and without what is missing."""
        light = ~self.light.isnan()
        return {
            "left": TensorDataset(self.images[:37], self.known_left[:37]),
            "light": TensorDataset(self.images[light], self.light[light]),
        }


class DigitAndParity(nn.Module):
    """A head with several outputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.digit, self.odd = nn.Linear(features, 10), nn.Linear(features, 1)

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"digit": self.digit(features), "odd": self.odd(features).squeeze(1)}


def right_loss(outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    odd = binary_cross_entropy_with_logits(outputs["odd"], targets["odd"].to(outputs["odd"].dtype), reduction="none")
    return cross_entropy(outputs["digit"], targets["digit"], reduction="none") + odd


def light_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # A mean, where the others give a value for each sample.
    return mse_loss(outputs, targets.to(outputs.dtype))


class InverseLosses(Weighting):
    def weigh(self, losses: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 1 / losses


def run_multitask(fabric: Fabric, config: multitask.MultitaskConfig) -> multitask.MultitaskState:
    # A size that batches do not divide, and a validation whose last batch has another size than the first.
    data = overlaid(digits(), 12, count=11 * config.batch_size + 2)
    train_data, val_data = OverlaidTargets(data), OverlaidTargets(overlaid(digits(), 12, count=43, seed=1))
    own = getattr(config, "own", "")
    torch.manual_seed(config.seed)
    trunk = LeNetTrunk(1, 12, width=config.width, features=8, kernel=3, padding=1)
    heads = {
        "left": mlp_head(8, 10, width=6),
        "right": DigitAndParity(8),
        "light": nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)),
    }
    losses = {"left": multitask.sample_entropies, "right": right_loss, "light": light_loss}
    if own == "sets":
        del heads["right"], losses["right"]
    return multitask.train(
        fabric,
        config,
        trunk=trunk,
        heads=heads,
        data=train_data.apart() if own == "sets" else train_data,
        losses=losses,
        val_data=val_data.apart() if own == "sets" else val_data,
        method=InverseLosses(list(heads)) if own == "optimizer-and-method" else None,
        optimizer=SignMomentum if own == "optimizer-and-method" else None,
    )


MULTITASK_OPTIONS: dict[str, dict[str, Any]] = {
    "static": {"fixed": {"left": 1.0, "right": 0.5, "light": 2.0}},
    "dwa": {"window": 3},
    "torchjd": {"name": "GradDrop"},  # draws at random
}


@dataclass(frozen=True, kw_only=True)
class DQNCase(dqn.DQNConfig):
    """With the environment and network that a user gives to ``train`` beside the config."""

    own: Literal["", "dict"] = ""


class SignsAndPlaces(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole's numbers, and their signs as bytes."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        signs = spaces.Box(0, 1, (4,), np.uint8)
        self.observation_space = spaces.Dict(places=env.observation_space, signs=signs)

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"places": observation, "signs": (observation > 0).astype(np.uint8)}

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None: ...


def make_signs_and_places(index: int = 0) -> Any:
    return SignsAndPlaces(MakeEnvironment("CartPole-v1")())


class NetworkOfSigns(nn.Module):
    """Dict observations to the values of two actions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        places = observations["places"]
        values: torch.Tensor = self.layers(torch.cat([places, observations["signs"].to(places.dtype)], 1))
        return values


def run_dqn(fabric: Fabric, config: dqn.DQNConfig) -> dqn.DQNState:
    if getattr(config, "own", "") == "dict":
        torch.manual_seed(config.seed)
        return dqn.train(fabric, config, make_env=make_signs_and_places, q_network=NetworkOfSigns())
    return dqn.train(fabric, config, make_env=MakeEnvironment(config.env))


def run_sac(fabric: Fabric, config: sac.SACConfig) -> sac.SACState:
    return sac.train(fabric, config, make_env=MakeEnvironment(config.env))


# Learns from the first step on; twenty transitions of each environment are soon written over.
OFF_POLICY: dict[str, Any] = {
    "steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "num_envs": 4, "train_every": 2,
    "learning_starts": 7, "capacity": 80, "batch_size": 16, "width": 8, "val_episodes": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PPOCase(ppo.PPOConfig):
    """With the environment that a user gives to ``train`` beside the config."""

    own: Literal["", "mixed"] = ""


class Choices(Mixed):  # type: ignore[misc]
    """Dict observations with pictures and numbers, and several choices an action, of which one is rewarded."""

    def step(self, action: Any) -> Any:
        observation, _, *ends = super().step(action)
        return observation, float(action[0] == 2), *ends

    def get_state(self) -> dict[str, Any]:
        return {"kept": self.kept, "count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        self.kept, self.count = state["kept"], state["count"]


def choices(index: int) -> Any:
    return Choices()


def run_ppo(fabric: Fabric, config: ppo.PPOConfig) -> ppo.PPOState:
    own = getattr(config, "own", "")
    return ppo.train(fabric, config, make_env=choices if own == "mixed" else MakeEnvironment(config.env))


@dataclass(frozen=True, kw_only=True)
class RecurrentPPOCase(recurrent_ppo.RecurrentPPOConfig):
    """With the environment that a user gives to ``train`` beside the config."""

    own: Literal["", "mixed"] = ""


def run_recurrent_ppo(fabric: Fabric, config: recurrent_ppo.RecurrentPPOConfig) -> recurrent_ppo.RecurrentPPOState:
    own = getattr(config, "own", "")
    make_env = choices if own == "mixed" else MakeEnvironment(config.env, hide=recurrent_ppo.hidden(config))
    return recurrent_ppo.train(fabric, config, make_env=make_env)


def run_reinforce(fabric: Fabric, config: reinforce.ReinforceConfig) -> reinforce.ReinforceState:
    return reinforce.train(fabric, config, make_env=MakeEnvironment(config.env))


ADA = ("blit", "geometry", "color")

CASES = [
    Case(
        name="gan",
        module="recipes.gan",
        run=run_gan,
        config=gan.GANConfig(
            steps=30, log_every=4, validate_every=10, checkpoint_every=8, batch_size=8, latent_size=4, width=8
        ),
        variants={
            "nonsaturating": {"loss": "nonsaturating"},
            "hinge": {"loss": "hinge"},
            "saturating": {"loss": "saturating"},
            "lsgan": {"loss": "lsgan"},
            "wasserstein": {"loss": "wasserstein", "r1": 0.0, "r2": 0.0, "gp": 10.0, "d_steps": 2},
            "relativistic-average": {"loss": "relativistic-average"},
            "dragan": {"loss": "nonsaturating", "r1": 0.0, "r2": 0.0, "dragan": 10.0},
            "consistency": {"loss": "hinge", "bcr": 10.0},
            "lazy-penalties": {"gp": 1.0, "penalty_every": 4},
            "augmented": {"augment": ("color", "translation", "cutout"), "bcr": 1.0},
            "two-d-steps": {"d_steps": 2},
            "two-g-steps": {"g_steps": 2},
            "unconditional": {"num_classes": 0},
            "no-penalty": {"r1": 0.0, "r2": 0.0},
            "conv": {"network": "conv", "width": 4},
            "dcgan": {"network": "dcgan", "width": 4, "conditioning": "concatenation"},
            "residual": {"network": "residual", "width": 4, "channels_last": True},
            "projection": {"conditioning": "projection"},
            "auxiliary": {"loss": "hinge", "auxiliary": 1.0},
            "spectral-norm": {"loss": "hinge", "network": "dcgan", "width": 4, "spectral_norm": True, "gp": 1.0},
            "adaptive": {"loss": "nonsaturating", "ada": ADA, "ada_start": 0.5, "ada_images": 300.0},
            "fixed-probability": {"ada": ADA, "ada_start": 0.7, "ada_images": 0.0},
            "accumulate": {
                "accumulate": 2,
                "d_steps": 2,
                "g_steps": 2,
                "gp": 1.0,
                "penalty_every": 3,
                "loss": "hinge",
                "augment": ("color", "translation"),
                "ada": ADA,
                "ada_images": 300.0,
                "bcr": 1.0,
                "auxiliary": 0.5,
            },
            "schedules": {"g_schedule": "cosine", "d_schedule": "linear", "warmup_steps": 5, "penalty_every": 2},
        },
        preset=gan.GANConfig(**gan.PRESETS["digits"] | {"steps": 30}),
    ),
    Case(
        name="diffusion",
        module="recipes.diffusion",
        run=run_diffusion,
        config=diffusion.DiffusionConfig(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "batch_size": 6, "width": 8},
            **{"depth": 1, "warmup_steps": 5, "schedule": "constant", "sample_steps": 3},
        ),
        variants={
            "epsilon-linear": {"prediction": "epsilon", "noise_schedule": "linear", "min_snr": 0.0},
            "v": {"prediction": "v", "min_snr": 0.0},
            "v-min-snr": {"prediction": "v", "clip_norm": 0.0},
            "no-self-conditioning": {"self_conditioning": False},
            "unconditional": {"num_classes": 0, "bound": 0.0},
            "ancestral": {"eta": 1.0, "guidance": 0.0},
            "unet": {"network": "unet", "patch": 2},
            "cosine": {"schedule": "cosine", "decay_steps": 20},
        },
        preset=diffusion.DiffusionConfig(**diffusion.PRESETS["digits"] | {"steps": 30}),
    ),
    Case(
        name="classification",
        module="recipes.classification",
        run=run_classification,
        config=ClassificationCase(
            steps=30, log_every=4, validate_every=10, checkpoint_every=8, batch_size=8, width=8, schedule="constant"
        ),
        variants={
            "sam": {"sam": 0.05},
            "sam-accumulated-and-clipped": {"sam": 0.05, "accumulate": 2, "clip_norm": 0.5},
            "mixup": {"mixup": 0.4, "flip": True},
            "ema": {"average": "ema", "average_decay": 0.9},
            "swa": {"average": "swa", "average_start": 9},
            "accumulate": {"accumulate": 2},
            "clip-norm": {"clip_norm": 0.5},
            "one-cycle": {"schedule": "one_cycle"},
            "cosine-with-warmup": {"schedule": "cosine", "warmup_steps": 5, "decay_steps": 20},
            "label-smoothing": {"label_smoothing": 0.1, "optimizer": "sgd"},
            "composite-loss": {"own": "composite-loss", "best": "val/loss/size", "best_mode": "min"},
            "own-loss-and-optimizer": {"own": "loss-and-optimizer"},
            "patience": {"patience": 2, "validate_every": 4, "best": "val/loss", "best_mode": "max"},
            "watched": {"watch_every": 5},
        },
        preset=classification.ClassificationConfig(**classification.PRESETS["digits"] | {"steps": 30}),
    ),
    Case(
        name="adversarial_training",
        module="recipes.adversarial_training",
        run=run_adversarial_training,
        config=adversarial_training.AdversarialTrainingConfig(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "batch_size": 8, "width": 8},
            **{"attack_steps": 2, "step_size": 0.7, "val_attack_steps": 2, "schedule": "constant"},
        ),
        variants={
            "l2": {"norm": "l2", "eps": 0.5},
            "trades": {"loss": "trades"},
            "trades-l2-one-cycle": {"loss": "trades", "norm": "l2", "eps": 0.5, "schedule": "one_cycle"},
            "mart": {"loss": "mart"},
            "fgsm-with-warmup": {"attack_steps": 1, "step_size": 1.25, "eps_warmup": 20},
            "standard": {"attack_steps": 0},
        },
        preset=adversarial_training.AdversarialTrainingConfig(**adversarial_training.PRESETS["digits"] | {"steps": 30}),
    ),
    Case(
        name="maml",
        module="recipes.maml",
        run=run_maml,
        # A meta-batch that two processes do not divide.
        config=MAMLCase(
            steps=30,
            log_every=4,
            validate_every=10,
            checkpoint_every=8,
            meta_batch_size=5,
            width=8,
            shots=3,
            query_shots=4,
            test_steps=2,
            val_tasks=5,
        ),
        variants={
            "first-order": {"first_order": True},
            "three-steps": {"inner_steps": 3},
            "momentum": {"inner_steps": 2, "inner_optimizer": "momentum"},
            "adam": {"inner_steps": 2, "inner_optimizer": "adam"},
            "clipped": {"inner_clip_norm": 0.5},
            "learned-rates": {"learn_inner_lr": True, "inner_steps": 2},
            "head": {"adapt": "head"},
            "body": {"adapt": "body"},
            "frozen": {"frozen": ("0.",)},
            "recomputed": {"checkpoint_inner": True, "inner_steps": 3},
            "exact-reduction": {"exact_reduction": True},
            "stream": {"own": "stream"},
            "images-two-at-once": {**IMAGES, "tasks_at_once": 2, "joint": True},
            "images-one-after-another": {**IMAGES, "task_batching": "loop"},
            "prototypes": {**IMAGES, "proto_head": True},
            "statistics-of-the-support": {**IMAGES, "batch_statistics": "support"},
            "statistics-of-both": {**IMAGES, "batch_statistics": "both"},
        },
        preset=maml.MAMLConfig(**maml.PRESETS["sinusoid"] | {"steps": 30}),
    ),
    Case(
        name="maml_plus_plus",
        module="recipes.maml_plus_plus",
        run=run_maml_plus_plus,
        # A meta-batch that two processes do not divide; one query loss after 15 steps, second order after 9.
        config=MAMLPlusPlusCase(
            steps=30,
            log_every=4,
            validate_every=10,
            checkpoint_every=8,
            meta_batch_size=5,
            width=8,
            shots=3,
            query_shots=4,
            inner_steps=3,
            test_steps=4,
            multi_step_share=0.5,
            first_order_share=0.3,
            val_tasks=5,
        ),
        variants={
            "off": {
                "per_step_rates": False,
                "multi_step_share": 0.0,
                "first_order_share": 0.0,
                "per_step_norm": False,
                "inner_clip_norm": 0.0,
                "schedule": "constant",
            },
            "one-rate": {"per_step_rates": False},
            "second-order": {"first_order_share": 0.0},
            "anneal-steps": {"anneal_steps": 12},
            "loop": {"task_batching": "loop"},
            "two-at-once": {"tasks_at_once": 2},
            "stream": {"own": "stream"},
            "images": NORMED,
            "images-one-after-another": {**NORMED, "task_batching": "loop"},
            "images-one-norm": {**NORMED, "per_step_norm": False},
            "running-statistics": {**NORMED, "statistics": "running"},
            "running-statistics-two-at-once": {**NORMED, "statistics": "running", "tasks_at_once": 2},
        },
        preset=maml_plus_plus.MAMLPlusPlusConfig(**maml_plus_plus.PRESETS["sinusoid"] | {"steps": 30}),
    ),
    Case(
        name="reptile",
        module="recipes.reptile",
        run=run_reptile,
        # A meta-batch that two processes do not divide; passes over a task's samples end inside its minibatches.
        config=ReptileCase(**FEW_SHOT, inner_batch_size=4, test_batch_size=2),
        variants={
            "five-steps": {"inner_steps": 5, "lr": 0.5},
            "constant-rate": {"anneal": False},
            "inner-adam": {"inner_optimizer": "adam", "inner_lr": 0.01},
            "outer-adam": {"own_optimizer": True, "lr": 0.01},
            "stream": {"own": "stream"},
            "images-two-at-once": {"own": "images", "tasks_at_once": 2, "inner_lr": 0.1},
            "images-one-after-another": {"own": "images", "task_batching": "loop", "inner_lr": 0.1},
            "statistics-of-both": {"own": "images", "batch_statistics": "both", "inner_optimizer": "adam"},
        },
        preset=reptile.ReptileConfig(**reptile.PRESETS["sinusoid"] | {"steps": 30}),
    ),
    Case(
        name="imaml",
        module="recipes.imaml",
        run=run_imaml,
        config=IMAMLCase(**FEW_SHOT, cg_steps=2, proximal=2.0, cg_damping=0.0),
        variants={
            "no-solve": {"cg_steps": 0},
            "damped-at-a-large-rate": {"cg_damping": 5.0, "inner_steps": 6, "inner_lr": 2.0},
            "stream": {"own": "stream"},
            "images-two-at-once": {"own": "images", "tasks_at_once": 2, "inner_lr": 0.1},
            "images-one-after-another": {"own": "images", "task_batching": "loop", "inner_lr": 0.1},
            "statistics-of-the-support": {"own": "images", "batch_statistics": "support"},
        },
        preset=imaml.IMAMLConfig(**imaml.PRESETS["sinusoid"] | {"steps": 30}),
    ),
    Case(
        name="multitask",
        module="recipes.multitask",
        run=run_multitask,
        # GradVac remembers something, and draws orders at random.
        config=MultitaskCase(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "batch_size": 8, "width": 2},
            method="gradvac",
            schedule="constant",
        ),
        variants={
            **{
                method: {"method": method, "method_options": MULTITASK_OPTIONS.get(method)}
                for method in get_args(Method)
                if method != "gradvac" and (method != "torchjd" or find_spec("torchjd"))
            },
            "features": {"gradients": "features", "method": "mgda"},
            "features-gradvac-every-third": {"gradients": "features", "method": "gradvac", "aggregate_every": 3},
            "exact-every-third": {"aggregate_every": 3},
            "sets": {"own": "sets"},
            "sets-shortest": {"own": "sets", "sampling": "shortest", "method": "gradnorm"},
            "sets-proportional": {"own": "sets", "sampling": "proportional", "method": "mgda"},
            "sets-temperature": {"own": "sets", "sampling": "temperature", "temperature": 3.0, "method": "gradvac"},
            "sets-ratios": {
                "own": "sets",
                "sampling": "ratios",
                "ratios": {"left": 2, "light": 1},
                "method": "uncertainty",
            },
            "own-optimizer-and-method": {"own": "optimizer-and-method"},
            "head-rates": {"head_lr": {"left": 1e-4, "light": 1e-2}, "schedule": "cosine"},
        },
        preset=multitask.MultitaskConfig(**multitask.PRESETS["digits"] | {"steps": 30, "baselines": None}),
    ),
    Case(
        name="dqn",
        module="recipes.dqn",
        run=run_dqn,
        config=DQNCase(**OFF_POLICY, updates=2, epsilon=0.2, epsilon_steps=100, importance_steps=200),
        variants={
            "double": {"double": True},
            "dueling": {"dueling": True},
            "n-step": {"n_step": 3},
            "prioritised": {"prioritised": True},
            "everything": {"double": True, "dueling": True, "n_step": 3, "prioritised": True, "target_every": 5},
            "dict-observations": {"own": "dict"},
        },
        # With two environments, so that two processes can share them, and one update a step.
        preset=dqn.DQNConfig(
            **dqn.PRESETS["cartpole"]
            | {"steps": 30, "num_envs": 2, "train_every": 4, "updates": 1, "learning_starts": 7}
        ),
    ),
    Case(
        name="sac",
        module="recipes.sac",
        run=run_sac,
        config=sac.SACConfig(**OFF_POLICY),
        variants={
            "fixed-temperature": {"temperature": 0.2},
            "n-step-two-updates": {"n_step": 3, "updates": 2},
            "one-step": {"train_every": 1, "learning_starts": 3},
        },
        preset=sac.SACConfig(**sac.PRESETS["pendulum"] | {"steps": 30, "num_envs": 2, "learning_starts": 7}),
    ),
    Case(
        name="ppo",
        module="recipes.ppo",
        run=run_ppo,
        config=PPOCase(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "width": 8},
            **{"num_envs": 6, "rollout_steps": 8, "epochs": 2, "minibatches": 3, "val_episodes": 3},
        ),
        variants={
            "everything-normalised": {"normalise_observations": True, "normalise_rewards": True, "clip_value": True},
            "continuous": {"env": "Pendulum-v1", "normalise_observations": True, "entropy_coefficient": 0.01},
            "one-trunk": {"shared": True, "normalise_advantages": False},
            "target-kl": {"target_kl": 1e-4, "anneal_lr": False, "anneal_clip": False, "epochs": 4},
            "plain": {"max_grad_norm": 0.0, "gae_decay": 1.0, "greedy": False, "minibatches": 1},
            "choices": {"env": "FrozenLake-v1"},
            "dicts-and-several-choices": {"own": "mixed"},
        },
        # Not 30 steps: in float32 one of 7,680 actions is sooner or later drawn otherwise, and leads elsewhere.
        preset=ppo.PPOConfig(**ppo.PRESETS["cartpole"] | {"steps": 30, "stop_at": 10}),
    ),
    Case(
        name="recurrent_ppo",
        module="recipes.recurrent_ppo",
        run=run_recurrent_ppo,
        # Minibatches of three environments, which two processes do not divide.
        config=RecurrentPPOCase(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "width": 8},
            **{"num_envs": 6, "rollout_steps": 8, "epochs": 2, "minibatches": 2, "val_episodes": 3},
        ),
        variants={
            "lstm": {"cell": "lstm"},
            "no-memory": {"memory": False},
            "continuous-and-truncated": {"env": "Pendulum-v1", "hide": (2,), "entropy_coefficient": 0.01},
            "plain": {"max_grad_norm": 0.0, "gae_decay": 1.0, "greedy": False, "anneal_lr": False, "minibatches": 1},
            "rewards-as-they-are": {"normalise_rewards": False, "env": "FrozenLake-v1", "hide": ()},
            "dicts-and-several-choices": {"own": "mixed"},
        },
        # Not 30 steps, for the reason of ppo's.
        preset=recurrent_ppo.RecurrentPPOConfig(**recurrent_ppo.PRESETS["cartpole"] | {"steps": 30, "stop_at": 10}),
    ),
    Case(
        name="reinforce",
        module="recipes.reinforce",
        run=run_reinforce,
        # A number of episodes that two processes do not divide.
        config=reinforce.ReinforceConfig(
            **{"steps": 30, "log_every": 4, "validate_every": 10, "checkpoint_every": 8, "width": 8},
            **{"episodes": 3, "val_episodes": 3, "env": "FrozenLake-v1"},
        ),
        variants={
            "no-baseline": {"baseline": False},
            "plain": {"normalise_advantages": False, "max_grad_norm": 0.0, "entropy_coefficient": 0.01},
            "continuous-and-truncated": {"env": "MountainCarContinuous-v0", "steps": 12},
        },
        preset=reinforce.ReinforceConfig(**reinforce.PRESETS["cartpole"] | {"steps": 30}),
    ),
]
