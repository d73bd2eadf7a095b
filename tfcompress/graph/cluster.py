"""Finding the values that a weight is to share: k-means, on the host."""

import dataclasses

import numpy as np

from tfcompress.ops.clusters import by_channel, nearest, share
from tfcompress.optional import require

# Of more values, k-means sees the means of as many bins: its result moves by parts in a thousand.
_MOST_POINTS = 8192
_RESTARTS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """The few values of a weight; the arguments of `ops.clusters.share`.

    Args:
        centroids: Float32, `(clusters,)`, or `(channels, clusters)` where each channel has its own.
        indices: Int32, of the shape of the weight.
        zero: Boolean, `()` or `(channels,)`: whether the first centroid is fixed at 0.
        axes: The axes of the weight that share one set of centroids.
    """

    centroids: np.ndarray
    indices: np.ndarray
    zero: np.ndarray
    axes: tuple[int, ...]

    def weight(self) -> np.ndarray:
        """The weight with its values shared."""
        return share(self.centroids, self.indices, self.zero, self.axes).numpy()


def find_clusters(
    w: np.ndarray,
    clusters: int = 16,
    initialization: str = "kmeans++",
    preserve_sparsity: bool = True,
    axes: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Clusters:
    """Share out the elements of a weight among a few values.

    `"kmeans++"` is k-means, the best of 10 runs of Lloyd's algorithm from seeds by k-means++. The
    others say where the centroids are, and every element goes to the nearest one: `"linear"`,
    evenly spaced from the smallest to the largest element; `"density"`, the medians of as many
    equal shares of the elements; `"random"`, uniform between the smallest and the largest.

    Args:
        w: Finite floats of any shape.
        clusters: Number of values, 2 or more, in all or for each channel. Where there are fewer
            different elements, k-means keeps these, and some centroids are left over.
        initialization: `"kmeans++"`, `"linear"`, `"density"` or `"random"`.
        preserve_sparsity: Whether zeros stay exactly 0: where there are any, the first centroid is
            fixed at 0 for them, and the others are found among the other elements.
        axes: The axes that share one set of centroids; None for all of them.
        seed: Of what is drawn at random.

    Returns:
        `Clusters`; centroids ascend, but for the one that is fixed at 0.

    Raises:
        ValueError: An argument is not one of the above, or an element is not finite.
        ImportError: scikit-learn, which k-means needs, is not installed.

    Example:

    >>> found = find_clusters(np.array([0.0, 1.0, 1.2, 5.0, 0.0, 5.2]), clusters=3)
    >>> found.centroids, found.indices
    (array([0. , 1.1, 5.1], dtype=float32), array([0, 1, 1, 2, 0, 2], dtype=int32))

    Reference: Han et al. 2016, https://arxiv.org/abs/1510.00149, section 3.
    """
    check_clusters(clusters, initialization)
    w = np.asarray(w, np.float32)
    if not np.isfinite(w).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(w))} of the {w.size} weights to cluster are not "
            "finite. Expected finite floats; train the model again, with a lower learning rate."
        )
    axes = tuple(range(w.ndim)) if axes is None else axes
    rows = by_channel(w, axes).numpy()
    zero = np.any(rows == 0.0, axis=1) & preserve_sparsity
    place = _INITIALIZATIONS[initialization]
    pairs = zip(rows, zero, strict=True)
    centroids = np.stack([_centroids(row, clusters, held, place, seed) for row, held in pairs])
    if len(axes) == w.ndim:
        centroids, zero = centroids[0], zero[0]
    indices = nearest(w, centroids, zero, axes).numpy()
    if preserve_sparsity:
        indices[w == 0.0] = 0
    return Clusters(centroids, indices, np.asarray(zero), axes)


def check_clusters(clusters: int, initialization: str) -> None:
    """Raise a ValueError if `find_clusters` does not take these.

    >>> check_clusters(1, "linear")
    Traceback (most recent call last):
    ...
    ValueError: clusters=1 must be a whole number, 2 or more: how many different values...
    """
    if isinstance(clusters, bool) or not isinstance(clusters, int | np.integer) or clusters < 2:
        raise ValueError(
            f"clusters={clusters!r} must be a whole number, 2 or more: how many different values a "
            "weight may have, e.g. 16."
        )
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            f"initialization={initialization!r} is not known; pass one of "
            f"{tuple(_INITIALIZATIONS)}."
        )


def _centroids(row, clusters, held, place, seed) -> np.ndarray:
    """Where the clusters of the elements that share them are, ascending behind a fixed 0."""
    elements = row[row != 0.0] if held else row
    wanted = clusters - int(held)
    found = np.zeros(wanted)
    if elements.size:
        found = np.sort(place(elements.astype(np.float64), wanted, seed))
    return np.concatenate([np.zeros(int(held)), found]).astype(np.float32)


def _kmeans(elements, count, seed):
    points, weights = _condensed(elements)
    if len(points) <= count:
        return np.pad(points, (0, count - len(points)), mode="edge")
    kmeans = require("sklearn.cluster", extra="cluster").KMeans(
        count, n_init=_RESTARTS, random_state=seed
    )
    return kmeans.fit(points[:, None], sample_weight=weights).cluster_centers_[:, 0]


def _condensed(elements) -> tuple[np.ndarray, np.ndarray]:
    """Points and how many elements each stands for."""
    if elements.size <= _MOST_POINTS:
        return np.unique(elements, return_counts=True)
    low, high = elements.min(), elements.max()
    bins = ((elements - low) * ((_MOST_POINTS - 1) / max(high - low, 1e-30))).astype(np.int64)
    counts = np.bincount(bins, minlength=_MOST_POINTS)
    sums = np.bincount(bins, elements, minlength=_MOST_POINTS)
    filled = counts > 0
    return sums[filled] / counts[filled], counts[filled]


def _linear(elements, count, seed):
    return np.linspace(elements.min(), elements.max(), count)


def _density(elements, count, seed):
    return np.quantile(elements, (np.arange(count) + 0.5) / count)


def _random(elements, count, seed):
    return np.random.default_rng(seed).uniform(elements.min(), elements.max(), count)


_INITIALIZATIONS = {
    "kmeans++": _kmeans,
    "linear": _linear,
    "density": _density,
    "random": _random,
}
