"""Diffusion against closed forms: of schedules, conversions, posteriors, and of samplers on Gaussian data."""

import math
from itertools import pairwise, product

import pytest
import torch

from lightning_custom.diffusion import (
    Diffusion,
    even_times,
    guided,
    in_parts,
    one_of_each_pair,
    signal,
)

SCHEDULES, PREDICTIONS = ("cosine", "linear"), ("v", "epsilon", "sample")
every_process = pytest.mark.parametrize(
    "process",
    [Diffusion(*pair) for pair in product(SCHEDULES, PREDICTIONS)],
    ids=lambda p: f"{p.schedule}-{p.prediction}",
)
TIMES = torch.linspace(0.01, 0.99, 8, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Schedules


def test_cosine_is_the_formula_of_the_paper():
    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [f(t) / f(0) for t in TIMES.tolist()]
    assert signal("cosine", TIMES).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps, tolerance", [(1000, 0.02), (100_000, 2e-4)])
def test_linear_is_the_limit_of_linearly_growing_variances(steps, tolerance):
    variances = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    product_of_steps = (1 - variances).log().cumsum(0)[steps // 4 - 1 :: steps // 4]
    found = signal("linear", torch.tensor([0.25, 0.5, 0.75, 1.0])).log()
    torch.testing.assert_close(found, product_of_steps, rtol=tolerance, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_signal_falls_from_one_to_almost_nothing(schedule):
    power = signal(schedule, torch.linspace(0, 1, 1000, dtype=torch.float64))
    assert power[0] == 1
    assert (power.diff() < 0).all()
    assert 0 < power[-1] < 1e-4


# What is predicted


@every_process
def test_the_estimate_of_the_target_is_the_sample(process):
    samples, noise = normal(8, 2, 3), normal(8, 2, 3, seed=1)
    noisy = process.noisy(samples, noise, TIMES)
    target = process.target(samples, noise, TIMES)
    torch.testing.assert_close(process.estimate(target, noisy, TIMES), samples, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noisy_samples_keep_the_variance_of_normal_data(schedule):
    process = Diffusion(schedule)
    alpha, sigma = process.coefficients(TIMES, normal(8, 5))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert alpha.shape == sigma.shape == (8, 1)


def test_v_is_the_derivative_of_the_noisy_sample_by_the_angle_between_sample_and_noise():
    process, samples, noise = Diffusion("cosine", "v"), normal(8, 4), normal(8, 4, seed=1)
    alpha, sigma = process.coefficients(TIMES, samples)
    angle, step = torch.atan2(sigma, alpha), 1e-6

    def at(angle):
        return angle.cos() * samples + angle.sin() * noise

    derivative = (at(angle + step) - at(angle - step)) / (2 * step)
    torch.testing.assert_close(process.target(samples, noise, TIMES), derivative, rtol=1e-6, atol=1e-6)


def test_estimates_stay_within_the_bound():
    noisy, predictions = 5 * normal(8, 100), normal(8, 100, seed=1)
    free = Diffusion("cosine", "epsilon").estimate(predictions, noisy, TIMES)
    assert free.abs().max() > 2
    bounded = Diffusion("cosine", "epsilon", bound=1.5).estimate(predictions, noisy, TIMES)
    assert torch.equal(bounded, free.clamp(-1.5, 1.5))


# Weights


@pytest.mark.parametrize("gamma", (1.0, 5.0))
@every_process
def test_min_snr_weighs_the_error_of_the_sample_by_the_bounded_snr(process, gamma):
    samples, noise, predictions = normal(8, 6), normal(8, 6, seed=1), normal(8, 6, seed=2)
    noisy = process.noisy(samples, noise, TIMES)
    errors = (predictions - process.target(samples, noise, TIMES)).square().sum(1)
    power = signal(process.schedule, TIMES)
    snr = power / (1 - power)
    expected = snr.clamp_max(gamma) * (process.estimate(predictions, noisy, TIMES) - samples).square().sum(1)
    torch.testing.assert_close(process.weights(TIMES, gamma) * errors, expected, rtol=1e-9, atol=1e-12)


@every_process
def test_weights_are_one_without_min_snr_and_finite_at_both_ends_with_it(process):
    assert torch.equal(process.weights(TIMES), torch.ones(8, dtype=torch.float64))
    # Where there is no noise at all, the sample is seen: its weight is 0/0, and time 0 is drawn with probability 0.
    ends = torch.tensor([1e-9, 1.0], dtype=torch.float64)
    weights = process.weights(ends, 5.0)
    assert torch.isfinite(weights).all()
    assert (weights <= 5.0 + 1e-9).all()


# Steps of the samplers


def posterior(schedule, sample, noisy, time, earlier):
    """Mean and deviation of the less noisy sample given ``noisy`` and ``sample``, from the joint normal of both."""
    power, earlier_power = (float(signal(schedule, t)) for t in (time, earlier))
    ratio = math.sqrt(power / earlier_power)  # the noisy one given the less noisy one has this times it for a mean
    covariance = torch.tensor(
        [[1 - earlier_power, ratio * (1 - earlier_power)], [ratio * (1 - earlier_power), 1 - power]],
        dtype=torch.float64,
    )
    gain = covariance[0, 1] / covariance[1, 1]
    mean = math.sqrt(earlier_power) * sample + gain * (noisy - math.sqrt(power) * sample)
    return mean, (covariance[0, 0] - gain * covariance[0, 1]).sqrt()


MOMENTS = [(1.0, 0.9), (0.6, 0.55), (0.3, 0.01), (0.1, 0.0)]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_ancestral_step_draws_from_the_posterior(schedule, moments):
    time, earlier = torch.tensor(moments, dtype=torch.float64)
    sample, noisy, fresh = normal(50), normal(50, seed=1), normal(50, seed=2)
    mean, deviation = posterior(schedule, sample, noisy, time, earlier)
    process = Diffusion(schedule)
    found = process.step(sample, noisy, time, earlier, eta=1.0, fresh=torch.zeros_like(fresh))
    torch.testing.assert_close(found, mean, rtol=1e-7, atol=1e-9)
    drawn = process.step(sample, noisy, time, earlier, eta=1.0, fresh=fresh)
    torch.testing.assert_close(drawn - found, deviation * fresh, rtol=1e-6, atol=1e-9)


def test_an_ancestral_step_is_equation_7_of_ho_et_al():
    process, time, earlier = Diffusion("linear"), *torch.tensor([0.5, 0.499], dtype=torch.float64)
    power, earlier_power = signal("linear", time), signal("linear", earlier)
    variance = 1 - power / earlier_power
    sample, noisy = normal(50), normal(50, seed=1)
    mean = (
        earlier_power.sqrt() * variance / (1 - power) * sample
        + (1 - variance).sqrt() * (1 - earlier_power) / (1 - power) * noisy
    )
    found = process.step(sample, noisy, time, earlier, eta=1.0, fresh=torch.zeros_like(noisy))
    torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("moments", MOMENTS)
def test_a_step_by_the_true_samples_leaves_noise_of_the_schedules_strength(moments, eta):
    time, earlier = torch.tensor(moments, dtype=torch.float64)
    process, samples = Diffusion("cosine"), normal(200_000)
    noisy = process.noisy(samples, normal(200_000, seed=1), time.expand(200_000))
    less = process.step(samples, noisy, time, earlier, eta=eta, fresh=normal(200_000, seed=2))
    power = signal("cosine", earlier)
    left = less - power.sqrt() * samples
    assert float(left.var()) == pytest.approx(float(1 - power), rel=0.02, abs=1e-12)
    assert abs(float((left * samples).mean())) < 0.01


# Samplers on data whose best denoiser is known: a normal with this mean and deviation

MEAN, DEVIATION = 0.7, 0.3


def best_denoiser(process):
    """The mean of the target given the noisy sample, which is linear in it."""

    def predict(noisy, times, estimates):
        alpha, sigma = process.coefficients(times, noisy)
        variance = alpha**2 * DEVIATION**2 + sigma**2
        sample = MEAN + alpha * DEVIATION**2 / variance * (noisy - alpha * MEAN)
        noise = sigma / variance * (noisy - alpha * MEAN)
        return process.target(sample, noise, times)

    return predict


def last(process, noise, steps, **options):
    *_, (samples, estimates) = process.denoise(best_denoiser(process), noise, steps=steps, **options)
    torch.testing.assert_close(samples, estimates)
    return samples


@every_process
def test_ddim_converges_to_the_solution_of_its_equation_on_a_gaussian(process):
    noise = normal(100, 1)
    # Along the solution the place within the marginal distribution stays: from time 1 to time 0.
    power = float(signal(process.schedule, torch.tensor(1.0)))
    place = (noise - math.sqrt(power) * MEAN) / math.sqrt(power * DEVIATION**2 + 1 - power)
    expected = MEAN + DEVIATION * place
    errors = [(last(process, noise, steps) - expected).abs().max() for steps in (200, 400, 800)]
    assert errors[-1] < 0.01
    for one, next_one in pairwise(errors):
        assert 0.4 < next_one / one < 0.6  # of first order


@every_process
def test_ancestral_samples_have_mean_and_deviation_of_the_gaussian(process):
    draw = torch.Generator().manual_seed(3)
    noise = normal(10_000, 1)
    samples = last(process, noise, 600, eta=1.0, draw=lambda: torch.randn(10_000, 1, generator=draw))
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(samples.std()) == pytest.approx(DEVIATION, rel=0.04)


def test_what_is_predicted_changes_no_sample():
    noise = normal(50, 1)
    found = [last(Diffusion("cosine", prediction), noise, 20) for prediction in PREDICTIONS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


def test_self_conditioning_gives_each_prediction_the_estimates_before():
    process, given = Diffusion("cosine", "v"), []

    def predict(noisy, times, estimates):
        given.append(estimates)
        return best_denoiser(process)(noisy, times, None)

    path = list(process.denoise(predict, normal(5, 1), steps=4, self_conditioning=True))
    assert torch.equal(given[0], torch.zeros(5, 1, dtype=torch.float64))
    for estimates, (_, before) in zip(given[1:], path, strict=False):
        assert torch.equal(estimates, before)
    given.clear()
    list(process.denoise(predict, normal(5, 1), steps=4))
    assert given == [None] * 4


# Guidance


def test_guidance_leads_away_from_the_prediction_without_a_label():
    seen = []

    def denoiser(noisy, times, labels, estimates):
        seen.append((len(noisy), labels.tolist(), estimates is None))
        return noisy * labels[:, None] + times[:, None]

    noisy, times, labels = normal(3, 2), TIMES[:3], torch.tensor([0, 1, 2])
    found = guided(denoiser, labels, 4, 0.5)(noisy, times, None)
    torch.testing.assert_close(found, 1.5 * noisy * labels[:, None] - 0.5 * noisy * 4 + times[:, None])
    plain = guided(denoiser, labels, 4)(noisy, times, noisy)
    torch.testing.assert_close(plain, noisy * labels[:, None] + times[:, None])
    assert seen == [(6, [0, 1, 2, 4, 4, 4], True), (3, [0, 1, 2], False)]


def test_guidance_of_every_prediction_means_the_same_samples():
    samples, other, noisy = normal(8, 4), normal(8, 4, seed=1), normal(8, 4, seed=2)
    found = []
    for prediction in PREDICTIONS:
        process = Diffusion("cosine", prediction)
        alpha, sigma = process.coefficients(TIMES, noisy)
        by_label = [process.target(x, (noisy - alpha * x) / sigma, TIMES) for x in (samples, other)]

        def denoiser(noisy, times, labels, estimates, by_label=by_label):
            return torch.cat(by_label)

        predictions = guided(denoiser, torch.zeros(8, dtype=torch.long), 1, 2.0)(noisy, TIMES, None)
        found.append(process.estimate(predictions, noisy, TIMES))
    for one in found:
        torch.testing.assert_close(one, 3 * samples - 2 * other, rtol=1e-6, atol=1e-6)


def test_a_denoiser_in_parts_says_what_it_says_of_all():
    sizes = []

    def denoiser(noisy, times, labels, estimates):
        sizes.append(len(noisy))
        return noisy * times[:, None] + labels[:, None] - estimates

    inputs = normal(8, 2), TIMES, torch.arange(8), normal(8, 2, seed=1)
    whole = denoiser(*inputs)
    assert torch.equal(in_parts(denoiser, 3)(*inputs), whole)
    assert in_parts(denoiser, 3)(*(part[:0] for part in inputs)).shape == (0, 2)
    assert sizes == [8, 3, 3, 2, 0]


# What is drawn


def test_even_times_have_one_in_each_part_and_a_steadier_mean():
    draw = torch.Generator().manual_seed(0)
    drawn = torch.stack([even_times(16, draw) for _ in range(2000)])
    assert torch.equal((drawn * 16).floor().sort(1).values, torch.arange(16).double().expand(2000, 16))
    assert drawn[:, 3].mean().item() == pytest.approx(0.5, abs=0.03)
    assert drawn[:, 3].var().item() == pytest.approx(1 / 12, rel=0.05)
    assert drawn.square().mean(1).var() < 0.1 * torch.rand(2000, 16, generator=draw).square().mean(1).var()


@pytest.mark.parametrize("count", (2, 7, 64))
def test_one_of_each_pair_is_chosen_with_equal_chances(count):
    draw = torch.Generator().manual_seed(0)
    chosen = torch.stack([one_of_each_pair(count, draw) for _ in range(2000)])
    assert chosen.shape == (2000, count)
    pairs = chosen[:, : count // 2 * 2].view(2000, -1, 2)
    assert (pairs.sum(2) == 1).all()
    assert chosen.double().mean(0).tolist() == pytest.approx([0.5] * count, abs=0.06)
