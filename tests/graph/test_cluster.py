import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans

from tfcompress.graph.cluster import find_clusters


def random_weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def error(w, found):
    return float(np.square(w - found.weight(), dtype=np.float64).sum())


def least_error(values, clusters):
    """Over all ways to cut the sorted values into intervals, which the best one is among."""
    values = np.sort(values.astype(np.float64))
    return min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cuts))
        for cuts in itertools.combinations(range(1, len(values)), clusters - 1)
    )


def test_kmeans_is_optimal_on_small_weights_but_for_a_few():
    ratios = []
    for seed, clusters in itertools.product(range(10), (2, 3, 4)):
        w = random_weight(11, seed=seed)
        found = find_clusters(w, clusters)
        assert np.all(np.diff(found.centroids) > 0)
        ratios.append(error(w, found) / least_error(w, clusters))
    # Lloyd's algorithm may end in a local optimum; with one run, every second does.
    assert np.mean(np.array(ratios) < 1 + 1e-5) >= 0.9
    assert min(ratios) > 1 - 1e-5
    assert np.mean(ratios) < 1.02


def test_each_centroid_is_the_mean_of_its_members():
    w = random_weight(20, 30)
    found = find_clusters(w, 5)
    means = [w[found.indices == k].mean() for k in range(5)]
    np.testing.assert_allclose(found.centroids, means, rtol=1e-3)


def test_a_large_weight_is_clustered_as_well_from_its_histogram():
    w = random_weight(100, 1000)
    w[0, 0] = 30.0  # One outlier makes the bins wide.
    alone = KMeans(16, n_init=2, random_state=0).fit(w.reshape(-1, 1)).inertia_
    assert error(w, find_clusters(w)) < 1.01 * alone


def test_linear_by_hand():
    found = find_clusters(np.array([-1.0, 0.9, 2.0, 3.0]), 3, "linear")
    assert found.centroids.tolist() == [-1.0, 1.0, 3.0]
    assert found.indices.tolist() == [0, 1, 1, 2]


def test_density_by_hand():
    # Two thirds lie below 2: two of the three centroids do. Medians of each third.
    w = np.array([1.0, 1.2, 1.4, 1.6, 1.8, 1.9, 5.0, 6.0, 7.0])
    found = find_clusters(w, 3, "density")
    expected = [1.2 + 0.2 / 3, 1.8, 5 + 2 / 3]
    np.testing.assert_allclose(found.centroids, expected, rtol=1e-6)
    assert found.indices.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_random_depends_on_the_seed_alone():
    w = random_weight(50)
    one, again, other = (find_clusters(w, 4, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.centroids, again.centroids)
    assert not np.array_equal(one.centroids, other.centroids)
    assert w.min() <= one.centroids.min() and one.centroids.max() <= w.max()


@pytest.mark.parametrize("initialization", ["kmeans++", "linear", "density", "random"])
@pytest.mark.parametrize("axes", [(0, 1), (0,)])
def test_exactly_the_zeros_stay_zeros(initialization, axes):
    w = random_weight(30, 6)
    w[random_weight(30, 6, seed=1) < 0.5] = 0.0
    w[:, 0], w[:, 1] = 0.0, np.abs(w[:, 1]) + 0.1
    found = find_clusters(w, 4, initialization, axes=axes)
    np.testing.assert_array_equal(found.weight() == 0.0, w == 0.0)
    columns = found.weight().T if axes == (0,) else [found.weight()]
    assert max(np.unique(column).size for column in columns) <= 4
    if axes == (0,):
        assert found.zero.tolist() == [True, False, True, True, True, True]


def test_zeros_are_as_other_weights_if_not_preserved():
    w = np.array([0.0, 0.0, 0.2, 1.0, 1.2])
    found = find_clusters(w, 2, preserve_sparsity=False)
    np.testing.assert_allclose(found.centroids, [0.2 / 3, 1.1], rtol=1e-6)
    assert not found.zero


def test_few_different_values_are_kept_as_they_are():
    w = np.array([[0.25, -3.0], [0.25, 7.0]])
    for clusters in (3, 8):
        np.testing.assert_array_equal(find_clusters(w, clusters).weight(), w)
    large = np.tile(w.astype("float32"), (5000, 1))  # Through the histogram.
    np.testing.assert_array_equal(find_clusters(large, 16).weight(), large)


def test_a_constant_and_an_empty_weight():
    np.testing.assert_array_equal(
        find_clusters(np.full((3, 2), 0.5)).weight(), np.full((3, 2), 0.5)
    )
    assert find_clusters(np.zeros((0, 4))).indices.shape == (0, 4)
    assert find_clusters(np.zeros((3, 4))).weight().tolist() == np.zeros((3, 4)).tolist()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clusters": 1}, "clusters=1 must be a whole number, 2 or more"),
        ({"clusters": 2.5}, "clusters=2.5 must be a whole number"),
        ({"clusters": True}, "clusters=True must be"),
        ({"initialization": "kmeans"}, r"'kmeans' is not known; pass one of \('kmeans\+\+'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_clusters(np.ones(4), **arguments)


def test_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="2 of the 3 weights to cluster are not finite"):
        find_clusters(np.array([1.0, np.nan, np.inf]))


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install \"tfcompress\[cluster\]\""):
        find_clusters(random_weight(40))
    assert find_clusters(random_weight(40), initialization="linear").centroids.size == 16
