"""A histogram of a stream of tensors, of one fixed size for any stream.

The bins are as wide as a 64th of the power of two below them, as floating-point numbers are: one
value of 1e6 in the stream takes no resolution from the values near 1, as it would from equally wide
bins; no bin ever has to be merged, so that the order of the stream does not matter; and the bin of
a value is the first bits of its float32 representation.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfcompress.ops import ranges

_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -40, 40
_BINS_OF_AN_OCTAVE = 64
_SHIFT = 17  # bits of a float32 below the ones that tell the 64 bins of an octave apart
_SIDE = (_LARGEST_EXPONENT - _SMALLEST_EXPONENT) * _BINS_OF_AN_OCTAVE
_OFFSET = (127 + _SMALLEST_EXPONENT) * _BINS_OF_AN_OCTAVE - 1

NUM_BINS = 2 * _SIDE + 1


class Stream(NamedTuple):
    """What is known of the values that a place of a model has seen, batch by batch.

    Attributes:
        counts: int64 `(NUM_BINS,)`: values in each bin, ascending; the middle one counts zeros.
        extremes: float32 `(2,)`: the smallest and the largest value, 0 included.
        average: float32 `(2,)`: the moving average of the extremes of a batch.
        batch_size: float32 scalar: values in the first batch; 0 before it.
        finite: Boolean scalar: whether no value was NaN or infinite.
    """

    counts: tf.Tensor
    extremes: tf.Tensor
    average: tf.Tensor
    batch_size: tf.Tensor
    finite: tf.Tensor


def empty() -> Stream:
    """The stream that has seen nothing."""
    return Stream(
        counts=tf.zeros(NUM_BINS, tf.int64),
        extremes=tf.zeros(2),
        average=tf.zeros(2),
        batch_size=tf.zeros(()),
        finite=tf.constant(True),
    )


def updated(stream: Stream, x, momentum: float = 0.9, counting: bool = True) -> Stream:
    """The stream after another batch.

    Args:
        stream: The stream so far.
        x: Float tensor of any shape, the batch.
        momentum: In [0, 1), of the moving average. A batch of another size than the first weighs as
            much less or more: its momentum is `momentum^(size / first size)`.
        counting: Whether to keep the histogram, which takes longer than the rest and does not
            compile under XLA.

    Returns:
        The new stream.

    Example:

    >>> stream = updated(empty(), tf.constant([-1.0, 3.0]))
    >>> stream = updated(stream, tf.constant([0.0, 5.0]), momentum=0.5)
    >>> stream.extremes.numpy().tolist(), stream.average.numpy().tolist()
    ([-1.0, 5.0], [-0.5, 4.0])
    """
    x = tf.cast(x, tf.float32)
    extremes = ranges.extremes(x)
    size = tf.cast(tf.size(x), tf.float32)
    first = tf.where(tf.equal(stream.batch_size, 0.0), size, stream.batch_size)
    kept = tf.pow(momentum, size / tf.maximum(first, 1.0))
    moved = kept * stream.average + (1.0 - kept) * extremes
    is_first = tf.equal(stream.batch_size, 0.0)
    return Stream(
        counts=stream.counts + counts(x) if counting else stream.counts,
        extremes=ranges.widened_range(stream.extremes, extremes),
        average=tf.where(is_first, extremes, moved),
        batch_size=first,
        finite=stream.finite & tf.reduce_all(tf.math.is_finite(x)),
    )


def counts(x) -> tf.Tensor:
    """How many values lie in each bin.

    Args:
        x: Float tensor of any shape, of less than 2^31 values. What is nearer to 0 than 2^-40
            counts as 0, what is beyond 2^40 lies in the last bin.

    Returns:
        int64 `(NUM_BINS,)`.

    Example:

    >>> int(tf.argmax(counts(tf.constant([0.0, 0.0, -1.0])))) == NUM_BINS // 2
    True
    """
    x = tf.reshape(tf.cast(x, tf.float32), [-1])
    # bincount needs no memory but for the bins, and is 6 times as fast as a segment sum.
    found = tf.math.bincount(_bins(x), minlength=NUM_BINS, maxlength=NUM_BINS)
    return tf.cast(found, tf.int64)


def _bins(x):
    leading = tf.bitwise.right_shift(tf.bitcast(tf.abs(x), tf.int32), _SHIFT)
    from_zero = tf.clip_by_value(leading - _OFFSET, 0, _SIDE)
    return _SIDE + tf.where(x < 0.0, -from_zero, from_zero)


def edges() -> np.ndarray:
    """The bounds of the bins: bin `i` holds what lies between edges `i` and `i + 1`.

    Returns:
        float64 `(NUM_BINS + 1,)`, ascending.

    Example:

    >>> above_one = edges()[edges() >= 1.0]
    >>> above_one[:2].tolist()
    [1.0, 1.015625]
    """
    positive = np.arange(_OFFSET + 1, _OFFSET + _SIDE + 2, dtype=np.int32) << _SHIFT
    positive = positive.view(np.float32).astype(np.float64)
    return np.concatenate([-positive[::-1], positive])
