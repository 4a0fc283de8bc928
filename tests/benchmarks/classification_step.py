"""A step of recipes.classification against raw PyTorch, bare Fabric, Lightning's Trainer and Hugging Face accelerate.

    python -m tests.benchmarks.classification_step

The recipe is ``recipes.classification.train`` itself: metrics, logging, progress bar, schedule, stop check. The two
peers do the same as their users write it: accuracy, macro precision, recall and F1 of the training batches by
torchmetrics, means of 50 steps to TensorBoard, a bar as on a terminal. Raw PyTorch and bare Fabric only train.

All have the same network, optimizer, batch size and data in memory, one pass of it. Where there was a choice the peers
got the faster: whole batches are indexed at once, metrics are updated in each step and computed once in 50 (a metric's
``forward``, which Lightning's pages show, computes in each), and no deterministic algorithms, under which torchmetrics
counts by a slower way. The clock is in the network: from one forward pass to the one 100 steps later, two
rows of metrics between them, so construction, the first steps and what follows the last are left out for all alike.
``test_classification_step.py`` proves that all do the same work. A peer that is not installed is left out.
"""

import gc
import importlib.metadata
import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from tqdm import tqdm

from lightning_custom.launch import launch, make_deterministic
from lightning_custom.networks import ConvClassifier
from recipes.classification import ClassificationConfig, default_optimizer, train
from tests.benchmarks import layer_overhead
from tests.benchmarks.interleave import Contender, Result, interleave, machine, quiet, table

CLASSES = 10
LOG_EVERY = 50
WARM_UP, MEASURED = 25, 100
"""Steps before the clock starts, and steps that it runs."""
RECIPE, BARE = "recipes.classification", "bare Fabric"
TARGET = 1.02
ROUNDS = 11


@dataclass(frozen=True)
class Task:
    """What every contender trains, for one pass over ``data``."""

    network: Callable[[], nn.Module]
    data: TensorDataset
    batch_size: int

    @property
    def steps(self) -> int:
        return len(self.data) // self.batch_size

    def config(self, run_dir: str | None = None) -> ClassificationConfig:
        """The recipe's defaults, but images are not shifted, and the learning rate set in each step is the same."""
        return ClassificationConfig(
            steps=self.steps, batch_size=self.batch_size, log_every=LOG_EVERY, validate_every=0, checkpoint_every=0,
            schedule="constant", shift=0, run_dir=run_dir, accelerator="cpu", devices=1, threads=1,
        )  # fmt: skip

    def optimizer(self, model: nn.Module) -> Optimizer:
        return default_optimizer(self.config())(model.parameters())

    def batches(self) -> Iterator[list[Tensor]]:
        """Shuffled batches by the shortest way."""
        for index in torch.randperm(len(self.data)).split(self.batch_size):
            yield [tensor.index_select(0, index) for tensor in self.data.tensors]

    def loader(self) -> "DataLoader[list[Tensor]]":
        """Shuffled batches from a loader that indexes a batch at once."""
        whole = WholeBatches(*self.data.tensors)
        return DataLoader(whole, self.batch_size, shuffle=True, collate_fn=lambda batch: batch)


class WholeBatches(TensorDataset):
    """Gives a loader a batch in one piece."""

    def __getitems__(self, index: list[int]) -> list[Tensor]:
        return [tensor[index] for tensor in self.tensors]


class Clocked(nn.Module):
    """A network that notes when each of its forward passes in training begins."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.times: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.times.append(time.perf_counter())
        return self.network(inputs)


Loop = Callable[[Task, nn.Module, str], object]
"""Trains the network on the task; what it logs goes into the folder."""


def raw_loop(task: Task, model: nn.Module, folder: str) -> None:
    optimizer = task.optimizer(model)
    for inputs, labels in task.batches():
        loss = cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fabric_loop(task: Task, model: nn.Module, folder: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, task.optimizer(model))
    for inputs, labels in task.batches():
        loss = cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()


def recipe_loop(task: Task, model: nn.Module, folder: str) -> None:
    config = task.config(folder)
    held_out = TensorDataset(*(tensor[:64] for tensor in task.data.tensors))
    train(launch(config), config, model=model, train_data=task.data, val_data=held_out, num_classes=CLASSES)


def training_metrics() -> MetricCollection:
    """The scores that the recipe logs, by torchmetrics; the last three share their counts."""
    return MetricCollection(
        {
            "train/accuracy": MulticlassAccuracy(CLASSES, average="micro"),
            "train/precision": MulticlassPrecision(CLASSES),
            "train/recall": MulticlassRecall(CLASSES),
            "train/f1": MulticlassF1Score(CLASSES),
        }
    )


class Classifier(LightningModule):
    """The task as a user of Lightning's Trainer writes it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model, self.metrics = task, model, training_metrics()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        logits = self.model(inputs)
        loss = cross_entropy(logits, labels)
        self.metrics.update(logits.detach(), labels)
        self.log("train/loss", loss, prog_bar=True)
        if (index + 1) % LOG_EVERY == 0:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.task.optimizer(self.model)


