import math

import pytest
import scipy.stats
import torch

from lightning_custom.class_scores import class_scores, expected_modes, perfect_reverse_kl

EVEN = torch.full((10,), 0.1)


def test_even_classes_have_the_largest_entropy_and_no_divergence():
    scores = class_scores(torch.arange(500) % 10, EVEN)
    assert scores == pytest.approx({"modes": 10, "class_entropy": math.log(10), "reverse_kl": 0}, abs=1e-6)


def test_a_single_class_has_no_entropy_and_the_largest_divergence():
    scores = class_scores(torch.full((500,), 3), EVEN)
    assert scores == pytest.approx({"modes": 1, "class_entropy": 0, "reverse_kl": math.log(10)}, abs=1e-6)


def test_entropy_and_divergence_are_scipys():
    predicted = torch.randint(6, (300,), generator=torch.Generator().manual_seed(0)) // 2 + 1
    shares = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    counts = predicted.bincount(minlength=5).numpy() / 300
    scores = class_scores(predicted, shares)
    assert scores["modes"] == 3
    assert scores["class_entropy"] == pytest.approx(scipy.stats.entropy(counts))
    assert scores["reverse_kl"] == pytest.approx(scipy.stats.entropy(counts, shares.double().numpy()), rel=1e-6)
    forward = scipy.stats.entropy(shares.double().numpy(), counts)
    assert forward == math.inf  # the other direction says nothing as soon as one class is missing


def test_a_class_that_the_data_has_not_diverges_without_bound():
    assert class_scores(torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))["reverse_kl"] == math.inf


@pytest.mark.parametrize("samples, classes", [(5000, 1000), (26_000, 1000), (400, 10)])
def test_perfect_samples_have_what_their_number_alone_makes(samples, classes):
    generator = torch.Generator().manual_seed(0)
    found = [
        class_scores(torch.randint(classes, (samples,), generator=generator), torch.full((classes,), 1 / classes))
        for _ in range(60)
    ]
    mean = {name: sum(one[name] for one in found) / 60 for name in ("modes", "reverse_kl")}
    assert mean["modes"] == pytest.approx(expected_modes(samples, classes), rel=2e-3)
    # The next term of the expansion is a 12th of K / N^2 K^2, which counts at five samples a class.
    assert mean["reverse_kl"] == pytest.approx(perfect_reverse_kl(samples, classes), rel=0.15)
