"""What few-shot learners share whatever their loops do: scores on held-out tasks, and pictures of adaptation.

Shapes: T tasks, S support samples, Q query samples.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_custom.data import Batches
from lightning_custom.datasets import omniglot, split_characters
from lightning_custom.distributed import gather_shares, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed
from lightning_custom.networks import FewShotConvNet, sinusoid_network
from lightning_custom.pictures import curves_picture, image_grid
from lightning_custom.precision import unwrap
from lightning_custom.task_batching import Parameters, TaskLoss, TaskModel
from lightning_custom.task_norm import statistics_from
from lightning_custom.tasks import FewShot, Sinusoids, grey_images, with_rotations

T = TypeVar("T")
Sampler = Callable[[int, torch.Generator], Sequence[Tensor]]
"""``(number T, generator) -> support inputs, support targets, query inputs, query targets``, each ``[T, K, ...]``."""
Predict = Callable[[Tensor], Tensor]
"""``query inputs [T, Q, ...] -> outputs [T, Q, ...]`` of each task's own network."""
Learner = Callable[[Tensor, Tensor], Iterator[Predict]]
"""``(support inputs [T, S, ...], support targets) ->`` predictions before the first inner update, and after each."""
Statistics = Literal["query", "support", "both"]
"""Samples whose statistics normalise the query set, in networks with batch normalisation."""

_DRAWN_AT_ONCE = 100


def require_a_task_each(fabric: Fabric, meta_batch_size: int) -> None:
    """:class:`ConfigError` where there are fewer tasks than processes."""
    if meta_batch_size < fabric.world_size:
        raise ConfigError(f"meta_batch_size: {meta_batch_size} for {fabric.world_size} processes; each needs one")


def require_share(fabric: Fabric, share: Sequence[Tensor], meta_batch_size: int) -> Sequence[Tensor]:
    """``share``; :class:`ConfigError` where it is not this process's part of the meta-batch, as gradients assume."""
    first, rest = divmod(meta_batch_size, fabric.world_size)
    expected = first + (fabric.global_rank < rest)
    if len(share[0]) != expected:
        raise ConfigError(
            f"meta_batch_size: {meta_batch_size} over {fabric.world_size} processes is {expected} for process "
            f"{fabric.global_rank}, but the iterable yields {len(share[0])} tasks; make them equal"
        )
    return share


def draw_tasks(tasks: Sampler, number: int, generator: torch.Generator) -> Sequence[Tensor]:
    """``number`` tasks of a sampler; :class:`ConfigError` where it gives another number, as means are over that."""
    drawn = tasks(number, generator)
    if len(drawn) != 4:
        raise ConfigError(f"tasks: {len(drawn)} parts; give support inputs, their targets, query inputs, their targets")
    sizes = [len(part) for part in drawn]
    if sizes != [number] * 4:
        raise ConfigError(f"tasks: parts of {sizes} tasks, where {number} were asked for; give as many as asked for")
    return drawn


class ListOfMetaBatches:
    """A list read from its beginning, where it would count as a dataset to shuffle."""

    def __init__(self, meta_batches: Sequence[Sequence[Tensor]]) -> None:
        self.meta_batches = meta_batches

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        return iter(self.meta_batches)


def meta_batches(fabric: Fabric, tasks: Any, *, meta_batch_size: int, seed: int) -> Batches:
    """Endless meta-batches from an iterable of them, a list too, or from a map-style dataset whose items are tasks."""
    source = ListOfMetaBatches(tasks) if isinstance(tasks, (list, tuple)) else tasks
    return Batches(fabric, source, batch_size=meta_batch_size, seed=seed)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, live."""
    return {name: parameter for name, parameter in unwrap(module).named_parameters() if parameter.requires_grad}


def own_copies(parameters: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """``parameters`` once for each of ``number`` tasks, ``[T, ...]``, with no graph; no memory is copied."""
    return {name: parameter.detach().expand(number, *parameter.shape) for name, parameter in parameters.items()}


def as_leaves(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers, to be differentiated by and with no graph behind them."""
    return {name: part.detach().requires_grad_() for name, part in parameters.items()}


def last(steps: Iterable[T]) -> T:
    """The last of ``steps``, such as an inner loop's; those before it are let go of at once."""
    return deque(steps, maxlen=1)[0]


