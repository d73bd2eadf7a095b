"""Allocations: one overall sparsity -> which units of each weight are kept."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfcompress.ops.selection import order_keys, top_k_mask, top_k_masks
from tfcompress.shorthands import resolve

__all__ = ["erk", "get", "global_", "lamp", "num_kept", "uniform"]


def num_kept(num_units: int, sparsity):
    """`max(round(num_units * (1 - sparsity)), 1)`: how many units stay, halves to even.

    Args:
        num_units: How many there are, 1 or more.
        sparsity: Fraction of zeros in [0, 1); a Python float, or a scalar tensor for a graph.

    Returns:
        An int, or a scalar int64 tensor.

    Example:

    >>> num_kept(10, 0.8), num_kept(10, 0.999)
    (2, 1)
    """
    if tf.is_tensor(sparsity):
        kept = tf.round(num_units * (1.0 - tf.cast(sparsity, tf.float64)))
        return tf.cast(tf.maximum(kept, 1.0), tf.int64)
    return max(round(num_units * (1.0 - sparsity)), 1)


def uniform(scores: Sequence[tf.Tensor], sparsity, shapes=None, absolute=False) -> list[tf.Tensor]:
    """Every weight gets the overall sparsity.

    Args:
        scores: Scores of each weight's units.
        sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.
        shapes: Not used; what every allocation takes.
        absolute: Whether `|scores|` are meant; they are not copied.

    Returns:
        A boolean mask for each of `scores`, `num_kept` elements True in each.

    Example:

    >>> masks = uniform([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], 0.5)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, True], [False, True]]
    """
    masks: list[tf.Tensor] = []
    for each, size in zip(scores, _sizes(scores), strict=True):
        with tf.control_dependencies(masks[-1:]):  # One weight's temporaries at a time.
            masks.append(top_k_mask(each, num_kept(size, sparsity), absolute))
    return masks


def global_(scores: Sequence[tf.Tensor], sparsity, shapes=None, absolute=False) -> list[tf.Tensor]:
    """All weights compete: the lowest scores go, wherever they are.

    Args:
        scores: Scores of each weight's units.
        sparsity: Fraction of zeros over all of them, in [0, 1).
        shapes: Not used; what every allocation takes.
        absolute: Whether `|scores|` are meant; they are not copied.

    Returns:
        A boolean mask for each of `scores`, `num_kept` of the total True in all.

    Example:

    >>> masks = global_([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], 0.5)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, False], [True, True]]
    """
    return top_k_masks(scores, num_kept(sum(_sizes(scores)), sparsity), absolute)


def erk(scores: Sequence[tf.Tensor], sparsity, shapes=None) -> list[tf.Tensor]:
    """Erdos-Renyi-Kernel: small weights stay denser than large ones.

    The share that a weight keeps is proportional to `sum(shape) / prod(shape)`. Where it would
    exceed 1 the weight stays whole, where it would keep less than one unit it keeps one, and the
    others share what is left. The counts are those quotas rounded by largest remainder, of equal
    remainders the first, so that they add up to `num_kept` of the total. If that is less than one
    unit a weight, some keep none ([Mocanu et al. 2018](https://arxiv.org/abs/1707.04780);
    [Evci et al. 2020](https://arxiv.org/abs/1911.11134)).

    Args:
        scores: Scores of each weight's units.
        sparsity: Fraction of zeros over all of them, in [0, 1), a float or a scalar tensor.
        shapes: Shapes of the weights behind `scores`; None if the units are the weights.

    Returns:
        A boolean mask for each of `scores`, `num_kept` of the total True in all.

    Example:

    >>> masks = erk([tf.random.normal((4, 4)), tf.random.normal((8, 8))], 0.5)
    >>> [int(tf.reduce_sum(tf.cast(mask, tf.int32))) for mask in masks]
    [13, 27]
    """
    shapes = [tf.TensorShape(shape) for shape in shapes or [each.shape for each in scores]]
    sizes = np.array(_sizes(scores), np.float64)
    density = [sum(shape) / shape.num_elements() for shape in shapes]
    kept = tf.cast(num_kept(int(sizes.sum()), sparsity), tf.float64)
    counts = _largest_remainder(_quotas(sizes, density, kept), kept)
    return [
        top_k_mask(each, tf.maximum(count, 1)) & (count > 0)
        for each, count in zip(scores, tf.unstack(counts, len(scores)), strict=True)
    ]


def lamp(scores: Sequence[tf.Tensor], sparsity, shapes=None) -> list[tf.Tensor]:
    """Layer-adaptive magnitude: all weights compete by what pruning one costs its own weight.

    The score of a unit becomes its square over the sum of the squares of all units that come before
    it when those of its weight are ordered from the largest, itself included; equal ones by index.
    A weight's largest unit gets 1, so that each keeps one before any keeps two
    ([Lee et al. 2021](https://arxiv.org/abs/2010.07611)).

    It sorts every weight whenever masks are chosen, which takes many times longer than the other
    allocations: about half a second a million units on a CPU; and TPUs are slow to compile it.

    Args:
        scores: Scores of each weight's units; negative ones count as 0.
        sparsity: Fraction of zeros over all of them, in [0, 1), a float or a scalar tensor.
        shapes: Not used; what every allocation takes.

    Returns:
        A boolean mask for each of `scores`, `num_kept` of the total True in all.

    Example:

    >>> masks = lamp([tf.constant([1.0, 2.0]), tf.constant([30.0, 40.0])], 0.5)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, True], [False, True]]
    """
    return global_([_layer_adaptive(each) for each in scores], sparsity)


def _sizes(scores):
    return [each.shape.num_elements() for each in scores]


def _quotas(sizes, density, kept):
    """What each weight keeps, a fraction: `clip(scale * density * size, floor, size)`.

    `scale` makes them add up to `kept`. That sum is linear in `scale` between the values at which a
    weight becomes whole or leaves its floor, all known beforehand, so that one table and a linear
    interpolation solve it whatever `kept` is.
    """
    slopes = np.array(density) * sizes

    def scale(floor):
        edges = np.sort(np.concatenate([floor / slopes, sizes / slopes]))
        sums = np.clip(edges[:, None] * slopes, floor, sizes).sum(axis=1)
        right = tf.reduce_sum(tf.cast(sums <= kept, tf.int32))
        right = tf.clip_by_value(right, 1, len(edges) - 1)
        (low, high), (start, end) = (
            (tf.gather(values, right - 1), tf.gather(values, right)) for values in (edges, sums)
        )
        share = tf.math.divide_no_nan(kept - start, end - start)
        return low + tf.clip_by_value(share, 0.0, 1.0) * (high - low)

    def clipped(floor):
        return tf.clip_by_value(scale(floor) * slopes, floor, sizes)

    return tf.where(kept >= len(sizes), clipped(1.0), clipped(0.0))


def _largest_remainder(quotas, total):
    """Whole numbers that add up to `total`: rounded down, the largest remainders get one more."""
    # On a grid, so that remainders that are equal up to rounding tie, in eager mode and under XLA.
    quotas = tf.round(quotas * 2.0**20) / 2.0**20
    counts = tf.floor(quotas)
    remainders = quotas - counts
    index = tf.range(quotas.shape[0])
    larger = remainders[:, tf.newaxis] > remainders
    tied = (remainders[:, tf.newaxis] == remainders) & (index[:, tf.newaxis] < index)
    rank = tf.reduce_sum(tf.cast(larger | tied, tf.int64), axis=0)
    left = tf.cast(total - tf.reduce_sum(counts), tf.int64)
    return tf.cast(counts, tf.int64) + tf.cast(rank < left, tf.int64)


def _layer_adaptive(scores):
    flat = tf.maximum(tf.reshape(tf.cast(scores, tf.float32), [-1]), 0.0)
    order = tf.math.top_k(order_keys(flat), math.prod(flat.shape)).indices
    descending = tf.cast(tf.gather(flat, order), tf.float64)
    # The scale cancels out. What is zero throughout counts as constant, and does not vanish.
    largest = descending[0]
    squares = tf.where(largest > 0, descending / tf.maximum(largest, 1e-300), 1.0) ** 2
    adapted = squares / tf.cumsum(squares)
    return tf.reshape(tf.scatter_nd(order[:, tf.newaxis], adapted, flat.shape), scores.shape)


_KNOWN = {"erk": erk, "global": global_, "lamp": lamp, "uniform": uniform}


def get(identifier):
    """The allocation with this name, or a callable as it is."""
    return resolve("allocation", identifier, _KNOWN)
