import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lightning_custom import neighbourhoods
from lightning_custom.errors import ConfigError
from lightning_custom.neighbourhoods import Neighbourhoods, expected_coverage, neighbourhood_scores


def scores(real, fake, k=3):
    return neighbourhood_scores(Neighbourhoods(real, k), Neighbourhoods(fake, k))


def points(size, features=4, seed=0):
    return torch.randn(size, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_radii_are_scikit_learns_distances_to_the_kth_neighbour(k):
    real = points(50)
    distances, _ = NearestNeighbors(n_neighbors=k + 1).fit(real.numpy()).kneighbors(real.numpy())
    torch.testing.assert_close(Neighbourhoods(real, k).radii, torch.from_numpy(distances[:, k]))


@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_their_definitions_over_scikit_learns_neighbours(k):
    real, fake = points(60), 1.3 * points(40, seed=1) + 0.4

    def balls(centres, others):
        """Whether the ball of each centre holds each of the others."""
        search = NearestNeighbors(n_neighbors=k + 1).fit(centres.numpy())
        radii = search.kneighbors(centres.numpy())[0][:, k]
        every = NearestNeighbors(n_neighbors=len(others)).fit(others.numpy())
        distances, index = every.kneighbors(centres.numpy())
        held = torch.zeros(len(centres), len(others), dtype=torch.bool)
        for centre in range(len(centres)):
            held[centre, index[centre][distances[centre] <= radii[centre]]] = True
        return held

    of_real, of_fake = balls(real, fake), balls(fake, real)
    found = scores(real, fake, k)
    assert found["precision"] == pytest.approx(of_real.any(0).double().mean().item())
    assert found["recall"] == pytest.approx(of_fake.any(0).double().mean().item())
    assert found["density"] == pytest.approx(of_real.sum(0).double().mean().item() / k)
    assert found["coverage"] == pytest.approx(of_real.any(1).double().mean().item())
    assert all(0 < value < 1 for value in found.values())


def test_four_points_on_a_line_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii 1, 1, 2, 7
    fake = torch.tensor([[0.5], [4.9], [30.0], [60.0]])  # radii 4.4, 4.4, 25.1, 30
    found = scores(real, fake, k=1)
    # 0.5 is in the first two balls, 4.9 in the last two, 30 and 60 in none.
    assert found == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 1.0}


def test_the_real_points_themselves_are_all_precise_and_cover_all_and_far_ones_nothing():
    real = points(40)
    same, far = scores(real, real), scores(real, real + 100)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_samples_of_one_of_four_modes_are_precise_but_neither_recall_nor_cover_the_others():
    centres = 20 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    labels = torch.arange(200) % 4
    real = centres[labels] + points(200, 2).float()
    found = scores(real, points(200, 2, seed=1).float())
    assert found["precision"] > 0.9
    assert found["recall"] < 0.3
    assert found["coverage"] < 0.3


def test_samples_far_wider_than_the_data_recall_it_but_are_not_precise():
    found = scores(points(200, 2), 8 * points(200, 2, seed=1))
    assert found["precision"] < 0.4
    assert found["recall"] > 0.9


def test_one_outlier_raises_precision_and_not_density():
    """Why density is there: the outlier's ball holds everything (Naeem et al. 2020, figure 2)."""
    real, fake = points(100, 2), points(100, 2, seed=1) + 12
    outlier = torch.cat([real[:-1], real.new_tensor([[20.0, 20.0]])])
    without, found = scores(real, fake), scores(outlier, fake)
    assert without["precision"] == 0
    assert found["precision"] > 0.9
    assert found["density"] < 0.5


def test_parts_of_any_size_give_the_same(monkeypatch):
    real, fake = points(50), points(40, seed=1)
    whole = scores(real, fake)
    monkeypatch.setattr(neighbourhoods, "_ROWS", 7)
    assert scores(real, fake) == whole


@pytest.mark.parametrize("real, fake, k", [(60, 60, 3), (60, 30, 3), (40, 80, 5)])
def test_as_good_as_real_samples_have_the_expected_coverage_and_density_one(real, fake, k):
    found = [scores(points(real, 2, seed=i), points(fake, 2, seed=1000 + i), k) for i in range(200)]
    coverage = torch.tensor([one["coverage"] for one in found])
    density = torch.tensor([one["density"] for one in found])
    assert coverage.mean().item() == pytest.approx(expected_coverage(real, fake, k), abs=0.015)
    assert density.mean().item() == pytest.approx(1, abs=0.05)


def test_fewer_points_than_neighbours_are_refused_and_so_is_another_k():
    with pytest.raises(ConfigError, match="points: 3; a k-th neighbour with k = 3 needs more than 3"):
        Neighbourhoods(points(3))
    with pytest.raises(ConfigError, match="k: 3 for real and 1 for generated points; take the same"):
        neighbourhood_scores(Neighbourhoods(points(9)), Neighbourhoods(points(9), 1))
