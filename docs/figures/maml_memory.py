"""Peak memory of one outer update against inner steps, with and without --checkpoint_inner.

python docs/figures/maml_memory.py        # writes docs/figures/maml-memory.png and prints the numbers
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

STEPS = (1, 2, 5, 10, 20, 50)


def peak_mebibytes(steps: int, recompute: bool) -> float:
    """Of this process after one update: a 20-way 1-shot task of the Omniglot network, second order."""
    import torch
    from lightning.fabric.plugins.precision import Precision

    from lightning_custom.networks import FewShotConvNet
    from lightning_custom.precision import Bare
    from lightning_custom.task_batching import TaskModel, per_task
    from recipes import maml

    torch.manual_seed(0)
    network = FewShotConvNet(20)
    images, labels = torch.rand(1, 20, 1, 28, 28), torch.arange(20).unsqueeze(0)
    config = maml.MAMLConfig(inner_lr=0.1, inner_steps=steps, checkpoint_inner=recompute)
    model = TaskModel(Bare(network, Precision()), together=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total, _ = maml.query_loss(
        model, config, per_task(None), maml.initial_of(network), {}, images, labels, images, labels
    )
    total.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure() -> dict[str, list[float]]:
    """Every case in a process of its own, since a process's peak never falls."""
    found = {}
    for name in ("plain", "checkpoint_inner"):
        commands = [[sys.executable, __file__, name, str(steps)] for steps in STEPS]
        outputs = [subprocess.run(each, check=True, capture_output=True, text=True).stdout for each in commands]
        found[name] = [float(output) for output in outputs]
    return found


def draw(found: dict[str, list[float]], path: Path) -> None:
    """The two curves."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for name, values in found.items():
        axes.plot(STEPS, values, marker="o", label=name)
    axes.set(xlabel="inner steps", ylabel="MiB above the start", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak_mebibytes(int(sys.argv[2]), sys.argv[1] == "checkpoint_inner"))
    else:
        results = measure()
        print(json.dumps({"steps": STEPS, **results}))
        draw(results, Path(__file__).with_name("maml-memory.png"))
