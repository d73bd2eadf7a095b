"""Criteria: weight -> scores of the same shape; the lowest scores are pruned first."""

import tensorflow as tf

from tfcompress.shorthands import resolve

__all__ = ["get", "magnitude"]


def magnitude(weight: tf.Tensor) -> tf.Tensor:
    """`|w|`: small weights matter least ([Han et al. 2015](https://arxiv.org/abs/1506.02626)).

    Args:
        weight: Floating tensor of any shape.

    Returns:
        Scores, of the same shape and dtype, 0 or more.

    Example:

    >>> magnitude(tf.constant([-2.0, 1.0])).numpy().tolist()
    [2.0, 1.0]
    """
    return tf.abs(weight)


_KNOWN = {"magnitude": magnitude}


def get(identifier):
    """The criterion with this name, or a callable as it is."""
    return resolve("criterion", identifier, _KNOWN)
