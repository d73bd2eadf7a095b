"""Penalties: what is added to the loss to make weights small, and their proximal steps."""

import keras
import tensorflow as tf

from tfcompress.ops.structures import Structure

__all__ = ["AddedPenalty", "group_lasso", "group_soft_threshold", "l1", "soft_threshold"]


def l1(weight: tf.Tensor, strength: float) -> tf.Tensor:
    """`strength * sum(|w|)` ([Tibshirani 1996](https://doi.org/10.1111/j.2517-6161.1996.tb02080.x)).

    Args:
        weight: Floating tensor of any shape.
        strength: 0 or more.

    Returns:
        Scalar tensor of the same dtype.

    Example:

    >>> float(l1(tf.constant([-1.0, 3.0]), 0.5))
    2.0
    """
    return strength * tf.reduce_sum(tf.abs(weight))


def soft_threshold(weight: tf.Tensor, amount) -> tf.Tensor:
    """`sign(w) * max(|w| - amount, 0)`: the proximal step of `amount * |w|`.

    Unlike the gradient of the penalty it reaches exact zeros
    ([Parikh & Boyd 2014](https://doi.org/10.1561/2400000003), section 6.5.2).

    Args:
        weight: Floating tensor of any shape.
        amount: How far every weight moves towards 0; learning rate times strength in training.

    Returns:
        Tensor of the same shape and dtype.

    Example:

    >>> soft_threshold(tf.constant([-1.0, 0.25]), 0.5).numpy().tolist()
    [-0.5, 0.0]
    """
    amount = tf.cast(amount, weight.dtype)
    return tf.sign(weight) * tf.maximum(tf.abs(weight) - amount, 0)


def group_lasso(weight: tf.Tensor, strength: float, structure: Structure) -> tf.Tensor:
    """`strength * sum_g(sqrt(|g|) * ||w_g||_2)`: whole groups become small ([Yuan & Lin 2006][1]).

    The gradient of a group of zeros, where the norm has none, is 0.

    [1]: https://doi.org/10.1111/j.1467-9868.2005.00532.x

    Args:
        weight: Floating tensor; float16 and bfloat16 are computed in float32.
        strength: 0 or more.
        structure: Its units are the groups g; groups of one make it `l1`.

    Returns:
        Scalar tensor of the same dtype.

    Raises:
        ValueError: The structure has no groups (`NofM`).

    Example:

    >>> from tfcompress.ops.structures import Channel
    >>> round(float(group_lasso(tf.constant([[3.0, 0.0], [4.0, 0.0]]), 1.0, Channel())), 4)
    7.0711
    """
    if _is_elementwise(weight, structure):
        return l1(weight, strength)
    norms, roots = _group_norms(weight, structure)
    return tf.cast(strength * tf.reduce_sum(roots * norms), weight.dtype)


def group_soft_threshold(weight: tf.Tensor, amount, structure: Structure) -> tf.Tensor:
    """`w_g * max(1 - amount * sqrt(|g|) / ||w_g||_2, 0)`: the proximal step of the group lasso.

    Groups whose norm is at most `amount * sqrt(|g|)` become exact zeros
    ([Parikh & Boyd 2014](https://doi.org/10.1561/2400000003), section 6.5.4).

    Args:
        weight: Floating tensor; float16 and bfloat16 are computed in float32.
        amount: How far the norm of a group moves towards 0, for each root of its size; learning
            rate times strength in training.
        structure: Its units are the groups g; groups of one make it `soft_threshold`.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: The structure has no groups (`NofM`).

    Example:

    >>> from tfcompress.ops.structures import Block
    >>> group_soft_threshold(tf.constant([[3.0, 4.0, 0.5]]), 2.0, Block(1, 2)).numpy().round(4)
    array([[1.3029, 1.7373, 0.    ]], dtype=float32)
    """
    if _is_elementwise(weight, structure):
        return soft_threshold(weight, amount)
    norms, roots = _group_norms(weight, structure)
    shrink = tf.cast(amount, norms.dtype) * roots
    # Also where the norm is 0: 1 for an amount of 0, which moves nothing, and 0 for any other.
    survives = norms >= shrink
    left = tf.where(survives, 1.0 - shrink / tf.where(norms > 0, norms, 1.0), 0.0)
    shrunk = tf.cast(weight, norms.dtype) * structure.spread(left, weight.shape)
    return tf.cast(shrunk, weight.dtype)


def _is_elementwise(weight, structure):
    size = weight.shape.num_elements()
    return structure.choose is None and structure.num_units(weight.shape) == size


def _group_norms(weight, structure):
    """The 2-norm and the root of the size of each group."""
    wide = weight if weight.dtype == tf.float64 else tf.cast(weight, tf.float32)
    squares = structure.reduce(tf.square(wide), "sum")
    # The root of 0 has an infinite slope; taken of 1 instead, its gradient is 0.
    present = squares > 0
    norms = tf.where(present, tf.sqrt(tf.where(present, squares, 1.0)), 0.0)
    return norms, tf.sqrt(tf.cast(structure.sizes(weight.shape), norms.dtype))


class AddedPenalty(keras.regularizers.Regularizer):
    """A group lasso on top of the regularizer that a variable has.

    Args:
        previous: A regularizer, or None.
        strength: 0 or more.
        structure: Its units are the groups.

    Example:

    >>> from tfcompress.ops.structures import Unstructured
    >>> penalty = AddedPenalty(keras.regularizers.L2(0.5), 1.0, Unstructured())
    >>> float(penalty(tf.constant([-2.0])))
    4.0
    """

    def __init__(self, previous, strength: float, structure: Structure):
        self.previous = previous
        self.strength = strength
        self.structure = structure

    def __call__(self, weight):
        """The sum of both."""
        penalty = group_lasso(tf.convert_to_tensor(weight), self.strength, self.structure)
        return penalty if self.previous is None else penalty + self.previous(weight)
