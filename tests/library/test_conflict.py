import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.conflict import conflict, delta_m


def gradients(tasks=4, size=50, seed=0):
    rows = torch.randn(tasks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows * torch.logspace(-6, 6, tasks, dtype=torch.float64)[:, None]


def read(rows):
    return conflict(rows @ rows.T)


def test_the_gram_matrix_tells_what_the_gradients_would():
    rows = gradients()
    found, array = read(rows), rows.numpy()
    norms = np.linalg.norm(array, axis=1)
    assert found.norms.numpy() == pytest.approx(norms, rel=1e-14)
    assert found.cosines.numpy() == pytest.approx(cosine_similarity(array), abs=1e-14)
    expected = 2 * np.outer(norms, norms) / (norms[:, None] ** 2 + norms**2)
    assert found.magnitude_similarity.numpy() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_condition_number_is_that_of_the_singular_values(tasks):
    rows = torch.randn(tasks, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[0] *= 1000
    assert read(rows).condition_number == pytest.approx(np.linalg.cond(rows.numpy()), rel=1e-8)


def test_dependent_gradients_have_no_finite_condition_number():
    rows = gradients(3)
    rows[2] = rows[0] - 0.5 * rows[1]
    assert read(rows).condition_number == math.inf
    assert read(torch.zeros(2, 3)).condition_number == math.inf


def test_opposed_equal_and_orthogonal_gradients():
    found = read(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 2.0]]))
    assert found.cosines.tolist() == [[1, -1, 0], [-1, 1, 0], [0, 0, 1]]
    assert found.magnitude_similarity.tolist() == [[1, 0.8, 0.8], [0.8, 1, 1], [0.8, 1, 1]]


def test_a_task_without_a_gradient_counts_as_unlike_everything():
    found = read(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert found.cosines.tolist() == [[pytest.approx(1), 0], [0, 0]]
    assert found.magnitude_similarity.tolist() == [[1, 0], [0, 0]]


def test_the_scale_of_the_gradients_costs_no_digits():
    rows = gradients(3)
    for scale in (1e-140, 1e140):
        found = read(rows * scale)
        assert torch.allclose(found.cosines, read(rows).cosines, rtol=0, atol=1e-14)
        assert torch.allclose(found.magnitude_similarity, read(rows).magnitude_similarity, rtol=1e-13)


def test_scores_are_of_pairs_of_different_tasks():
    found = read(torch.tensor([[3.0, 0.0], [-4.0, 0.0], [0.0, 4.0]]))
    scores = found.scores(["left", "right", "depth"])
    assert scores == {
        "conflict/norm/left": 3,
        "conflict/norm/right": 4,
        "conflict/norm/depth": 4,
        "conflict/cosine_min": -1,
        "conflict/cosine_mean": pytest.approx(-1 / 3),
        "conflict/magnitude_similarity_min": pytest.approx(0.96),
        "conflict/magnitude_similarity_mean": pytest.approx((0.96 + 0.96 + 1) / 3),
        "conflict/condition_number": math.inf,
    }
    assert read(torch.tensor([[3.0, 4.0]])).scores(["alone"]) == {
        "conflict/norm/alone": 5,
        "conflict/condition_number": 1,
    }


def test_delta_m_is_the_mean_relative_gain_in_percent():
    baselines = {"segmentation": 40.0, "depth": 0.6, "normals": 20.0}
    scores = {"segmentation": 42.0, "depth": 0.63, "normals": 18.0}
    rising = {"segmentation": True, "depth": False, "normals": False}
    assert delta_m(scores, baselines, rising) == pytest.approx((5 - 5 + 10) / 3)
    assert delta_m(baselines, baselines, rising) == 0
    assert delta_m(scores, baselines, True) == pytest.approx((5 + 5 - 10) / 3)
    assert delta_m({"return": -90.0}, {"return": -100.0}, True) == pytest.approx(10)


def test_delta_m_of_the_published_multimnist_scores():
    """Sener and Koltun 2018, table 1: single task against MGDA-UB and against equal weights."""
    single = {"left": 97.23, "right": 95.90}
    assert delta_m({"left": 97.26, "right": 95.90}, single, True) == pytest.approx(0.0154, abs=1e-4)
    assert delta_m({"left": 96.46, "right": 94.99}, single, True) == pytest.approx(-0.8704, abs=1e-4)


def test_baselines_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="baselines: of left, scores of left, right; give one of each"):
        delta_m({"left": 1.0, "right": 1.0}, {"left": 1.0}, True)
    with pytest.raises(ConfigError, match="baselines: of none, scores of none"):
        delta_m({}, {}, True)
    with pytest.raises(ConfigError, match="baselines: left is 0, to which nothing is relative; leave it out"):
        delta_m({"left": 1.0}, {"left": 0.0}, True)
