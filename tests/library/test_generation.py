import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_custom.datasets import Images
from lightning_custom.generation import GenerationScores, frechet_distance, kernel_distance
from lightning_custom.testing import in_processes, single_process


def gaussian(mean, covariance, size=400, seed=0):
    """Points whose sample mean and covariance are exactly the given ones."""
    points = np.random.default_rng(seed).standard_normal((size, len(mean)))
    points -= points.mean(0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(np.array(covariance)).T + np.array(mean))


def test_fid_of_two_gaussians_with_diagonal_covariances_is_the_closed_form():
    real = gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 4.0]])
    fake = gaussian([2.0, 0.0], [[9.0, 0.0], [0.0, 1.0]], size=300, seed=1)
    # |m - m'|^2 plus the sum of (s - s')^2 over axes
    assert frechet_distance(real, fake) == pytest.approx(4 + 1 + (1 - 3) ** 2 + (2 - 1) ** 2, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)


def test_fid_is_scipys_matrix_square_root():
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((500, 6)), generator.standard_normal((300, 6)) @ generator.random((6, 6))
    first, second = np.cov(real.T), np.cov(fake.T)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected, rel=1e-6)


def test_kid_is_the_unbiased_squared_mmd_of_the_cubic_kernel():
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((40, 3)), generator.standard_normal((40, 3)) + 0.5

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    def off_diagonal_mean(matrix):
        return (matrix.sum() - np.trace(matrix)) / (40 * 39)

    expected = off_diagonal_mean(kernel(real, real)) + off_diagonal_mean(kernel(fake, fake))
    expected -= 2 * kernel(real, fake).mean()
    mean, deviation = kernel_distance(torch.from_numpy(real), torch.from_numpy(fake), subsets=3)
    assert mean == pytest.approx(expected, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6)  # every subset is the whole set


def test_kid_draws_its_subsets_by_a_seed_of_its_own():
    real, fake = torch.randn(60, 3), torch.randn(60, 3)
    torch.manual_seed(1)
    first = kernel_distance(real, fake, most=20)
    left = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), left)
    torch.manual_seed(2)
    assert kernel_distance(real, fake, most=20) == first
    assert first[1] > 0


class Passed(nn.Module):
    """Features that are there already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


class Pixels(nn.Module):
    """Features are the pixels; the class is where the first three are largest."""

    def forward(self, images):
        flat = images.flatten(1)
        return flat, (20 * flat[:, :3]).softmax(1)


def data(size=90):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 3
    images = 0.1 * torch.randn(size, 1, 2, 2, generator=generator)
    images.flatten(1)[torch.arange(size), labels] += 1
    images[:, 0, 1, 1] = 0.5  # dead on real images
    return Images(images, labels, 3)


def matching(scorer, seed=1):
    """Other images of the classes that the scorer asks for."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(len(scorer.labels), 1, 2, 2, generator=generator)
    images.flatten(1)[torch.arange(len(images)), scorer.labels] += 1
    return images


def test_good_samples_reach_the_floor_and_bad_ones_do_not():
    scorer = GenerationScores(single_process(), data(), Pixels())
    assert len(scorer.labels) == 45
    good = scorer(matching(scorer))
    assert good["val/fid_floor"] == scorer.floors["fid"]
    assert good["val/fid"] < 3 * scorer.floors["fid"]
    assert good["val/classes"] == 3
    assert good["val/confident_as_asked"] == 1.0
    assert good["val/coverage"] > 0.7
    same = scorer(torch.eye(4)[:1].view(1, 1, 2, 2).repeat(45, 1, 1, 1))  # one class alone
    assert same["val/fid"] > 10 * scorer.floors["fid"]
    assert same["val/classes"] == 1
    assert same["val/confident_as_asked"] == pytest.approx((scorer.labels == 0).float().mean().item())
    assert same["val/coverage"] < 0.4
    assert same["val/kid"] > good["val/kid"]


def test_a_feature_that_is_dead_on_real_images_does_not_count():
    scorer = GenerationScores(single_process(), data(), Pixels())
    images = matching(scorer)
    changed = images.clone()
    changed[:, 0, 1, 1] += 100
    assert scorer(changed) == scorer(images)


def test_scores_do_not_depend_on_the_features_units():
    class Scaled(Pixels):
        def forward(self, images):
            features, probabilities = super().forward(images)
            return 7 * features + 3, probabilities

    plain, scaled = (GenerationScores(single_process(), data(), kind()) for kind in (Pixels, Scaled))
    images = matching(plain)
    assert scaled(images) == pytest.approx(plain(images), rel=1e-3)


def test_an_unsure_sample_counts_for_no_class():
    scorer = GenerationScores(single_process(), data(), Pixels())
    scores = scorer(torch.zeros(45, 1, 2, 2))
    assert (scores["val/classes"], scores["val/confident_as_asked"]) == (0, 0)


def work(fabric):
    scorer = GenerationScores(fabric, data(), Pixels())
    return scorer(matching(scorer).tensor_split(2)[fabric.global_rank])


@pytest.mark.distributed
def test_two_processes_score_as_one():
    scorer = GenerationScores(single_process(), data(), Pixels())
    expected = scorer(matching(scorer))
    for result in in_processes(work, 2):
        assert result == expected


def test_fid_is_torchmetrics():
    metric = FrechetInceptionDistance(feature=Passed(5))
    real, fake = torch.randn(300, 5), 1.5 * torch.randn(200, 5) + 0.3
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_fid_of_fewer_samples_than_features_is_scipys():
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((12, 20)), generator.standard_normal((15, 20)) + 0.2
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(fake.T) + 1e-12 * np.eye(20)).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(real.T) + np.cov(fake.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected, rel=1e-4)


def test_floors_are_the_scores_of_the_other_real_half():
    images = data()
    scorer = GenerationScores(single_process(), images, Pixels())
    other = scorer._splits[0][1]
    found = scorer(images.images[other])
    for name in ("precision", "recall", "density", "coverage", "spread"):
        assert found[f"val/{name}"] == pytest.approx(scorer.floors[name])
    assert scorer.floors["spread"] == pytest.approx(1, abs=0.2)


def test_features_of_another_module_are_taken_as_they_are():
    def features(images):
        return 100 * images.flatten(1)[:, :2] + 7

    images = data()
    scorer = GenerationScores(single_process(), images, Pixels(), features=features)
    fake = matching(scorer)
    found = scorer(fake)
    halves = [features(images.images)[half] for half, _ in scorer._splits]
    expected = sum(frechet_distance(half, features(fake)) for half in halves) / 5
    assert found["val/fid"] == pytest.approx(expected, rel=1e-5)
    assert found["val/classes"] == 3  # those are still the classifier's


def test_data_of_one_class_has_no_scores_of_classes():
    scorer = GenerationScores(single_process(), data()._replace(labels=torch.zeros(90).long(), num_classes=1), Pixels())
    found = scorer(matching(scorer))
    assert {"val/fid", "val/kid", "val/precision", "val/recall", "val/density", "val/coverage"} <= found.keys()
    assert not {"val/classes", "val/confident_as_asked", "val/modes", "val/reverse_kl"} & found.keys()
