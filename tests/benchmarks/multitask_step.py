"""One update of recipes.multitask against plain PyTorch, TorchJD and LibMTL, with the same networks and batch.

    python -m tests.benchmarks.multitask_step
    python -m tests.benchmarks.multitask_step --parts features inputs backward memory --rounds 9
    python -m tests.benchmarks.multitask_step --cells "LeNet, 2 tasks: mgda" --rounds 40       # of the part exact

An update is forward passes, gradients, aggregator and a step of Adam. Ours is what the recipe calls, label masks
included. TorchJD has one backward pass a task; its default of all at once, ``vmap``, is beside it in the parts inputs,
backward and memory. LibMTL 1.1.5 is its own weighting classes under the loop of its trainer, which is bound to CUDA;
what it needs of an older torchvision and torch is stood in for. ``test_multitask_step.py`` proves that all move the
same way.
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.profiler import profile

from lightning_custom.distributed import mean_gradients_
from lightning_custom.multitask.methods import make_method
from lightning_custom.multitask.task_losses import task_losses
from lightning_custom.multitask.weighting import Weighting
from lightning_custom.networks import LeNetTrunk, mlp_head
from lightning_custom.testing import single_process
from recipes import multitask
from tests.benchmarks.interleave import Contender, Result, interleave, machine, stopwatch, table

OURS, PLAIN = "recipes.multitask", "equal weighting, plain PyTorch"
ROUNDS = 7
EXACT_TARGET, FEATURES_TARGET, INPUTS_TARGET = 1.05, 1.1, 4
SIZE, FEATURES, CLASSES = 36, 50, 10


class ResidualTrunk(nn.Module):
    """Seven convolutions, six of them in three residual blocks, without normalisation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.last = nn.Linear(width * 16, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        """Features for images."""
        found = self.stem(images).relu()
        for block in self.blocks:
            found = (found + block(found)).relu()
        return self.last(nn.functional.adaptive_avg_pool2d(found, 4).flatten(1)).relu()  # type: ignore[no-any-return]


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet": lambda: LeNetTrunk(1, SIZE, features=FEATURES),
    "ResNet": ResidualTrunk,
}


