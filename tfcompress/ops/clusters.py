"""Weight sharing: weights out of a table of a few values, and back."""

import math

import numpy as np
import tensorflow as tf


def share(
    centroids: tf.Tensor, indices: tf.Tensor, zero: tf.Tensor, axes: tuple[int, ...]
) -> tf.Tensor:
    """The weight whose every element is the centroid that its index names.

    The gradient of a centroid is the sum of the gradients of the elements that share it, exactly.

    Args:
        centroids: Float32, `(clusters,)`, or `(channels, clusters)` where each channel has its own.
        indices: Integers in [0, clusters), of the shape of the weight.
        zero: Boolean, `()` or `(channels,)`: whether the first centroid is fixed at 0.
        axes: The axes of the weight that share one set of centroids; all of them for one set.

    Returns:
        A float32 tensor of the shape of `indices`.

    Example:

    >>> share(tf.constant([0.0, 0.5, 2.0]), tf.constant([[1, 2], [0, 1]]), False, (0, 1)).numpy()
    array([[0.5, 2. ],
           [0. , 0.5]], dtype=float32)

    Reference: Han et al. 2016, https://arxiv.org/abs/1510.00149, section 3.
    """
    table = tf.where(_fixed(centroids, zero), 0.0, centroids)
    offsets = _first_of_channel(indices.shape, axes, centroids.shape[-1])
    return _look_up(tf.reshape(table, [-1]), tf.cast(indices, tf.int32) + offsets)


def nearest(
    w: tf.Tensor, centroids: tf.Tensor, zero: tf.Tensor, axes: tuple[int, ...]
) -> tf.Tensor:
    """The index of the centroid that lies nearest to each element of a weight.

    Args:
        w: Float32 tensor of any shape.
        centroids: As for `share`, in any order.
        zero: As for `share`; nothing is nearest to a centroid that is fixed at 0.
        axes: As for `share`.

    Returns:
        An int32 tensor of the shape of `w`.

    Example:

    >>> nearest(tf.constant([0.1, 0.9, -3.0]), tf.constant([1.0, 0.0]), False, (0,)).numpy()
    array([1, 0, 1], dtype=int32)
    """
    candidates = tf.where(_fixed(centroids, zero), np.float32(np.inf), centroids)
    candidates = tf.reshape(candidates, [-1, centroids.shape[-1]])
    order = tf.argsort(candidates, axis=-1)
    ascending = tf.gather(candidates, order, batch_dims=1)
    # Between centroids, not to all of them: no tensor of weights times clusters.
    borders = (ascending[:, 1:] + ascending[:, :-1]) / 2.0
    places = tf.searchsorted(borders, by_channel(w, axes))
    return _as_weight(tf.gather(order, places, batch_dims=1), w.shape, axes)


def by_channel(w: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """A weight as `(channels, elements that share centroids)`.

    Example:

    >>> by_channel(tf.constant([[1, 2, 3], [4, 5, 6]]), axes=(0,)).numpy().tolist()
    [[1, 4], [2, 5], [3, 6]]
    """
    channels = math.prod(w.shape[axis] for axis in _channel_axes(w.shape, axes))
    return tf.reshape(tf.transpose(w, [*_channel_axes(w.shape, axes), *axes]), [channels, -1])


def num_channels(shape, axes: tuple[int, ...]) -> int:
    """How many sets of centroids a weight of this shape has.

    Example:

    >>> num_channels((3, 3, 8, 16), axes=(0, 1, 2))
    16
    """
    return math.prod(shape[axis] for axis in _channel_axes(shape, axes))


def _as_weight(rows, shape, axes):
    """What `by_channel` took apart, back in the shape of the weight."""
    order = [*_channel_axes(shape, axes), *axes]
    moved = tf.reshape(rows, [shape[axis] for axis in order])
    return tf.transpose(moved, np.argsort(order))


def _channel_axes(shape, axes) -> list[int]:
    return [axis for axis in range(len(shape)) if axis not in axes]


def _fixed(centroids, zero):
    """Which of the centroids are fixed at 0."""
    first = tf.equal(tf.range(centroids.shape[-1]), 0)
    return tf.logical_and(tf.expand_dims(tf.convert_to_tensor(zero), -1), first)


def _first_of_channel(shape, axes, clusters) -> np.ndarray:
    """Where the centroids of an element begin in the flat table, broadcastable to the weight."""
    sizes = [1 if axis in axes else size for axis, size in enumerate(shape)]
    return (np.arange(math.prod(sizes), dtype=np.int32) * clusters).reshape(sizes)


@tf.custom_gradient
def _look_up(table, ids):
    def gradient(upstream):
        return _sum_by_id(upstream, ids, table.shape[0]), None

    return tf.gather(table, ids), gradient


def _sum_by_id(values, ids, size):
    """As the gradient of `tf.gather`, which takes 10 times as long on a CPU in graph mode."""
    # Threads share out whole rows: of one row, the order of the sum would change from run to run.
    rows = max(1, min(64, values.shape.num_elements() // size))
    padding = [[0, -values.shape.num_elements() % rows]]
    values, ids = (
        tf.reshape(tf.pad(tf.reshape(x, [-1]), padding), [rows, -1]) for x in (values, ids)
    )
    # `tf.math.bincount` is made of more than this, and does not compile under XLA.
    sums = tf.raw_ops.DenseBincount(input=ids, size=size, weights=values)
    return tf.reduce_sum(sums, axis=0)
