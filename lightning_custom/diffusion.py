"""Gaussian diffusion in continuous time: noise schedules, what a denoiser predicts, weights of its loss, and samplers.

At time t a sample x is ``z = alpha x + sigma e`` with normal noise e and ``alpha^2 + sigma^2 = 1`` (Ho et al. 2020,
eq. 4), clean at time 0 and almost noise alone at 1. Coefficients are functions of the time, computed in float64.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["cosine", "linear"]
Prediction = Literal["v", "epsilon", "sample"]

Denoiser = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""``(noisy [B, ...], times [B], labels [B] or None, estimates [B, ...] or None) -> predictions [B, ...]``."""

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The same with the labels given already: ``(noisy, times, estimates or None) -> predictions``."""

# Where no signal is left, a sample could not be estimated from its noise; as in Chen et al. 2022.
_LEAST_SIGNAL = 1e-9
# Some noise is left in the first steps (Nichol and Dhariwal 2021, eq. 17).
_COSINE_OFFSET = 0.008
# The first and the last variance of Ho et al. 2020, times their 1,000 steps.
_LINEAR_RATES = (0.1, 20.0)


def signal(schedule: Schedule, times: Tensor) -> Tensor:
    """``alpha^2`` in float64 at ``times``, falling from 1 at time 0 to almost 0 at time 1.

    ``cosine`` is Nichol and Dhariwal 2021, eq. 17. ``linear`` is the limit for ever more steps of Ho et al. 2020, whose
    variances grow linearly (Song et al. 2021b, eq. 33).

    >>> signal("cosine", torch.tensor([0.0, 1.0])).tolist()
    [1.0, 1e-09]
    """
    times = times.double()
    if schedule == "cosine":
        angles = (times + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2
        power = (angles.cos() / math.cos(_COSINE_OFFSET / (1 + _COSINE_OFFSET) * math.pi / 2)).square()
    else:
        first, last = _LINEAR_RATES
        power = (-first * times - (last - first) / 2 * times.square()).exp()
    return power.clamp(_LEAST_SIGNAL, 1.0)


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule, and what a denoiser says of a noisy sample.

    ``prediction``: the noise e (Ho et al. 2020), the sample x, or ``v = alpha e - sigma x`` (Salimans and Ho 2022).
    ``bound`` is the largest absolute value that an estimate of a sample may have; 0: any.
    """

    schedule: Schedule = "cosine"
    prediction: Prediction = "v"
    bound: float = 0.0

    def coefficients(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma [B, 1, ...]`` at times ``[B]``, to be multiplied with ``like [B, ...]``."""
        power = signal(self.schedule, times).view(-1, *(1 for _ in like.shape[1:]))
        return power.sqrt().to(like), (1 - power).sqrt().to(like)

    def noisy(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Samples ``[B, ...]`` with their share of ``noise`` (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self.coefficients(times, samples)
        return alpha * samples + sigma * noise

    def target(self, samples: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should say of ``noisy(samples, noise, times)``."""
        if self.prediction == "v":
            alpha, sigma = self.coefficients(times, samples)
            return alpha * noise - sigma * samples
        return noise if self.prediction == "epsilon" else samples

    def estimate(self, predictions: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The clean samples that ``predictions`` of ``noisy [B, ...]`` mean, within ``bound``."""
        alpha, sigma = self.coefficients(times, noisy)
        if self.prediction == "v":
            samples = alpha * noisy - sigma * predictions
        else:
            samples = predictions if self.prediction == "sample" else (noisy - sigma * predictions) / alpha
        return samples.clamp(-self.bound, self.bound) if self.bound else samples

    def weights(self, times: Tensor, min_snr: float = 0.0) -> Tensor:
        """Weights ``[B]`` of squared errors of the prediction, in float64: 1, or min-SNR with gamma ``min_snr``.

        Min-SNR weighs the error of the sample by ``min(SNR, gamma)``, ``SNR = alpha^2 / sigma^2`` (Hang et al. 2023,
        section 3.4); the error of the noise is SNR times as large, that of v SNR + 1 times.
        """
        power = signal(self.schedule, times)
        if min_snr == 0:
            return torch.ones_like(power)
        # Multiplied by sigma^2, which is 0 at time 0.
        bounded = torch.minimum(power, min_snr * (1 - power))
        return bounded / {"sample": 1 - power, "epsilon": power, "v": torch.ones_like(power)}[self.prediction]

    def step(
        self,
        estimates: Tensor,
        noisy: Tensor,
        time: Tensor,
        earlier: Tensor,
        *,
        eta: float = 0.0,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """From ``noisy [B, ...]`` at ``time`` to the noisy samples at an ``earlier`` one, by estimates of the clean.

        ``eta=0`` goes on with the noise that ``estimates`` leave (DDIM, Song et al. 2021, eq. 12); ``eta=1`` draws from
        the posterior given noisy and clean samples (Ho et al. 2020, eq. 6 and 7); between, a part of the noise is
        ``fresh``. Both times are scalars in float64.
        """
        power, earlier_power = signal(self.schedule, time), signal(self.schedule, earlier)
        deviation = eta * ((1 - earlier_power) / (1 - power) * (1 - power / earlier_power)).sqrt()
        kept = (1 - earlier_power - deviation.square()).clamp_min(0).sqrt()
        noise = (noisy - float(power.sqrt()) * estimates) / float((1 - power).sqrt())
        result = float(earlier_power.sqrt()) * estimates + float(kept) * noise
        return result if fresh is None else result + float(deviation) * fresh

    def denoise(
        self,
        predict: Predict,
        noise: Tensor,
        *,
        steps: int,
        eta: float = 0.0,
        draw: Callable[[], Tensor] | None = None,
        self_conditioning: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Noisy samples and estimates of the clean ones ``[B, ...]`` after each of ``steps`` equal steps of time.

        At the end they are the same, the samples. ``draw`` gives fresh noise like ``noise`` where ``eta`` asks for it.
        With ``self_conditioning`` each prediction is given the estimates before, at first zeros (Chen et al. 2022,
        algorithm 2).
        """
        noisy, estimates = noise, torch.zeros_like(noise)
        for time, earlier in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
            times = time.expand(len(noise))
            predictions = predict(noisy, times, estimates if self_conditioning else None)
            estimates = self.estimate(predictions, noisy, times)
            fresh = draw().to(noisy) if eta and draw is not None else None
            noisy = self.step(estimates, noisy, time, earlier, eta=eta, fresh=fresh)
            yield noisy, estimates


def guided(denoiser: Denoiser, labels: Tensor | None, no_label: int, guidance: float = 0.0) -> Predict:
    """Predictions of ``denoiser`` for ``labels [B]``, led away from those for no label, whose number is ``no_label``.

    Classifier-free guidance, ``(1 + guidance) * conditional - guidance * unconditional`` (Ho and Salimans 2022, eq.
    6), of noise, sample or v alike, each of which is linear in the others.
    """
    if labels is None or guidance == 0:
        return lambda noisy, times, estimates: denoiser(noisy, times.to(noisy), labels, estimates)

    def predict(noisy: Tensor, times: Tensor, estimates: Tensor | None) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, no_label)])
        twice = None if estimates is None else torch.cat([estimates, estimates])
        found = denoiser(torch.cat([noisy, noisy]), torch.cat([times, times]).to(noisy), both, twice)
        conditional, unconditional = found.chunk(2)
        return (1 + guidance) * conditional - guidance * unconditional

    return predict


