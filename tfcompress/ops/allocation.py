"""Allocations: one overall sparsity -> which units of each weight are kept."""

from collections.abc import Sequence

import tensorflow as tf

from tfcompress.ops.selection import top_k_mask, top_k_masks
from tfcompress.shorthands import resolve

__all__ = ["get", "global_", "num_kept", "uniform"]


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


def uniform(scores: Sequence[tf.Tensor], sparsity) -> list[tf.Tensor]:
    """Every weight gets the overall sparsity.

    Args:
        scores: Scores of each weight's units.
        sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.

    Returns:
        A boolean mask for each of `scores`, `num_kept` elements True in each.

    Example:

    >>> masks = uniform([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], 0.5)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, True], [False, True]]
    """
    return [top_k_mask(each, num_kept(each.shape.num_elements(), sparsity)) for each in scores]


def global_(scores: Sequence[tf.Tensor], sparsity) -> list[tf.Tensor]:
    """All weights compete: the lowest scores go, wherever they are.

    Args:
        scores: Scores of each weight's units.
        sparsity: Fraction of zeros over all of them, in [0, 1).

    Returns:
        A boolean mask for each of `scores`, `num_kept` of the total True in all.

    Example:

    >>> masks = global_([tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])], 0.5)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, False], [True, True]]
    """
    total = sum(each.shape.num_elements() for each in scores)
    return top_k_masks(scores, num_kept(total, sparsity))


_KNOWN = {"uniform": uniform, "global": global_}


def get(identifier):
    """The allocation with this name, or a callable as it is."""
    return resolve("allocation", identifier, _KNOWN)