def inner_product(parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """The sum of products by name: a loss whose gradient by ``parameters`` is ``direction``.

    For a gradient that was found in another way, so that it goes through ``fabric.backward`` like any: scaled in
    ``16-mixed``, and added to what is there.
    """
    return torch.stack([(part * direction[name].detach()).sum() for name, part in parameters.items()]).sum()


def query_outputs(
    model: TaskModel, parameters: Parameters, support_inputs: Tensor, query_inputs: Tensor, statistics: Statistics
) -> Tensor:
    """Outputs for the query set, normalised by the statistics of the samples that ``statistics`` names."""
    if statistics == "query":
        return model(query_inputs, parameters)
    size = support_inputs.shape[1]
    with statistics_from(model.module, size if statistics == "support" else None):
        return model(torch.cat([support_inputs, query_inputs], 1), parameters)[:, size:]


def with_parameters(model: nn.Module, parameters: Parameters) -> nn.Module:
    """A copy of ``model`` with the parameters of one task, ``[1, ...]``, in place of those of that name."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name].reshape(parameter.shape))
    return copied


def one_after_another(share: Sequence[Tensor], *, all_at_once: bool, largest: int = 0) -> list[tuple[Tensor, ...]]:
    """The tasks of ``share`` in parts that fit the memory: each alone, or all of them, or at most ``largest`` of them.

    An empty share has no parts.
    """
    number = len(share[0])
    if number == 0:
        return []
    size = (largest or number) if all_at_once else 1
    return list(zip(*(tensor.split(size) for tensor in share), strict=True))


def at_once(fabric: Fabric, tasks_at_once: int, meta_batch_size: int) -> int:
    """Most held-out tasks that a process computes at once: as many as in training, which fit its memory."""
    return tasks_at_once or -(-meta_batch_size // fabric.world_size)


def mean_over_tasks(found: Sequence[Mapping[str, Tensor]], number: int) -> dict[str, Tensor]:
    """Sums by tag over parts of the tasks, as means over their ``number``."""
    return {tag: torch.stack([sums[tag] for sums in found]).sum() / number for tag in found[0]}


def are_classes(outputs: Tensor, targets: Tensor) -> bool:
    """Whether ``targets [T, K, ...]`` are classes and ``outputs [T, K, C, ...]`` their scores, as in cross-entropy."""
    if targets.is_floating_point() or outputs.dim() < 3 or outputs.shape[2] < 2:
        return False
    return (*outputs.shape[:2], *outputs.shape[3:]) == targets.shape


def accuracies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of each task's targets that is classified right, ``[T]``."""
    return (outputs.argmax(2) == targets).float().flatten(1).mean(1)


def held_out_scores(
    fabric: Fabric,
    learner: Learner,
    tasks: Sampler,
    number: int,
    loss: TaskLoss,
    name: str,
    *,
    all_at_once: bool,
    largest: int = 0,
    after: Collection[int] | None = None,
) -> dict[str, float]:
    """Query loss, and accuracy where targets are classes, along the inner loop on ``number`` held-out tasks.

    The tasks are always the same. By tag: ``NAME/loss`` after the last inner update; ``NAME/loss_interval``, half the
    width of the 95% interval of that mean over tasks; ``NAME/loss_after/00``, ``01``, ... after each inner update, or
    after those that ``after`` lists, the last among them.
    """
    rows = []
    for start in range(0, number, _DRAWN_AT_ONCE):
        generator = torch.Generator().manual_seed(hash_seed(start, "held-out tasks"))
        drawn = draw_tasks(tasks, min(_DRAWN_AT_ONCE, number - start), generator)
        own = [take_share(part, fabric) for part in drawn]
        parts = one_after_another(own, all_at_once=all_at_once, largest=largest)
        rows += [_scores_along(learner, loss, after, *part) for part in parts]
    if not rows:  # fewer tasks than processes: nothing, in a tensor of the right shape
        rows = [_scores_along(learner, loss, after, *(fabric.to_device(part[:1]) for part in drawn))[:0]]
    table = gather_shares(torch.cat(rows), fabric).cpu().double()  # [tasks, scores, steps]; MPS has no float64
    steps = range(table.shape[2]) if after is None else sorted(after)
    mean, interval = table.mean(0), 1.96 * table.std(0) / math.sqrt(number)
    scores = {}
    for row, score in enumerate(("loss", "accuracy")[: len(mean)]):
        scores[f"{name}/{score}"] = float(mean[row, -1])
        scores[f"{name}/{score}_interval"] = float(interval[row, -1])
        along = zip(steps, mean[row], strict=True)
        scores |= {f"{name}/{score}_after/{step:02d}": float(value) for step, value in along}
    return scores


def about_ten(steps: int) -> list[int]:
    """About ten inner updates of ``steps`` to score after: the start, the first and the last among them.

    >>> about_ten(50)
    [0, 1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]
    """
    return sorted({0, 1, *range(0, steps, max(steps // 10, 1)), steps})


def _scores_along(learner: Learner, loss: TaskLoss, after: Collection[int] | None, *tasks: Tensor) -> Tensor:
    support_inputs, support_targets, query_inputs, query_targets = tasks
    columns = []
    for step, predict in enumerate(learner(support_inputs, support_targets)):
        if after is not None and step not in after:
            continue
        with torch.no_grad():
            outputs = predict(query_inputs)
            scores = [loss(outputs, query_targets).float()]
            if are_classes(outputs, query_targets):
                scores.append(accuracies(outputs, query_targets))
        columns.append(torch.stack(scores, 1))
    return torch.stack(columns, 2)


def score_lines(learner: str, scores: Mapping[str, float], name: str = "test") -> list[str]:
    """What :func:`held_out_scores` found, as lines to print."""
    lines = []
    for score in ("loss", "accuracy"):
        if f"{name}/{score}" in scores:
            beginning = f"{name}/{score}_after/"
            after = {int(tag.removeprefix(beginning)): scores[tag] for tag in scores if tag.startswith(beginning)}
            shown = "  ".join(f"{step}: {after[step]:.4f}" for step in sorted({0, 1, max(after)} & after.keys()))
            mean, interval = scores[f"{name}/{score}"], scores[f"{name}/{score}_interval"]
            lines.append(f"{learner:<8}{score:<9}{mean:.4f} +- {interval:.4f}   after {shown}")
    return lines


class Tested(Protocol):
    """What a config says of the test at the end of a run."""

    @property
    def run_dir(self) -> str | None:
        """Directory of the run."""

    @property
    def test_steps(self) -> int:
        """Inner steps."""

    @property
    def test_tasks(self) -> int:
        """Held-out tasks."""


def print_test(fabric: Fabric, config: Tested, lines: Sequence[str], seconds: float) -> None:
    """Print what the best checkpoint reached in its test, after ``seconds`` of training, and where the run is."""
    if fabric.global_rank > 0:
        return
    print(f"\nafter {config.test_steps} inner steps, mean and 95% interval over {config.test_tasks} held-out tasks")
    print(*lines, sep="\n")
    print(f"{seconds:.1f} s\nrun: {config.run_dir}\nlook: tensorboard --logdir {config.run_dir}", flush=True)


def wave_picture(fabric: Fabric, learners: Mapping[str, tuple[Learner, Sequence[int]]], tasks: Sinusoids) -> Tensor:
    """Four held-out waves, ``[3, H, W]``: the true one, the support points, and the outputs of learners by name.

    Each learner is drawn after the given numbers of inner updates.
    """
    seed = hash_seed("pictured tasks")
    amplitude, phase = tasks.draw(4, torch.Generator().manual_seed(seed))
    points, heights, *_ = tasks(4, torch.Generator().manual_seed(seed))
    x = torch.linspace(-5, 5, 200)
    curves = {"true": (amplitude * torch.sin(x.view(1, -1, 1) - phase)).squeeze(2)}
    for name, (learner, shown) in learners.items():
        for step, predict in enumerate(learner(fabric.to_device(points), fabric.to_device(heights))):
            if step in shown:
                outputs = predict(fabric.to_device(x.view(1, -1, 1).expand(4, -1, -1)))
                curves[f"{name}, {step} steps"] = outputs.detach().float().cpu().squeeze(2)
    return image_grid(
        torch.stack(
            [
                curves_picture(
                    x, {name: curve[task] for name, curve in curves.items()}, (points[task, :, 0], heights[task, :, 0])
                )
                for task in range(4)
            ]
        ),
        columns=2,
        padding=0,
    )


class Samplers(NamedTuple):
    """Task samplers of the parts of a family, which do not overlap."""

    train: Sampler
    val: Sampler
    test: Sampler


Family = Literal["sinusoid", "omniglot"]


def load_tasks(data: Family, data_root: str | None, *, ways: int, shots: int, query_shots: int) -> Samplers:
    """The family ``data``: sinusoids, or Omniglot's characters with their turns as classes of their own.

    The waves to test with are others than those to validate with, by which a checkpoint is chosen. Of the 1,200
    characters that Finn et al. 2017 train on, their code keeps 100 to validate with; 423 are left to test.
    """
    if data == "sinusoid":
        waves = Sinusoids(shots, query_shots)

        def others(number: int, generator: torch.Generator) -> Sequence[Tensor]:
            return waves(number, torch.Generator().manual_seed(hash_seed(generator.initial_seed(), "test")))

        return Samplers(waves, waves, others)
    parts = split_characters(omniglot(data_root).images, seed=0)
    sizes: dict[str, Any] = {"ways": ways, "shots": shots, "query_shots": query_shots}
    return Samplers(*(FewShot(with_rotations(part), transform=grey_images, **sizes) for part in parts))


def few_shot_network(data: Family, *, ways: int, width: int, seed: int) -> nn.Module:
    """The network of Finn et al. 2017 for the family, with weights from ``seed``."""
    torch.manual_seed(seed)
    return sinusoid_network(width) if data == "sinusoid" else FewShotConvNet(ways, width=width)
