"""Task samplers for few-shot learning: sine waves, and classes drawn from a store of images.

A sampler is any callable ``(number, generator) -> Tasks``, or a plain tuple in that order. What it returns depends on
the generator alone, so that every process draws the same global meta-batch and then takes its share. The samplers here
keep a stronger promise: task i is the same whatever ``number`` is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_custom.errors import ConfigError


class Tasks(NamedTuple):
    """T tasks on the CPU: task first, then sample; support and query sizes may differ."""

    support_inputs: Tensor
    """``[T, S, ...]``: what a model adapts on."""
    support_targets: Tensor
    """``[T, S, ...]`` of numbers, or ``[T, S]`` int64 of classes."""
    query_inputs: Tensor
    """``[T, Q, ...]``: what the adapted model is measured on."""
    query_targets: Tensor
    """``[T, Q, ...]`` or ``[T, Q]``, as the support's."""


@dataclass(frozen=True)
class Sinusoids:
    """Sine waves ``y = amplitude * sin(x - phase)``, a wave a task: inputs and targets ``[T, K, 1]`` float32.

    Amplitude is uniform in [0.1, 5], phase in [0, pi], x in [-5, 5]. Finn et al. 2017, section 5.1.
    """

    shots: int = 10
    """Support samples of a task."""
    query_shots: int = 10
    """Query samples of a task."""

    def __post_init__(self) -> None:
        _at_least_one(shots=self.shots, query_shots=self.query_shots)

    def __call__(self, number: int, generator: torch.Generator) -> Tasks:
        """``number`` tasks."""
        uniform = self._uniform(number, generator)
        amplitude, phase = _waves(uniform)
        inputs = 10 * uniform[:, 2:].unsqueeze(2) - 5
        targets = amplitude * torch.sin(inputs - phase)
        support_inputs, query_inputs = inputs.tensor_split([self.shots], dim=1)
        support_targets, query_targets = targets.tensor_split([self.shots], dim=1)
        return Tasks(support_inputs, support_targets, query_inputs, query_targets)

    def draw(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Amplitude and phase, each ``[T, 1, 1]``, of the tasks that a call with such a generator returns."""
        return _waves(self._uniform(number, generator))

    def _uniform(self, number: int, generator: torch.Generator) -> Tensor:
        # A row a task, in one call: a longer draw only adds rows.
        return torch.rand(number, 2 + self.shots + self.query_shots, generator=generator, dtype=torch.float32)


def _waves(uniform: Tensor) -> tuple[Tensor, Tensor]:
    amplitude, phase = 0.1 + 4.9 * uniform[:, 0], math.pi * uniform[:, 1]
    return amplitude.view(-1, 1, 1), phase.view(-1, 1, 1)


class FewShot:
    """N-way K-shot classification from ``images [C, E, ...]``: C classes of E examples, of any dtype.

    Inputs are ``[T, N*K, ...]`` and targets ``[T, N*K]`` int64, class by class: K of label 0, K of label 1, and so on.
    The N classes of a task are drawn without replacement and labelled in random order; no example is in both support
    and query. ``transform`` takes the inputs as drawn, ``[T, N*K, ...]``, and is where bytes become numbers (see
    :func:`grey_images`). A contiguous store is not copied.
    """

    def __init__(
        self,
        images: Tensor,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        _at_least_one(ways=ways, shots=shots, query_shots=query_shots)
        if images.dim() < 2:
            raise ConfigError(f"images: shape {tuple(images.shape)}; give [classes, examples, ...]")
        classes, examples = images.shape[:2]
        if ways > classes:
            raise ConfigError(f"ways: {ways}, but there are {classes} classes; give at most {classes}")
        if shots + query_shots > examples:
            raise ConfigError(
                f"query_shots: {query_shots} beside {shots} shots, but a class has {examples} examples; "
                f"give at most {examples} together"
            )
        self.images, self.transform = images, transform
        self._examples = images.flatten(0, 1)
        self.ways, self.shots, self.query_shots = ways, shots, query_shots

    def __call__(self, number: int, generator: torch.Generator) -> Tasks:
        """``number`` tasks."""
        ways, examples = self.ways, self.shots + self.query_shots
        uniform = torch.rand(number, ways + ways * examples, generator=generator, dtype=torch.float64)
        classes = _without_replacement(uniform[:, :ways], self.images.shape[0])
        drawn = _without_replacement(uniform[:, ways:].reshape(-1, examples), self.images.shape[1])
        support, query = drawn.view(number, ways, examples).tensor_split([self.shots], dim=2)
        return Tasks(*self._samples(classes, support), *self._samples(classes, query))

    def _samples(self, classes: Tensor, examples: Tensor) -> tuple[Tensor, Tensor]:
        number, ways, shots = examples.shape
        # Whole rows of one index: several times faster than indexing by class and example.
        index = classes.unsqueeze(2) * self.images.shape[1] + examples
        inputs = self._examples.index_select(0, index.flatten()).unflatten(0, (number, ways * shots))
        targets = torch.arange(ways).repeat_interleave(shots).repeat(number, 1)
        return inputs if self.transform is None else self.transform(inputs), targets


def _without_replacement(uniform: Tensor, size: int) -> Tensor:
    """Indices ``[R, n]`` below ``size``, each row without a repeat, from ``uniform [R, n]`` in [0, 1).

    The first n steps of a Fisher-Yates shuffle, all rows at once: several times faster than ordering ``size`` random
    numbers a row, and without their ties.
    """
    rows, count = uniform.shape
    steps = torch.arange(count)
    places = steps + (uniform * (size - steps)).long()
    deck = torch.arange(size).repeat(rows, 1)
    for step in range(count):
        place, here = places[:, step : step + 1], deck[:, step : step + 1].clone()
        deck[:, step : step + 1] = deck.gather(1, place)
        deck.scatter_(1, place, here)
    return deck[:, :count]


def minibatch_order(number: int, samples: int, *, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Which samples of each task a step of its inner loop sees: indices below ``samples``, ``[T, steps, B]``.

    Passes over the task's samples, each shuffled anew, cut into batches one after another; a batch that a pass does not
    fill is filled by the next. A task with fewer samples than ``batch_size`` has all of them in every batch.
    """
    batch_size = min(batch_size, samples)
    passes = -(-steps * batch_size // samples)
    uniform = torch.rand(number, passes, samples, generator=generator, dtype=torch.float64)
    order = uniform.argsort(-1).flatten(1)[:, : steps * batch_size]
    return order.view(number, steps, batch_size)


def grey_images(images: Tensor) -> Tensor:
    """Bytes ``[..., H, W]`` as one-channel float32 images ``[..., 1, H, W]`` in [0, 1]."""
    return images.unsqueeze(-3).to(torch.float32, copy=True).div_(255)


def with_rotations(images: Tensor) -> Tensor:
    """``[C, E, ..., H, W]`` and its turns by 90, 180 and 270 degrees as classes of their own: ``[4C, E, ..., H, W]``.

    Square images only. Class c turned r times counterclockwise is class ``r * C + c``. Santoro et al. 2016.
    """
    if images.dim() < 4 or images.shape[-1] != images.shape[-2]:
        raise ConfigError(
            f"images: shape {tuple(images.shape)}; give square ones, [classes, examples, ..., size, size]"
        )
    return torch.cat([torch.rot90(images, turns, dims=(-2, -1)) for turns in range(4)])


def _at_least_one(**fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise ConfigError(f"{name}: {value}; give at least 1")
