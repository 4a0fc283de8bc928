"""The test samples that this package's attacks leave right, against torchattacks' (Kim 2020), if installed.

    python -m tests.benchmarks.attack_strength RUN_DIR

torchattacks' APGD (Croce and Hein 2020, cross-entropy and targeted) and Square are the independent reference: gradient
masking, or a weak attack of our own, would show as a model that looks more robust here than there.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_custom.adversarial import frozen
from lightning_custom.attacks import Ball, pgd_with_restarts, square_search
from lightning_custom.checkpoint import load_module
from lightning_custom.evaluation import evaluating
from lightning_custom.run import config_of_run
from recipes.adversarial_training import AdversarialTrainingConfig, load_data, network


def compare(run_dir: str) -> dict[str, float]:
    """The accuracy of the run's best checkpoint under each attack."""
    import torchattacks

    config = config_of_run(AdversarialTrainingConfig, run_dir)
    _, _, data = load_data(config)
    model = network(config, data).eval()
    model.load_state_dict(load_module(run_dir, "model"))
    ball, draw = Ball(config.norm, config.eps), torch.Generator().manual_seed(0)
    norm = {"linf": "Linf", "l2": "L2"}[config.norm]
    inputs, labels = data.images, data.labels
    given = {"norm": norm, "eps": config.eps, "seed": 0}
    attacks: dict[str, Callable[[], Tensor]] = {
        "clean": lambda: inputs,
        "PGD-50 from 10 starts": lambda: pgd_with_restarts(
            model, inputs, labels, ball, steps=50, step_size=config.eps / 20, restarts=10, generator=draw
        ),
        "search, 500 queries": lambda: square_search(model, inputs, labels, ball, queries=500, generator=draw),
        "torchattacks APGD-CE-50": lambda: torchattacks.APGD(model, steps=50, n_restarts=1, **given)(inputs, labels),
        "torchattacks APGD-T-50": lambda: torchattacks.APGDT(model, steps=50, n_classes=10, **given)(inputs, labels),
        "torchattacks Square-500": lambda: torchattacks.Square(model, n_queries=500, **given)(inputs, labels),
    }
    found = {}
    with frozen(model):
        for name, attack in attacks.items():
            points = ball.project(inputs, attack().detach())
            with evaluating(model):
                found[name] = float((model(points).argmax(1) == labels).double().mean())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, accuracy in compare(sys.argv[1]).items():
        print(f"{name:<26} {accuracy:.2%}", flush=True)