def in_parts(denoiser: Denoiser, size: int) -> Denoiser:
    """``denoiser`` on at most ``size`` samples at a time, to save memory."""

    def predict(noisy: Tensor, times: Tensor, labels: Tensor | None, estimates: Tensor | None) -> Tensor:
        found = []
        for i in range(0, max(len(noisy), 1), size):
            part = slice(i, i + size)
            known = None if labels is None else labels[part]
            found.append(denoiser(noisy[part], times[part], known, None if estimates is None else estimates[part]))
        return torch.cat(found)

    return predict


def even_times(count: int, draw: torch.Generator) -> Tensor:
    """Times ``[count]`` in [0, 1) in float64, one in each of ``count`` equal parts, each uniform over all.

    One draw shifts all (Kingma et al. 2021, appendix I.1): the mean of a batch's losses varies less.
    """
    start = torch.rand((), generator=draw, dtype=torch.float64)
    return (start + torch.arange(count, dtype=torch.float64) / count) % 1


def one_of_each_pair(count: int, draw: torch.Generator) -> Tensor:
    """Truth values ``[count]``: one of samples 0 and 1, one of 2 and 3, ..., by the throw of a coin each.

    Each sample's chance is a half, and every even part of a batch has as many as any other: a constant shape.
    """
    coins = torch.rand((count + 1) // 2, generator=draw) < 0.5
    return torch.stack([coins, ~coins], dim=1).flatten()[:count]
