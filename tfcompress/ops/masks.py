"""Masks: criterion, structure and allocation put together. True keeps, False prunes."""

from collections.abc import Sequence

import tensorflow as tf

from tfcompress.ops import allocation as allocations
from tfcompress.ops import criteria, structures

__all__ = ["apply_mask", "choose_masks"]


def choose_masks(
    weights: Sequence[tf.Tensor],
    sparsity,
    criterion="magnitude",
    structure="unstructured",
    allocation="uniform",
) -> list[tf.Tensor]:
    """Masks that prune `weights` to `sparsity`.

    Args:
        weights: Floating tensors or `tf.Variable`s, none of size 0.
        sparsity: Fraction of zeros in [0, 1), a float or a scalar tensor.
        criterion: Scores the weights, e.g. "magnitude".
        structure: What is kept together, e.g. "unstructured".
        allocation: How the sparsity is shared out, e.g. "uniform".

    Returns:
        A boolean tensor for each weight, of its shape.

    Example:

    >>> choose_masks([tf.constant([1.0, -3.0, 2.0, 0.5])], 0.5)[0].numpy().tolist()
    [False, True, True, False]
    """
    criterion, structure = criteria.get(criterion), structures.get(structure)
    scores = [structure.pool(criterion(tf.identity(weight))) for weight in weights]
    units = allocations.get(allocation)(scores, sparsity)
    return [
        structure.spread(mask, weight.shape) for mask, weight in zip(units, weights, strict=True)
    ]


def apply_mask(weight: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """`weight` where `mask` is True, 0 elsewhere; NaN and infinity are pruned like any value.

    Args:
        weight: Floating tensor.
        mask: Boolean tensor of the same shape.

    Returns:
        Tensor of the shape and dtype of `weight`.

    Example:

    >>> apply_mask(tf.constant([1.0, float("nan")]), tf.constant([True, False])).numpy().tolist()
    [1.0, 0.0]
    """
    return tf.where(mask, weight, tf.zeros((), weight.dtype))
