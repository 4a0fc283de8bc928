"""One outer update of recipes.maml against a plain loop over tasks, higher and torchopt, on the same tasks.

    python -m tests.benchmarks.maml_step
    python -m tests.benchmarks.maml_step --parts sinusoid compiled images processes growth

An update is the outer gradient of a meta-batch and a step of Adam. Ours is :func:`recipes.maml.query_loss`, which the
recipe calls; the row "whole step" adds what surrounds it there: tasks drawn, seeds, metrics, stop check. Compiling is
timed apart. ``test_maml_step.py`` proves that all compute the same gradient.
"""

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam
from torch.utils.flop_counter import FlopCounterMode

from lightning_custom.compiled_gradient import CompiledGradient
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.few_shot import one_after_another
from lightning_custom.launch import launch
from lightning_custom.metrics import STEPS_PER_SECOND, read_rows
from lightning_custom.networks import FewShotConvNet, sinusoid_network
from lightning_custom.precision import Bare, bare
from lightning_custom.task_batching import TaskModel, per_task
from lightning_custom.tasks import Sinusoids
from lightning_custom.testing import in_processes
from recipes import maml
from tests.benchmarks.interleave import Contender, Result, interleave, machine, quiet, stopwatch, table

OURS, NAIVE = "recipes.maml", "a loop over tasks"
ROUNDS = 15
EAGER_TARGET, COMPILED_TARGET, IMAGES_TARGET, PROCESSES_TARGET = 8, 30, 1, 1.25


@dataclass(frozen=True)
class Problem:
    """A network and a meta-batch."""

    network: Callable[[], nn.Module]
    tasks: Sequence[Tensor]
    inner_lr: float
    at_once: int = 0

    def config(self, steps: int, *, first_order: bool) -> maml.MAMLConfig:
        """The recipe's settings for it."""
        return maml.MAMLConfig(
            inner_lr=self.inner_lr, inner_steps=steps, first_order=first_order, meta_batch_size=len(self.tasks[0])
        )


def sinusoids(number: int = 25, shots: int = 10) -> Problem:
    """The tasks and network of Finn et al. 2017, section 5.1."""
    return Problem(sinusoid_network, Sinusoids(shots, shots)(number, torch.Generator().manual_seed(0)), 0.01)


def at_once(problem: Problem) -> bool:
    """What ``--task_batching auto`` chooses on a CPU: 16 images a task are computed one task after another."""
    return problem.tasks[0].dim() < 4 or problem.tasks[0].shape[1] < 16


def torchs_norm(network: nn.Module) -> nn.Module:
    """With torch's own BatchNorm in place of ours, as peers have it."""
    for name, layer in list(network.trunk.named_children()):  # type: ignore[union-attr]
        if "Norm" in type(layer).__name__:
            setattr(network.trunk, name, nn.BatchNorm2d(layer.num_features, track_running_stats=False))
    return network


def images(number: int = 8, ways: int = 5, shots: int = 1) -> Problem:
    """Tasks as Omniglot's, of noise, and its network of width 64."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.rand(number, ways * shots, 1, 28, 28, generator=draw) for _ in range(2)]
    targets = torch.arange(ways).repeat_interleave(shots).repeat(number, 1)
    return Problem(lambda: FewShotConvNet(ways), (inputs[0], targets, inputs[1], targets), 0.1, at_once=8)


def loss_of(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of one task."""
    return mse_loss if targets.is_floating_point() else cross_entropy


Update = Callable[[], None]
"""One outer update; the gradient stays in the network."""


def ours(
    problem: Problem,
    network: nn.Module,
    steps: int,
    *,
    first_order: bool,
    together: bool = True,
    compiled: bool = False,
) -> Update:
    """What the recipe does."""
    config, initial = problem.config(steps, first_order=first_order), dict(network.named_parameters())
    model, optimizer = TaskModel(Bare(network, Precision()), together=together), Adam(network.parameters(), fused=True)
    loss = partial(maml.query_loss, model, config, per_task(None))
    outer_loss = CompiledGradient(loss) if compiled else loss
    weight = 1 / len(problem.tasks[0])

    def update() -> None:
        optimizer.zero_grad()
        for part in one_after_another(problem.tasks, all_at_once=together, largest=problem.at_once):
            total, _ = outer_loss(initial, {}, *part)
            (total * weight).backward()
        optimizer.step()

    return update


