"""What few-shot learners share whatever their loops do: scores on held-out tasks, and pictures of adaptation.

Shapes: T tasks, S support samples, Q query samples.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_custom.datasets import omniglot, split_characters
from lightning_custom.distributed import gather_shares, take_share
from lightning_custom.loop import hash_seed
from lightning_custom.networks import FewShotConvNet, sinusoid_network
from lightning_custom.pictures import curves_picture, image_grid
from lightning_custom.task_batching import TaskLoss
from lightning_custom.tasks import FewShot, Sinusoids, grey_images, with_rotations

Sampler = Callable[[int, torch.Generator], Sequence[Tensor]]
"""``(number T, generator) -> support inputs, support targets, query inputs, query targets``, each ``[T, K, ...]``."""
Predict = Callable[[Tensor], Tensor]
"""``query inputs [T, Q, ...] -> outputs [T, Q, ...]`` of each task's own network."""
Learner = Callable[[Tensor, Tensor], Iterator[Predict]]
"""``(support inputs [T, S, ...], support targets) ->`` predictions before the first inner update, and after each."""

_DRAWN_AT_ONCE = 100


def one_after_another(share: Sequence[Tensor], *, all_at_once: bool) -> list[tuple[Tensor, ...]]:
    """The tasks of ``share`` in parts that fit the memory: each alone, or all of them."""
    if all_at_once:
        return [tuple(share)] if len(share[0]) else []
    return list(zip(*(tensor.split(1) for tensor in share), strict=True)) if len(share[0]) else []


def mean_over_tasks(found: Sequence[Mapping[str, Tensor]], number: int) -> dict[str, Tensor]:
    """Sums by tag over parts of the tasks, as means over their ``number``."""
    return {tag: torch.stack([sums[tag] for sums in found]).sum() / number for tag in found[0]}


def accuracies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of samples of each task that is classified right, ``[T]``."""
    return (outputs.argmax(-1) == targets).float().mean(1)


def held_out_scores(
    fabric: Fabric, learner: Learner, tasks: Sampler, number: int, loss: TaskLoss, name: str, *, all_at_once: bool
) -> dict[str, float]:
    """Query loss, and accuracy where targets are classes, along the inner loop on ``number`` held-out tasks.

    The tasks are always the same. By tag: ``NAME/loss`` after the last inner update; ``NAME/loss_interval``, half the
    width of the 95% interval of that mean over tasks; ``NAME/loss_after/00``, ``01``, ... after each inner update.
    """
    rows = []
    for start in range(0, number, _DRAWN_AT_ONCE):
        generator = torch.Generator().manual_seed(hash_seed(start, "held-out tasks"))
        drawn = tasks(min(_DRAWN_AT_ONCE, number - start), generator)
        own = [take_share(part, fabric) for part in drawn]
        rows += [_scores_along(learner, loss, *part) for part in one_after_another(own, all_at_once=all_at_once)]
    table = gather_shares(torch.cat(rows), fabric).double().cpu()  # [tasks, scores, steps]
    mean, interval = table.mean(0), 1.96 * table.std(0) / math.sqrt(number)
    scores = {}
    for row, score in enumerate(("loss", "accuracy")[: len(mean)]):
        scores[f"{name}/{score}"] = float(mean[row, -1])
        scores[f"{name}/{score}_interval"] = float(interval[row, -1])
        scores |= {f"{name}/{score}_after/{step:02d}": float(value) for step, value in enumerate(mean[row])}
    return scores


def _scores_along(learner: Learner, loss: TaskLoss, *tasks: Tensor) -> Tensor:
    support_inputs, support_targets, query_inputs, query_targets = tasks
    columns = []
    for predict in learner(support_inputs, support_targets):
        with torch.no_grad():
            outputs = predict(query_inputs)
            scores = [loss(outputs, query_targets).float()]
            if not query_targets.is_floating_point():
                scores.append(accuracies(outputs, query_targets))
        columns.append(torch.stack(scores, 1))
    return torch.stack(columns, 2)


def score_lines(learner: str, scores: Mapping[str, float], name: str = "test") -> list[str]:
    """What :func:`held_out_scores` found, as lines to print."""
    lines = []
    for score in ("loss", "accuracy"):
        if f"{name}/{score}" in scores:
            after = [value for tag, value in scores.items() if tag.startswith(f"{name}/{score}_after/")]
            shown = "  ".join(f"{step}: {after[step]:.4f}" for step in sorted({0, 1, len(after) - 1}))
            interval = scores[f"{name}/{score}_interval"]
            lines.append(f"{learner:<8}{score:<9}{after[-1]:.4f} +- {interval:.4f}   after {shown}")
    return lines


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

    Of the 1,200 characters that Finn et al. 2017 train on, their code keeps 100 to validate with; 423 are left to test.
    """
    if data == "sinusoid":
        waves = Sinusoids(shots, query_shots)
        return Samplers(waves, waves, waves)
    parts = split_characters(omniglot(data_root).images, seed=0)
    sizes: dict[str, Any] = {"ways": ways, "shots": shots, "query_shots": query_shots}
    return Samplers(*(FewShot(with_rotations(part), transform=grey_images, **sizes) for part in parts))


def few_shot_network(data: Family, *, ways: int, width: int, seed: int) -> nn.Module:
    """The network of Finn et al. 2017 for the family, with weights from ``seed``."""
    torch.manual_seed(seed)
    return sinusoid_network(width) if data == "sinusoid" else FewShotConvNet(ways, width=width)
