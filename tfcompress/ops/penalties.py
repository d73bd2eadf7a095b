"""Penalties: what is added to the loss to make weights small, and their proximal steps."""

import tensorflow as tf

__all__ = ["l1", "soft_threshold"]


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