def naive(problem: Problem, network: nn.Module, steps: int, *, first_order: bool) -> Update:
    """One task after another, as most code that can be read does, learn2learn's too."""
    optimizer, number = Adam(network.parameters(), fused=True), len(problem.tasks[0])

    def update() -> None:
        optimizer.zero_grad()
        for support_inputs, support_targets, query_inputs, query_targets in zip(*problem.tasks, strict=True):
            loss, parameters = loss_of(query_targets), dict(network.named_parameters())
            for _ in range(steps):
                support_loss = loss(functional_call(network, parameters, (support_inputs,)), support_targets)
                gradients = torch.autograd.grad(support_loss, tuple(parameters.values()), create_graph=not first_order)
                parameters = {
                    name: part - problem.inner_lr * gradient
                    for (name, part), gradient in zip(parameters.items(), gradients, strict=True)
                }
            (loss(functional_call(network, parameters, (query_inputs,)), query_targets) / number).backward()
        optimizer.step()

    return update


def with_higher(problem: Problem, network: nn.Module, steps: int, *, first_order: bool) -> Update:
    """By higher's differentiable optimizers; its first order is left out, since it gives no gradient at the start."""
    import higher

    optimizer, number = Adam(network.parameters(), fused=True), len(problem.tasks[0])
    descent = SGD(network.parameters(), problem.inner_lr)

    def update() -> None:
        optimizer.zero_grad()
        for support_inputs, support_targets, query_inputs, query_targets in zip(*problem.tasks, strict=True):
            loss = loss_of(query_targets)
            with higher.innerloop_ctx(network, descent, copy_initial_weights=False) as (adapted, inner):
                for _ in range(steps):
                    inner.step(loss(adapted(support_inputs), support_targets))
                (loss(adapted(query_inputs), query_targets) / number).backward()
        optimizer.step()

    return update


def with_torchopt(problem: Problem, network: nn.Module, steps: int, *, first_order: bool) -> Update:
    """By torchopt's differentiable optimizers, as in its MAML example."""
    import torchopt

    optimizer, number = Adam(network.parameters(), fused=True), len(problem.tasks[0])
    inner = torchopt.MetaSGD(network, lr=problem.inner_lr)

    def update() -> None:
        optimizer.zero_grad()
        start = torchopt.extract_state_dict(network, by="reference", detach_buffers=True)
        inner_start = torchopt.extract_state_dict(inner)
        for support_inputs, support_targets, query_inputs, query_targets in zip(*problem.tasks, strict=True):
            loss = loss_of(query_targets)
            for _ in range(steps):
                inner.step(loss(network(support_inputs), support_targets))
            (loss(network(query_inputs), query_targets) / number).backward()
            torchopt.recover_state_dict(network, start)
            torchopt.recover_state_dict(inner, inner_start)
        optimizer.step()

    return update


PEERS = {"higher": with_higher, "torchopt": with_torchopt}
INSTALLED = {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(name) is not None}


def updates(problem: Problem, steps: int, *, first_order: bool) -> dict[str, tuple[nn.Module, Update]]:
    """Everybody's network, with the same weights, and update."""

    def fresh(torchs: bool = False) -> nn.Module:
        torch.manual_seed(0)
        network = problem.network()
        return torchs_norm(network) if torchs and hasattr(network, "trunk") else network

    networks = {OURS: fresh(), NAIVE: fresh(True), **{name: fresh(True) for name in INSTALLED}}
    found: dict[str, tuple[nn.Module, Update]] = {
        OURS: (
            networks[OURS],
            ours(problem, networks[OURS], steps, first_order=first_order, together=at_once(problem)),
        ),
        NAIVE: (networks[NAIVE], naive(problem, networks[NAIVE], steps, first_order=first_order)),
    }
    if not first_order:  # they have no first order that leads back to the initial parameters
        found |= {
            name: (networks[name], peer(problem, networks[name], steps, first_order=False))
            for name, peer in INSTALLED.items()
        }
    return found


