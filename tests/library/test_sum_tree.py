"""Sums, and what is found by them, against cumulative sums."""

import numpy as np
import pytest

from lightning_custom.sum_tree import SumTrees

SIZES = [1, 2, 64, 65, 100, 5000]


def filled(leaves, seed=0):
    values = np.random.default_rng(seed).integers(0, 9, (3, leaves)).astype(np.float64)
    values[:, 0] += 1
    trees = SumTrees(3, leaves)
    places = np.arange(3 * leaves)
    trees.set_(places // leaves, places % leaves, values.ravel())
    return trees, values


@pytest.mark.parametrize("leaves", SIZES)
def test_totals_are_the_sums_of_the_leaves(leaves):
    trees, values = filled(leaves)
    assert trees.totals().tolist() == values.sum(1).tolist()
    trees.set_(np.array([1, 2]), np.array([leaves - 1, 0]), np.array([0.5, 0.25]))
    values[1, -1], values[2, 0] = 0.5, 0.25
    assert trees.totals().tolist() == values.sum(1).tolist()
    assert [trees.values(tree).tolist() for tree in range(3)] == values.tolist()


@pytest.mark.parametrize("leaves", SIZES)
def test_a_leaf_is_found_where_the_cumulative_sum_passes(leaves):
    trees, values = filled(leaves)
    for tree in range(3):
        sums = np.arange(0, values[tree].sum(), 0.5)
        found = trees.find(np.full(len(sums), tree), sums)
        assert found.tolist() == np.searchsorted(np.cumsum(values[tree]), sums, side="right").tolist()
        assert trees.get(np.full(len(sums), tree), found).min() > 0


def test_no_empty_leaf_is_found_beyond_the_total():
    trees, values = filled(5)
    values[0, 3:] = 0
    trees.set_(np.zeros(2, np.int64), np.array([3, 4]), np.zeros(2))
    beyond = np.array([values[0].sum(), values[0].sum() * (1 + 1e-12), np.inf])
    found = trees.find(np.zeros(3, np.int64), beyond)
    assert (values[0, found] > 0).all()


def test_of_a_leaf_that_is_set_twice_the_last_counts():
    trees = SumTrees(1, 4)
    trees.set_(np.zeros(3, np.int64), np.array([2, 1, 2]), np.array([5.0, 1.0, 3.0]))
    assert trees.values(0).tolist() == [0, 1, 3, 0]
    assert trees.totals().tolist() == [4]


def test_loaded_leaves_have_the_sums_of_set_ones_to_the_bit():
    draw = np.random.default_rng(0)
    values, order = draw.random(4500), draw.permutation(4500)
    one, other = SumTrees(2, 5000), SumTrees(2, 5000)
    for leaves in np.array_split(order, 50):
        one.set_(np.ones_like(leaves), leaves, values[leaves])
    other.load_(1, values)
    assert one.totals().tolist() == other.totals().tolist()
    sums = np.linspace(0, values.sum(), 1000)
    np.testing.assert_array_equal(*(tree.find(np.ones(1000, np.int64), sums) for tree in (one, other)))
    for level, expected in zip(one._levels, other._levels, strict=True):
        np.testing.assert_array_equal(level, expected)
