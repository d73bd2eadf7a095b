"""Losses on how the examples of a batch lie to each other.

What the replicas of a strategy hold is gathered first, so that two replicas see the pairs that one
device would. A pair counts with the product of the weights of its examples.
"""

import dataclasses

import keras
import tensorflow as tf

from tfcompress.distillation.features import PointLoss, flat
from tfcompress.distillation.losses import DEFAULT, example_weights, gathered


@dataclasses.dataclass(frozen=True)
class BatchLoss(PointLoss):
    """Base: a loss of two batches of vectors and their weights."""

    def __call__(self, teacher, student, context=DEFAULT):
        """The loss of points `(batch, ...)`, which are flattened."""
        target, state = gathered(flat(teacher[0])), gathered(flat(student[0]))
        weights = example_weights(context)
        weights = tf.ones_like(state[:, 0]) if weights is None else gathered(weights)
        return self.of_batch(target, state, weights)

    def of_batch(self, teacher, student, weights):
        """The loss of `(batch, features)` each and weights `(batch,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define of_batch.")


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class RKDDistance(BatchLoss):
    """Distances between examples, relative to their mean: `"rkd_distance"`.

    `mean(huber(d_t - d_s))` over pairs of examples, with d the Euclidean distance over the mean
    distance in the batch.

    Args:
        teacher: Glob over the point of the teacher; None for what its classifier reads.
        student: Likewise of the student; widths may differ.
        mapping: See `Features`.

    Example:

    >>> x = tf.constant([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> float(RKDDistance()([x], [10.0 * x]))
    0.0

    Reference: Park et al. 2019, https://arxiv.org/abs/1904.05068.
    """

    def of_batch(self, teacher, student, weights):
        """The loss of two batches of vectors."""
        pairs = _distinct(weights[:, None] * weights[None, :])
        relative = []
        for x in (teacher, student):
            distances = _distances(x)
            relative.append(tf.math.divide_no_nan(distances, _mean(distances, pairs)))
        count = tf.cast(tf.shape(weights)[0], tf.float32)
        losses = _huber(relative[0] - relative[1])
        return tf.math.divide_no_nan(tf.reduce_sum(pairs * losses), count * (count - 1))


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class RKDAngle(BatchLoss):
    """Angles between examples: `"rkd_angle"`.

    `mean(huber(cos_t - cos_s))` over triples of examples, with cos the cosine of the angle at the
    first between the two others. Takes memory for the cube of the batch.

    Args:
        teacher: Glob over the point of the teacher; None for what its classifier reads.
        student: Likewise of the student; widths may differ.
        mapping: See `Features`.

    Example:

    >>> x = tf.constant([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
    >>> round(float(RKDAngle()([x], [10.0 * x + 1.0])), 6)
    0.0

    Reference: Park et al. 2019, https://arxiv.org/abs/1904.05068.
    """

    def of_batch(self, teacher, student, weights):
        """The loss of two batches of vectors."""
        pairs = _distinct(weights[:, None] * weights[None, :])
        triples = weights[:, None, None] * pairs[None]
        apart = _distinct(tf.ones_like(pairs))
        triples *= apart[:, :, None] * apart[:, None, :]
        cosines = [_cosines(x) for x in (teacher, student)]
        count = tf.cast(tf.shape(weights)[0], tf.float32)
        losses = _huber(cosines[0] - cosines[1])
        return tf.math.divide_no_nan(
            tf.reduce_sum(triples * losses), count * (count - 1) * (count - 2)
        )


@keras.saving.register_keras_serializable(package="tfcompress")
@dataclasses.dataclass(frozen=True)
class Similarity(BatchLoss):
    """Which examples activate alike: `"similarity"`.

    `mean((G_t - G_s)**2)` over pairs, with G the products of all examples, each row of length 1.

    Args:
        teacher: Glob over the point of the teacher; None for what its classifier reads.
        student: Likewise of the student; widths may differ.
        mapping: See `Features`.

    Example:

    >>> x = tf.constant([[1.0, 0.0], [0.0, 1.0]])
    >>> float(Similarity()([x], [2.0 * x]))
    0.0

    Reference: Tung & Mori 2019, https://arxiv.org/abs/1907.09682.
    """

    def of_batch(self, teacher, student, weights):
        """The loss of two batches of vectors."""
        grams = []
        for x in (teacher, student):
            gram = tf.matmul(x, x, transpose_b=True)
            squares = tf.reduce_sum(weights[None, :] * tf.square(gram), axis=1, keepdims=True)
            grams.append(gram * tf.math.rsqrt(tf.maximum(squares, 1e-12)))
        pairs = weights[:, None] * weights[None, :]
        return tf.reduce_mean(pairs * tf.square(grams[0] - grams[1]))


def _distinct(matrix):
    return tf.linalg.set_diag(matrix, tf.zeros_like(matrix[0]))


def _mean(values, weights):
    return tf.math.divide_no_nan(tf.reduce_sum(weights * values), tf.reduce_sum(weights))


def _differences(x):
    return x[None, :, :] - x[:, None, :]


def _distances(x):
    squares = tf.reduce_sum(tf.square(_differences(x)), axis=-1)
    # The square root has no gradient at 0, and `where` alone would not keep its NaN out.
    positive = tf.where(squares > 0, squares, 1.0)
    return tf.where(squares > 0, tf.sqrt(positive), 0.0)


def _cosines(x):
    directions = tf.math.l2_normalize(_differences(x), axis=-1)
    return tf.matmul(directions, directions, transpose_b=True)


def _huber(x):
    size = tf.abs(x)
    return tf.where(size < 1.0, 0.5 * tf.square(x), size - 0.5)
