"""A step of recipes.adversarial_training against raw PyTorch with the usual attack, and with torchattacks'.

    python -m tests.benchmarks.adversarial_step

The recipe is ``recipes.adversarial_training.train`` itself, with metrics, progress bar, schedule and stop check. The
raw loops only train, on the same network, optimizer, batch size and attack steps. The usual attack calls ``backward``,
which computes the parameters' gradients too and throws them away. The clock is in the network: from one forward pass to
the one 20 steps later. A second table has the attack's gradient alone. torchattacks (Kim 2020) is left out where it is
not installed.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from lightning_custom.adversarial import frozen
from lightning_custom.networks import ConvClassifier
from lightning_custom.testing import single_process
from recipes.adversarial_training import AdversarialTrainingConfig, load_data, train
from tests.benchmarks.interleave import Contender, interleave, machine, quiet, stopwatch, table

WARM_UP, MEASURED, ROUNDS = 3, 20, 7
CONFIG = AdversarialTrainingConfig(
    steps=WARM_UP + MEASURED + 1, log_every=10, validate_every=0, checkpoint_every=0, schedule="constant"
)

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Timed(nn.Module):
    """The network, with the time of each forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = ConvClassifier(1, 8, 10, width)
        self.times: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return self.network(inputs)  # type: ignore[no-any-return]

    def seconds(self, config: AdversarialTrainingConfig) -> float:
        passes = config.attack_steps + 1
        return (self.times[(WARM_UP + MEASURED) * passes] - self.times[WARM_UP * passes]) / MEASURED


def usual_attack(config: AdversarialTrainingConfig) -> Attack:
    """PGD as example scripts have it."""

    def attack(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        delta = torch.empty_like(inputs).uniform_(-config.eps, config.eps)
        delta = ((inputs + delta).clamp(0, 1) - inputs).requires_grad_()
        for _ in range(config.attack_steps):
            cross_entropy(model(inputs + delta), labels).backward()
            assert delta.grad is not None
            moved = (delta.data + config.step_size * config.eps * delta.grad.sign()).clamp(-config.eps, config.eps)
            delta.data = (inputs + moved).clamp(0, 1) - inputs
            delta.grad.zero_()
        return (inputs + delta).detach()

    return attack


def torchattacks_attack(config: AdversarialTrainingConfig) -> Attack:
    """The same by torchattacks."""
    import torchattacks

    def attack(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        alpha = config.step_size * config.eps
        pgd = torchattacks.PGD(model, eps=config.eps, alpha=alpha, steps=config.attack_steps, random_start=True)
        return pgd(inputs, labels)  # type: ignore[no-any-return]

    return attack


def raw_loop(config: AdversarialTrainingConfig, attack: Attack) -> Timed:
    """Train in raw PyTorch with ``attack``."""
    data, _, _ = load_data(config)
    model = Timed(config.width)
    optimizer = AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    for step in range(config.steps):
        index = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(step))[: config.batch_size]
        inputs, labels = data.images[index], data.labels[index]
        perturbed = attack(model, inputs, labels)
        optimizer.zero_grad()
        cross_entropy(model(perturbed), labels).backward()
        optimizer.step()
    return model


def recipe(config: AdversarialTrainingConfig) -> Timed:
    """Train by the recipe."""
    data, _, _ = load_data(config)
    model = Timed(config.width)
    with tempfile.TemporaryDirectory() as folder, quiet():
        fields = {**vars(config), "run_dir": folder}
        train(
            single_process(), AdversarialTrainingConfig(**fields), model=model, dataset=data.dataset(), num_classes=10
        )
    return model


def loops(config: AdversarialTrainingConfig) -> dict[str, Callable[[], Timed]]:
    """The contenders, the reference first."""
    found: dict[str, Callable[[], Timed]] = {
        "raw PyTorch, backward in the attack": lambda: raw_loop(config, usual_attack(config))
    }
    if importlib.util.find_spec("torchattacks"):
        found["raw PyTorch, torchattacks.PGD"] = lambda: raw_loop(config, torchattacks_attack(config))
    return found | {"recipes.adversarial_training": lambda: recipe(config)}


def gradients(config: AdversarialTrainingConfig) -> dict[str, Contender]:
    """The attack's gradient alone, three ways."""
    model = Timed(config.width)
    inputs = torch.rand(config.batch_size, 1, 8, 8)
    labels = torch.arange(config.batch_size) % 10

    def loss(points: Tensor) -> Tensor:
        return cross_entropy(model(points), labels)

    def backward() -> None:
        loss(inputs.clone().requires_grad_()).backward()

    def of_inputs() -> None:
        points = inputs.clone().requires_grad_()
        torch.autograd.grad(loss(points), points)

    def of_inputs_frozen() -> None:
        with frozen(model):
            of_inputs()

    def repeated(work: Callable[[], None]) -> Contender:
        return stopwatch(lambda: [work() for _ in range(MEASURED)], MEASURED, time.perf_counter)

    return {
        "backward": repeated(backward),
        "autograd.grad": repeated(of_inputs),
        "autograd.grad, parameters frozen": repeated(of_inputs_frozen),
    }


def report() -> str:
    """Both tables."""
    torch.set_num_threads(1)
    contenders = {name: (lambda run=run: run().seconds(CONFIG)) for name, run in loops(CONFIG).items()}
    return "\n".join(
        [
            table("a step of adversarial training", interleave(contenders, ROUNDS)),
            table("a gradient of the attack", interleave(gradients(CONFIG), 2 * ROUNDS)),
        ]
    )


if __name__ == "__main__":
    print(report())
    print(machine())
