import math
import re

import pytest
import torch

from lightning_custom.datasets import Images
from lightning_custom.generation import GenerationScores
from lightning_custom.mode_collapse import mode_collapse
from lightning_custom.testing import single_process

CLASSES = 5


class Reader(torch.nn.Module):
    """Features are the pixels, and the class is that of the nearest of five centres on the diagonal."""

    def forward(self, images):
        flat = images.flatten(1)
        distances = torch.stack([(flat - 4 * label).norm(dim=1) for label in range(CLASSES)], dim=1)
        return flat, (-5 * distances).softmax(1)


def samples(labels, noise=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return 4.0 * labels.view(-1, 1, 1, 1) + noise * torch.randn(len(labels), 1, 2, 2, generator=draw)


@pytest.fixture(scope="module")
def scorer():
    labels = torch.arange(1000) % CLASSES
    return GenerationScores(single_process(), Images(samples(labels), labels, CLASSES), Reader())


def test_samples_as_good_as_real_ones_are_no_collapse(scorer):
    assert mode_collapse(scorer(samples(scorer.labels, seed=1))) is None


def test_samples_that_are_only_bad_are_no_collapse(scorer):
    far = samples(scorer.labels, seed=1) + 200
    assert mode_collapse(scorer(far) | {"val/reverse_kl": 0.0}) is None


def test_the_same_sample_over_and_over_is_seen_as_such(scorer):
    text = mode_collapse(scorer(torch.zeros(500, 1, 2, 2) + 1e-3 * samples(scorer.labels)))
    assert "samples vary 0.0% as much as real images do (val/spread)" in text
    assert "20.0% of the data's classes" in text
    assert "To try: the relativistic loss (--loss r3)" in text


def test_a_sample_for_each_class_is_seen_by_its_coverage_alone(scorer):
    text = mode_collapse(scorer(samples(scorer.labels, noise=0.05, seed=1)))
    assert "samples lie among real images" in text
    assert "val/spread" not in text
    assert "data's classes" not in text


def test_missing_classes_are_counted(scorer):
    text = mode_collapse(scorer(samples(scorer.labels % 2, seed=1)))
    (share,) = re.findall(r"as if over ([\d.]+)% of the data's classes", text)
    assert float(share) == pytest.approx(40, abs=2)
    assert "val/spread" not in text
    assert mode_collapse({"val/reverse_kl": math.log(5 / 3)}) is None  # three of five


@pytest.mark.parametrize("scores", [{}, {"val/fid": 3.0}, {"val/spread": math.nan, "val/coverage": 0.0}])
def test_scores_that_are_not_there_say_nothing(scores):
    assert mode_collapse(scores) is None