def trainer_loop(task: Task, model: nn.Module, folder: str) -> None:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=TensorBoardLogger(folder), log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(task, model), task.loader())


def accelerate_loop(task: Task, model: nn.Module, folder: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("run")
    model, optimizer, loader = accelerator.prepare(model, task.optimizer(model), task.loader())
    metrics, total, bar = training_metrics(), torch.zeros(()), tqdm(total=task.steps)
    for step, (inputs, labels) in enumerate(loader, start=1):
        logits = model(inputs)
        loss = cross_entropy(logits, labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        metrics.update(logits.detach(), labels)
        bar.update()
        if step % LOG_EVERY == 0:
            scores = {name: value.item() for name, value in metrics.compute().items()}
            accelerator.log({"train/loss": total.item() / LOG_EVERY, **scores}, step=step)
            metrics.reset()
            total.zero_()
    bar.close()
    accelerator.end_training()


HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None
PEERS: dict[str, Loop] = {
    "Lightning Trainer": trainer_loop,
    **({"Hugging Face accelerate": accelerate_loop} if HAS_ACCELERATE else {}),
}
LOOPS: dict[str, Loop] = {BARE: fabric_loop, RECIPE: recipe_loop, "raw PyTorch": raw_loop, **PEERS}


def run(loop: Loop, task: Task, folder: str) -> Clocked:
    """Train a fresh network by ``loop``, in silence."""
    torch.manual_seed(0)
    model = Clocked(task.network())
    make_deterministic(False)
    gc.collect()  # what the round before left is not this one's to pay for
    logging.disable(logging.WARNING)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(task, model, folder)
    logging.disable(logging.NOTSET)
    return model


def contender(loop: Loop, task: Task, seconds: list[float]) -> Contender:
    """A round of ``loop``; what it takes is also kept in ``seconds``."""

    def once() -> float:
        with tempfile.TemporaryDirectory() as folder:
            times = run(loop, task, folder).times
        seconds.append((times[WARM_UP + MEASURED] - times[WARM_UP]) / MEASURED)
        return seconds[-1]

    return once


def compare(task: Task, rounds: int, target: float | None = None) -> tuple[list[Result], dict[str, float]]:
    """Everything against bare Fabric, and the median over rounds of the recipe's time by each peer's."""
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    contenders = {name: contender(loop, task, seconds[name]) for name, loop in LOOPS.items()}
    results = interleave(contenders, rounds, targets={} if target is None else {RECIPE: target})
    counted = {name: own[-rounds:] for name, own in seconds.items()}
    return results, {
        peer: median(own / other for own, other in zip(counted[RECIPE], counted[peer], strict=True)) for peer in PEERS
    }


def noise(batch_size: int, shape: tuple[int, ...], steps: int = WARM_UP + MEASURED + 1) -> TensorDataset:
    """As many samples as ``steps`` batches take, with labels."""
    generator, count = torch.Generator().manual_seed(0), steps * batch_size
    return TensorDataset(
        torch.randn(count, *shape, generator=generator), torch.randint(CLASSES, (count,), generator=generator)
    )


def comparison_table(title: str, task: Task, rounds: int, target: float | None = None) -> str:
    """One network's comparison as lines of text."""
    results, by_peer = compare(task, rounds, target)
    verdicts = [
        f"  {f'{RECIPE} by {peer}':<52} {ratio:7.3f} {'':>23}  1.00 {'met' if ratio < 1 else 'MISSED'}"
        for peer, ratio in by_peer.items()
    ]
    return "\n".join([table(title, results), *verdicts])


def versions() -> str:
    """The versions of what is compared."""
    names = ["lightning", "torchmetrics", *(["accelerate"] if HAS_ACCELERATE else [])]
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return found if HAS_ACCELERATE else f"{found}; accelerate is not installed and left out (pip install accelerate)"


def report(rounds: int = ROUNDS) -> str:
    """Both networks' comparisons, and the versions."""
    torch.set_num_threads(1)
    size = layer_overhead.batch_size_for(layer_overhead.STEP_SECONDS)
    wide = Task(layer_overhead.network, noise(size, (784,)), size)
    digits = Task(lambda: ConvClassifier(1, 8, CLASSES), noise(64, (1, 8, 8)), 64)
    return "\n".join(
        [
            comparison_table(f"classification, MLP of width 256, batch {size}", wide, rounds, TARGET),
            comparison_table("classification, network of digits, batch 64", digits, rounds),
            versions(),
        ]
    )


if __name__ == "__main__":
    print(report())
    print(machine())