def contender(update: Update, repeats: int) -> Contender:
    """A round of ``update``."""

    def work() -> None:
        for _ in range(repeats):
            update()

    return stopwatch(work, repeats, time.perf_counter)


def compare(problem: Problem, steps: int, *, first_order: bool, repeats: int, rounds: int) -> list[Result]:
    """Everybody in turn; ratios are by ours."""
    found = updates(problem, steps, first_order=first_order)
    return interleave({name: contender(update, repeats) for name, (_, update) in found.items()}, rounds)


def verdict(results: Sequence[Result], target: float) -> str:
    """Whether every peer takes at least ``target`` times as long as ours."""
    least = min(result.ratio for result in results[1:])
    return f"  slowest margin {least:.2f}, target {target:g}: {'met' if least >= target else 'MISSED'}"


def orders(first_order: bool, steps: int) -> str:
    """The words for a variant."""
    return f"{'first' if first_order else 'second'} order, {steps} inner step{'s' if steps > 1 else ''}"


def sinusoid_report(rounds: int) -> str:
    """Eager, on one thread."""
    lines = []
    for first_order in (False, True):
        for steps in (1, 5):
            results = compare(sinusoids(), steps, first_order=first_order, repeats=3, rounds=rounds)
            lines += [table(f"sinusoids, {orders(first_order, steps)}", results), verdict(results, EAGER_TARGET)]
    return "\n".join([*lines, whole_step(rounds)])


def whole_step(rounds: int) -> str:
    """The recipe's own step, shell included, beside its update."""
    config = maml.MAMLConfig(
        steps=120, log_every=40, validate_every=0, checkpoint_every=0, joint=False, val_tasks=2, accelerator="cpu"
    )
    tasks = Sinusoids(10, 10)

    def recipe() -> float:
        with tempfile.TemporaryDirectory() as folder, quiet():
            fabric = launch(config)
            maml.train(fabric, replace(config, run_dir=folder), model=sinusoid_network(), tasks=tasks)
            rates = [row[STEPS_PER_SECOND] for row in read_rows(folder) if STEPS_PER_SECOND in row]
        return 1 / median(rates[1:])

    update = updates(sinusoids(), 1, first_order=False)[OURS][1]
    results = interleave({OURS: contender(update, 20), "whole step of the recipe": recipe}, rounds)
    return table("sinusoids, second order, 1 inner step", results)


def compiled_report(rounds: int) -> str:
    """Compiled, against peers who are eager, since none of them compiles."""
    lines = []
    for steps in (1, 5):
        problem = sinusoids()
        found = updates(problem, steps, first_order=False)
        torch.manual_seed(0)
        update = ours(problem, problem.network(), steps, first_order=False, compiled=True)
        started = time.perf_counter()
        update()
        seconds = time.perf_counter() - started
        contenders = {"recipes.maml --compile true": contender(update, 20)}
        contenders |= {name: contender(other, 2) for name, (_, other) in found.items() if name != OURS}
        results = interleave(contenders, rounds)
        lines += [table(f"sinusoids, {orders(False, steps)}, compiled in {seconds:.0f} s", results)]
        lines += [verdict(results, COMPILED_TARGET)]
    return "\n".join(lines)


def images_report(rounds: int) -> str:
    """The Omniglot network, on one thread and on all."""
    lines = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for problem, name, steps, first_order in (
            (images(), "5-way 1-shot", 1, False),
            (images(), "5-way 1-shot", 1, True),
            (images(), "5-way 1-shot", 5, False),
            (images(4, 5, 5), "5-way 5-shot", 1, False),
            (images(2, 20, 1), "20-way 1-shot", 5, False),
        ):
            results = compare(problem, steps, first_order=first_order, repeats=1, rounds=rounds)
            title = f"{name}, {orders(first_order, steps)}, {threads} thread(s)"
            lines += [table(title, results), verdict(results, IMAGES_TARGET)]
            if not first_order:
                lines.append(f"  {share_of_peak(problem, steps, results[0].seconds)}")
    return "\n".join(lines)


