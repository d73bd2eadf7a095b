"""Losses of different sizes, brought to one size while they train."""

import keras
import tensorflow as tf

_MOMENTUM = 0.99
_LARGEST = 100.0


def check_balancing(balancing) -> None:
    """Raise a ValueError if `balancing` is not known.

    >>> check_balancing("magnitude")
    """
    if balancing not in (None, "magnitude"):
        raise ValueError(f'balancing must be "magnitude" or None, got {balancing!r}.')


class Magnitudes(keras.layers.Layer):
    """Factors that give every loss the running magnitude of the first one.

    The magnitude of a loss is its moving average, `m <- 0.99 m + 0.01 L`, corrected for its start
    at 0; the factor of loss k is `m_0 / m_k`, at most 100 times what it was in the first step, so
    that a loss that vanishes does not take over. No gradient flows through the factors, so a weight
    is the share of a loss in the total, and the minimum of each loss is where it was. (Uncertainty
    weighting, Kendall et al. 2018, is not offered: it is derived for the likelihood of targets with
    noise, and lets the weight of a loss that can reach 0 grow without bound.)

    Args:
        count: How many losses.

    Example:

    >>> magnitudes = Magnitudes(2)
    >>> [round(float(x), 3) for x in magnitudes(tf.constant([1.0, 4.0]), training=True)]
    [1.0, 0.25]

    Reference: ratios to running means: Groenendijk et al. 2021, https://arxiv.org/abs/2009.01717.
    """

    def __init__(self, count: int, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.count = count
        # Replicas see parts of the batch: the mean of their losses is that of the batch.
        arguments = {"initializer": "zeros", "trainable": False, "aggregation": "mean"}
        self.average = self.add_weight(shape=(count,), name="average", **arguments)
        self.first = self.add_weight(shape=(count,), name="first", **arguments)
        self.steps = self.add_weight(shape=(), name="steps", **arguments)
        self.built = True

    def call(self, losses, training=False):
        """The factor of each loss, `(count,)`; those that are 0 so far get 1."""
        losses = tf.stop_gradient(losses)
        if training:
            self.first.assign(tf.where(self.first > 0, tf.convert_to_tensor(self.first), losses))
            self.average.assign(_MOMENTUM * self.average + (1 - _MOMENTUM) * losses)
            self.steps.assign_add(1.0)
        started = 1.0 - tf.pow(_MOMENTUM, tf.convert_to_tensor(self.steps))
        magnitudes = tf.math.divide_no_nan(tf.convert_to_tensor(self.average), started)
        magnitudes = tf.maximum(magnitudes, tf.convert_to_tensor(self.first) / _LARGEST)
        known = (magnitudes > 0) & (magnitudes[0] > 0)
        return tf.where(known, tf.math.divide_no_nan(magnitudes[0], magnitudes), 1.0)