@dataclass(frozen=True)
class Problem:
    """A trunk, a number of tasks, and a batch of noise: one for all tasks, or one a task."""

    trunk: str
    num_tasks: int
    batch_size: int = 256
    apart: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(f"task{i}" for i in range(self.num_tasks))

    def networks(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Trunk and heads, the same at each call."""
        torch.manual_seed(0)
        return TRUNKS[self.trunk](), {task: mlp_head(FEATURES, CLASSES) for task in self.tasks}

    def batch(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and labels of each task; without ``apart`` the images are one tensor."""
        draw = torch.Generator().manual_seed(1)
        shared = torch.randn(self.batch_size, 1, SIZE, SIZE, generator=draw)
        return {
            task: (
                torch.randn(self.batch_size, 1, SIZE, SIZE, generator=draw) if self.apart else shared,
                torch.randint(CLASSES, (self.batch_size,), generator=draw),
            )
            for task in self.tasks
        }

    def __str__(self) -> str:
        return f"{self.trunk}, {self.num_tasks} tasks{', a batch each' if self.apart else ''}"


Update = Callable[[], None]
"""One update; the direction stays in the trunk's gradient."""
Built = tuple[nn.Module, Update]


def ours(problem: Problem, method: str, **fields: Any) -> Built:
    """What the recipe does."""
    trunk, heads = problem.networks()
    fabric, batch = single_process(), problem.batch()
    config = multitask.MultitaskConfig(steps=10**9, log_every=10**9, method=cast("Any", method), **fields)
    how = make_method(method, problem.tasks)
    module = fabric.setup_module(trunk)
    modules: dict[str, nn.Module] = {task: fabric.setup_module(head) for task, head in heads.items()}
    optimizer = fabric.setup_optimizers(Adam(parameters_of(trunk, heads), fused=True))
    state = multitask.MultitaskState(
        trunk=module, heads=modules, method=None, weights=torch.ones(problem.num_tasks, dtype=torch.float64),
        optimizer=cast("Any", optimizer), batches=cast("Any", None), scores=cast("Any", None),
        metrics=cast("Any", None), step=1,
    )  # fmt: skip
    shared = list(trunk.parameters())
    losses = dict.fromkeys(problem.tasks, multitask.sample_entropies)
    images = next(iter(batch.values()))[0]
    given: Any = batch if problem.apart else (images, {task: labels for task, (_, labels) in batch.items()})
    generator = torch.Generator().manual_seed(0)

    def update() -> None:
        state.optimizer.zero_grad()
        passes = multitask.forward(fabric, state, given, cut=not isinstance(how, Weighting))
        found = task_losses(fabric, losses, passes.outputs, passes.targets)
        if isinstance(how, Weighting):
            fabric.backward(how(found.local, found.means, generator, found.present))
            mean_gradients_(fabric, module, *modules.values())
        else:
            fabric.backward(found.local.sum())
            mean_gradients_(fabric, *modules.values())
            multitask.backward_through_trunk(
                fabric, config, state, how, passes, found.present, shared, generator
            )  # fmt: skip
        state.optimizer.step()

    return trunk, update


def parameters_of(trunk: nn.Module, heads: dict[str, nn.Module]) -> list[nn.Parameter]:
    """Of everything."""
    return [*trunk.parameters(), *(parameter for head in heads.values() for parameter in head.parameters())]


def forward_of(
    problem: Problem, trunk: nn.Module, heads: dict[str, nn.Module]
) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
    """Losses of all tasks, and the features that they come from: one tensor, or one a task."""
    batch = problem.batch()

    def forward() -> tuple[list[Tensor], list[Tensor]]:
        if problem.apart:
            features = [trunk(images) for images, _ in batch.values()]
            by_task = features
        else:
            features = [trunk(next(iter(batch.values()))[0])]
            by_task = features * problem.num_tasks
        seen = zip(by_task, batch.items(), strict=True)
        return [cross_entropy(heads[task](part), labels) for part, (task, (_, labels)) in seen], features

    return forward


def plain(problem: Problem) -> Built:
    """Equal weighting as anybody would write it."""
    trunk, heads = problem.networks()
    optimizer, forward = Adam(parameters_of(trunk, heads), fused=True), forward_of(problem, trunk, heads)

    def update() -> None:
        optimizer.zero_grad()
        torch.stack(forward()[0]).sum().backward()
        optimizer.step()

    return trunk, update


def torchjds(method: str, num_tasks: int) -> Any:
    """TorchJD's aggregator; ImportError where its solver is not installed."""
    import torchjd.aggregation as of

    made: dict[str, Callable[[], Any]] = {
        "pcgrad": of.PCGrad, "graddrop": of.GradDrop, "mgda": of.MGDA, "cagrad": lambda: of.CAGrad(c=0.4),
        "upgrad": of.UPGrad, "dualproj": of.DualProj, "imtl-g": of.IMTLG, "config": of.ConFIG,
        "nash-mtl": lambda: of.NashMTL(n_tasks=num_tasks), "aligned-mtl": of.AlignedMTL,
    }  # fmt: skip
    return made[method]()


def with_torchjd(problem: Problem, method: str, *, chunk: int | None) -> Built:
    """As in its multi-task example."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    trunk, heads = problem.networks()
    optimizer, forward = Adam(parameters_of(trunk, heads), fused=True), forward_of(problem, trunk, heads)
    aggregator, own = torchjds(method, problem.num_tasks), [list(head.parameters()) for head in heads.values()]
    shared = list(trunk.parameters())

    def update() -> None:
        optimizer.zero_grad()
        losses, features = forward()
        mtl_backward(losses, features, tasks_params=own, shared_params=shared, parallel_chunk_size=chunk)
        jac_to_grad(shared, aggregator)
        optimizer.step()

    return trunk, update


LIBMTL = {"pcgrad": ("PCGrad", {}), "mgda": ("MGDA", {"mgda_gn": "none"}), "imtl-g": ("IMTL", {})}
"""What version 1.1.5 has by the trunk's parameters; its CAGrad is for three tasks, its GradDrop for features."""


@cache
def libmtl() -> Any:
    """The package, which imports a loader that torchvision no longer has."""
    names = ("torchvision", "torchvision.models", "torchvision.models.utils")
    stand_ins: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    stand_ins[names[-1]].load_state_dict_from_url = None
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(stand_ins)
    try:
        import LibMTL
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return LibMTL


def with_libmtl(problem: Problem, method: str) -> Built:
    """Its model, as its trainer puts it together, and the loop of its trainer."""
    package, (name, options) = libmtl(), LIBMTL[method]
    trunk, heads = problem.networks()
    weighting = getattr(package.weighting, name)

    class Model(package.architecture.HPS, weighting):  # type: ignore[misc, name-defined]
        """With the default that torch had at its time."""

        def zero_grad_share_params(self) -> None:
            self.encoder.zero_grad(set_to_none=False)

    tasks = list(problem.tasks)
    model = Model(tasks, lambda: trunk, nn.ModuleDict(heads), False, problem.apart, torch.device("cpu"))
    model.init_param()
    optimizer, batch = Adam(model.parameters(), fused=True), problem.batch()

    def update() -> None:
        losses = torch.zeros(len(tasks))
        if problem.apart:
            for i, (task, (images, labels)) in enumerate(batch.items()):
                losses[i] = cross_entropy(model(images, task)[task], labels)
        else:
            outputs = model(next(iter(batch.values()))[0])
            for i, (task, (_, labels)) in enumerate(batch.items()):
                losses[i] = cross_entropy(outputs[task], labels)
        optimizer.zero_grad()
        model.backward(losses, **options)
        optimizer.step()

    return trunk, update


def has(package: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(package) is not None


METHODS = (
    "pcgrad", "mgda", "cagrad", "imtl-g", "nash-mtl", "aligned-mtl", "upgrad", "dualproj", "graddrop", "config",
)  # fmt: skip


def updates(problem: Problem, method: str) -> dict[str, Built]:
    """Everybody's network and update; a peer that is not installed, or lacks the method, is left out."""
    found = {OURS: ours(problem, method)}
    if has("torchjd"):
        try:
            found["TorchJD"] = with_torchjd(problem, method, chunk=1)
            found["TorchJD, vmap"] = with_torchjd(problem, method, chunk=None)
        except ImportError:
            pass
    if has("LibMTL") and method in LIBMTL:
        found["LibMTL"] = with_libmtl(problem, method)
    return found


def contender(update: Update, repeats: int) -> Contender:
    """A round of ``update``."""

    def work() -> None:
        for _ in range(repeats):
            update()

    return stopwatch(work, repeats, time.perf_counter)


def compare(found: dict[str, Built], rounds: int, repeats: int = 1) -> list[Result]:
    """Everybody in turn; ratios are by the first."""
    return interleave({name: contender(update, repeats) for name, (_, update) in found.items()}, rounds)


def verdict(is_met: bool) -> str:
    """The word for it."""
    return "met" if is_met else "MISSED"


def exact_report(rounds: int, cells: Sequence[str] | None = None) -> str:
    """One batch for all tasks, each method: our time by the fastest peer's; ``cells`` are "PROBLEM: METHOD", or all."""
    lines = [
        f"{'exact, one batch for all tasks':<26} {'ours ms':>8} {'TorchJD':>8} {'LibMTL':>8}  "
        f"ours / fastest peer (quartiles), target {EXACT_TARGET}"
    ]
    for problem in shared_problems():
        lines.append(f"  {problem}")
        for method in METHODS:
            if cells is not None and f"{problem}: {method}" not in cells:
                continue
            found = {name: built for name, built in updates(problem, method).items() if "vmap" not in name}
            results = {result.name: result for result in compare(found, rounds)}
            peers = {name: result.ratio for name, result in results.items() if name != OURS}
            times = [
                f"{results[name].seconds * 1e3:8.1f}" if name in results else f"{'-':>8}"
                for name in (OURS, "TorchJD", "LibMTL")
            ]
            ending = "no peer installed"
            if peers:
                fastest = min(peers, key=peers.__getitem__)
                ratio, (lower, upper) = 1 / peers[fastest], results[fastest].ratio_quartiles
                spread = f"({1 / upper:.2f} to {1 / lower:.2f})"
                ending = f"{ratio:.3f} {spread} {verdict(ratio <= EXACT_TARGET)}"
            lines.append(f"    {method:<22} {' '.join(times)}  {ending}")
    return "\n".join(lines)


def shared_problems() -> Iterator[Problem]:
    """Of one batch for all tasks."""
    for trunk in TRUNKS:
        for num_tasks in (2, 8):
            yield Problem(trunk, num_tasks)


def features_report(rounds: int) -> str:
    """Gradients by the features against equal weighting."""
    lines = []
    for problem in shared_problems():
        found = {PLAIN: plain(problem), f"{OURS}, equal": ours(problem, "equal")}
        for method in ("mgda", "upgrad"):
            found[f"{OURS}, {method}, features"] = ours(problem, method, gradients="features")
        results = compare(found, rounds, repeats=2)
        worst = max(result.ratio for result in results[2:])
        lines.append(table(f"{problem}, features", results))
        lines.append(f"  largest ratio {worst:.3f}, target {FEATURES_TARGET}: {verdict(worst <= FEATURES_TARGET)}")
    return "\n".join(lines)


def inputs_report(rounds: int) -> str:
    """A batch a task, 8 tasks, exact surgery: peers' time by ours."""
    lines = []
    for trunk in TRUNKS:
        problem = Problem(trunk, 8, apart=True)
        found = updates(problem, "pcgrad")
        results = compare(found | {PLAIN: plain(problem)}, rounds)
        lines.append(table(f"{problem}, pcgrad", results))
        peers = [result.ratio for result in results[1:] if result.name != PLAIN]
        if peers:
            least = min(peers)
            lines.append(f"  smallest margin {least:.2f}, target {INPUTS_TARGET}: {verdict(least >= INPUTS_TARGET)}")
    return "\n".join(lines)


def backward_report(rounds: int) -> str:
    """One backward pass a task against all at once: the ground of ``batched_backward: auto``."""
    lines = []
    for problem in shared_problems():
        found = {
            "one after another": ours(problem, "upgrad", batched_backward=False),
            "batched": ours(problem, "upgrad", batched_backward=True),
        } | {name: built for name, built in updates(problem, "upgrad").items() if name != OURS}
        lines.append(table(f"{problem}, backward", compare(found, rounds)))
    return "\n".join(lines)


def memory_report(rounds: int) -> str:
    """The most memory of an update beyond what was there before, by torch's own count of its allocations."""
    lines = []
    for problem in shared_problems():
        found = {
            "one after another": ours(problem, "pcgrad"),
            "batched": ours(problem, "pcgrad", batched_backward=True),
            **{name: built for name, built in updates(problem, "pcgrad").items() if "TorchJD" in name},
            PLAIN: plain(problem),
        }
        lines.append(f"{problem}, memory, MiB")
        lines += [f"  {name:<48} {peak_memory(update) / 2**20:9.1f}" for name, (_, update) in found.items()]
    return "\n".join(lines)


def peak_memory(update: Update) -> int:
    """Bytes that the second call of ``update`` takes at most."""
    update()
    with profile(profile_memory=True) as profiler:
        update()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


PARTS = {
    "exact": exact_report,
    "features": features_report,
    "inputs": inputs_report,
    "backward": backward_report,
    "memory": memory_report,
}


def report(parts: Sequence[str] = tuple(PARTS), rounds: int = ROUNDS) -> str:
    """The parts asked for, as text, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [PARTS[part](rounds) for part in parts]
    missing = [name for name in ("torchjd", "LibMTL") if not has(name)]
    if missing:
        found.append(f"not installed: {', '.join(missing)}")
    found.append(machine())
    torch.set_num_threads(threads)
    return "\n".join(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cells", nargs="+", help="of the part exact, as in 'LeNet, 2 tasks: mgda'")
    arguments = parser.parse_args()
    if arguments.cells:
        torch.set_num_threads(1)
        print(exact_report(arguments.rounds, arguments.cells), machine(), sep="\n")
    else:
        print(report(arguments.parts, arguments.rounds))