def share_of_peak(problem: Problem, steps: int, seconds: float) -> str:
    """What the update's multiplications are of the most that this machine was seen to do."""
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        naive(problem, torchs_norm(problem.network()), steps, first_order=False)()
    matrix = torch.rand(1024, 1024)
    peak = 2 * 1024**3 / min(contender(lambda: matrix @ matrix, 1)() for _ in range(20))
    operations = counter.get_total_flops()
    share = operations / seconds / peak
    return f"{operations / 1e9:.2f} GFLOP an update, {share:.0%} of the rate of a matrix product"


def timed_updates(fabric: Fabric, repeats: int) -> float:
    """Seconds of an outer update in which the tasks are shared among the processes."""
    problem = images()
    torch.manual_seed(0)
    network = fabric.setup_module(problem.network())
    optimizer = fabric.setup_optimizers(Adam(network.parameters(), fused=True))
    config = problem.config(1, first_order=False)
    loss = partial(maml.query_loss, TaskModel(bare(fabric, network), together=True), config, per_task(None))
    share, times = [take_share(part, fabric) for part in problem.tasks], []
    for _ in range(repeats + 1):
        fabric.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()  # type: ignore[union-attr]
        total, _ = loss(maml.initial_of(network), {}, *share)
        fabric.backward(total / len(share[0]))
        mean_gradients_(fabric, network)
        optimizer.step()  # type: ignore[union-attr]
        times.append(time.perf_counter() - started)
    return median(times[1:])


def processes_report(rounds: int) -> str:
    """Two processes of one thread each against everybody with two threads."""
    torch.set_num_threads(2)
    found = updates(images(), 1, first_order=False)
    contenders: dict[str, Contender] = {"recipes.maml --devices 2": lambda: in_processes(timed_updates, 2, 5)[0]}
    contenders |= {name: contender(update, 5) for name, (_, update) in found.items()}
    results = interleave(contenders, max(rounds // 3, 3))
    return "\n".join(
        [table("5-way 1-shot, 8 tasks, second order, two cores", results), verdict(results, PROCESSES_TARGET)]
    )


def growth_report(rounds: int) -> str:
    """How an update grows with the meta-batch, with inner steps and with ways."""
    lines = []
    for title, cases in (
        ("sinusoids, tasks", {f"{n} tasks": (sinusoids(n), 1) for n in (1, 5, 25, 125)}),
        ("sinusoids, 25 tasks, inner steps", {f"{n} steps": (sinusoids(), n) for n in (1, 2, 5, 10)}),
        ("images, 4 tasks of 1 shot, ways", {f"{n} ways": (images(4, n), 1) for n in (2, 5, 10, 20)}),
    ):
        contenders = {}
        for name, (problem, steps) in cases.items():
            torch.manual_seed(0)
            contenders[name] = contender(ours(problem, problem.network(), steps, first_order=False), 1)
        lines.append(table(title, interleave(contenders, rounds)))
    return "\n".join(lines)


PARTS = {
    "sinusoid": sinusoid_report,
    "compiled": compiled_report,
    "images": images_report,
    "processes": processes_report,
    "growth": growth_report,
}


def report(parts: Sequence[str] = tuple(PARTS), rounds: int = ROUNDS) -> str:
    """The parts asked for, as text."""
    found, threads = [], torch.get_num_threads()
    for part in parts:
        torch.set_num_threads(threads if part in ("images", "processes") else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(PARTS[part](rounds))
    torch.set_num_threads(threads)
    missing = ", ".join(sorted(PEERS.keys() - INSTALLED.keys()))
    return "\n".join([*found, f"not installed: {missing} (pip install {missing})"] if missing else found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    print(report(arguments.parts, arguments.rounds))
    print(machine())
