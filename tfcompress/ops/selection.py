"""The k largest of a tensor, or of many tensors together: exact, static-shaped, without a sort.

Floats are mapped to integers of the same order, and the k-th largest is found by bisection on those
integers: one compare-and-count pass over the data a probe, some 7 in all. That is many times
faster than `tf.sort` or `tf.math.top_k`, takes `k` at run time, and compiles for XLA and TPUs,
where sorting is slow to compile. Ties at the threshold are broken by index: the first are kept.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

__all__ = ["order_keys", "top_k_mask", "top_k_masks"]

_ROW = 1024
_SAMPLE = 2048


def order_keys(scores: tf.Tensor) -> tf.Tensor:
    """int32 keys in the order of `scores`: `a < b` exactly where `key(a) < key(b)`.

    IEEE 754 floats of one sign compare as their bit patterns do; the negative ones are flipped.
    NaN orders by its bits too, above infinity or below minus infinity: nothing is undefined.

    Args:
        scores: Floating tensor of any shape; computed in float32.

    Returns:
        int32 tensor of the same shape.

    Example:

    >>> [int(key) for key in order_keys(tf.constant([0.0, 1.0, -1.0])).numpy()]
    [0, 1065353216, -1065353216]
    """
    bits = tf.bitcast(tf.cast(scores, tf.float32), tf.int32)

    def flip():
        return tf.where(bits < 0, (bits ^ 0x7FFFFFFF) + 1, bits)  # + 1: both zeros get the key 0.

    # Magnitudes, the usual scores, need no flip, and no copy.
    return tf.cond(tf.reduce_min(bits) < 0, flip, lambda: bits)


def top_k_masks(scores: Sequence[tf.Tensor], k, absolute: bool = False) -> list[tf.Tensor]:
    """Masks that keep the k largest of all `scores` together.

    Args:
        scores: Floating tensors of any shapes, none of size 0; they are not concatenated.
        k: How many to keep, 1 to the total size; a Python int or a scalar integer tensor.
        absolute: Whether `|scores|` are meant. No copy of them is made: the sign is left out
            wherever one is looked at, in a temporary of the size of one tensor.

    Returns:
        Boolean tensors of the shapes of `scores`; exactly `k` elements are True. Of equal scores
        the first in list and row-major order are kept.

    Example:

    >>> masks = top_k_masks([tf.constant([0.1, 0.9]), tf.constant([[0.5], [0.9]])], 2)
    >>> [mask.numpy().tolist() for mask in masks]
    [[False, True], [[False], [True]]]
    """
    flat = [tf.reshape(tf.cast(each, tf.float32), [-1]) for each in scores]
    masks = _flat_masks(flat, tf.cast(k, tf.int64), absolute)
    return [tf.reshape(mask, each.shape) for mask, each in zip(masks, scores, strict=True)]


def top_k_mask(scores: tf.Tensor, k, absolute: bool = False) -> tf.Tensor:
    """Mask that keeps the k largest of `scores`: `top_k_masks` for one tensor.

    Args:
        scores: Floating tensor of any shape, not of size 0.
        k: How many to keep, 1 to the size.
        absolute: Whether `|scores|` are meant.

    Returns:
        Boolean tensor of the same shape with exactly `k` elements True.

    Example:

    >>> top_k_mask(tf.constant([0.5, 0.5, 0.5, 0.1]), 2).numpy().tolist()
    [True, True, False, False]
    """
    return top_k_masks([scores], k, absolute)[0]


# One trace serves the weights of all shapes: tracing the loops anew for each costs seconds a model.
@tf.function(autograph=False, reduce_retracing=True)
def _flat_masks(scores, k, absolute):
    if absolute:
        bits, key = [tf.bitcast(each, tf.int32) for each in scores], _without_sign
    else:
        bits, key = [order_keys(each) for each in scores], tf.identity
    threshold, at_least = _find_threshold(bits, key, k)
    return tf.cond(
        at_least > k,
        lambda: _keep_first_ties(bits, key, threshold, k),
        lambda: _in_turn(lambda each: key(each) >= threshold, bits),
    )


def _without_sign(bits):
    return bits & 0x7FFFFFFF  # Of positive floats the bits are in order already.


def _find_threshold(bits, key, k):
    """A threshold t and the count of keys >= t: exactly k, or more where there are ties at t.

    Keeps `count(>= low) >= k > count(>= high)` and narrows the bracket until a count is k or the
    bracket is one key wide. The first two probes are the keys between which a sample says that
    the k-th lies. The others guess where k is between the two counts, off by half a standard
    deviation of such a count, toward the farther end so that both ends close in; every fourth
    bisects, whatever the distribution. That takes some 7 passes where bisection takes 32.
    """
    size = tf.add_n([tf.size(each, tf.int64) for each in bits])
    first = _sampled_bracket(bits, key, k, size)

    def unsolved(_, low, high, above_low, above_high):
        return (above_low != k) & (high - low > 1)

    def narrow(probe, low, high, above_low, above_high):
        between = tf.cast(above_low - above_high, tf.float32)
        share = (tf.cast(above_low - k, tf.float32) + 0.5) / between
        deviation = tf.where(between > 16, 0.5 * tf.sqrt(share * (1 - share) / between), 0.0)
        share += tf.where(share < 0.5, deviation, -deviation)
        share = tf.where(probe % 4 == 1, 0.5, share)
        guess = low + tf.cast(share * tf.cast(high - low, tf.float32), tf.int64)
        middle = tf.where(probe < 2, first[tf.minimum(probe, 1)], guess)
        middle = tf.clip_by_value(middle, low + 1, high - 1)
        above = _count(lambda each: key(each) >= tf.cast(middle, tf.int32), bits)
        enough = above >= k
        return (
            probe + 1,
            tf.where(enough, middle, low),
            tf.where(enough, high, middle),
            tf.where(enough, above, above_low),
            tf.where(enough, above_high, above),
        )

    ends = tf.constant(tf.int32.min, tf.int64), tf.constant(tf.int32.max + 1, tf.int64)
    start = (tf.constant(0), *ends, size, tf.zeros_like(size))
    _, threshold, _, at_least, _ = tf.while_loop(unsolved, narrow, start)
    return tf.cast(threshold, tf.int32), at_least


def _sampled_bracket(bits, key, k, size):
    """Two keys with the k-th largest of all between them, as far as a sample can tell."""
    stride = size // _SAMPLE | 1  # Odd, so that it does not stay in a few columns.
    sample = tf.sort(tf.concat([key(each[::stride]) for each in bits], 0))
    num = tf.cast(tf.size(sample), tf.float64)
    share = tf.cast(size - k, tf.float64) / tf.cast(size, tf.float64)
    margin = 1.5 * tf.sqrt(num * share * (1 - share)) + 1
    at = num * share + tf.stack([-margin, margin])
    index = tf.cast(tf.clip_by_value(at, 0.0, num - 1), tf.int32)
    return tf.cast(tf.ensure_shape(tf.gather(sample, index), [2]), tf.int64)


def _keep_first_ties(bits, key, threshold, k):
    """The elements above the threshold, and the first ones at it until there are k."""
    ties = _in_turn(lambda each: _count_true(key(each) == threshold), bits)
    left = k - _count(lambda each: key(each) > threshold, bits)
    masks: list[tf.Tensor] = []
    for each, here in zip(bits, ties, strict=True):
        # A tensor's own part fits into int32, the numbers in all of them together may not.
        wanted = tf.cast(tf.clip_by_value(left, 0, tf.cast(here, tf.int64)), tf.int32)
        left -= tf.cast(wanted, tf.int64)
        with tf.control_dependencies(masks[-1:]):
            is_tied = key(each) == threshold
            kept = is_tied & _are_before(_end_of_first(is_tied, wanted), tf.size(each))
            masks.append((key(each) > threshold) | kept)
    return masks


def _end_of_first(flags, wanted):
    """How far one must go to have seen `wanted` of the True ones: the row, then the place in it."""
    rows = tf.reshape(tf.pad(flags, [[0, -tf.size(flags) % _ROW]]), [-1, _ROW])
    seen = tf.cumsum(tf.reduce_sum(tf.cast(rows, tf.int32), axis=1))
    row = tf.reduce_sum(tf.cast(seen < wanted, tf.int32))
    in_row = tf.cumsum(tf.cast(rows[row], tf.int32)) + tf.where(
        row > 0, seen[tf.maximum(row - 1, 0)], 0
    )
    end = row * _ROW + tf.reduce_sum(tf.cast(in_row < wanted, tf.int32)) + 1
    return tf.where(wanted > 0, end, 0)


def _are_before(end, size):
    """Whether each of `size` positions comes before `end`."""
    # In rows, since Grappler makes a constant of the whole range, as large as the weight.
    starts = tf.range((size + _ROW - 1) // _ROW) * _ROW - end
    return tf.reshape(starts[:, tf.newaxis] + tf.range(_ROW) < 0, [-1])[:size]


def _count(condition: Callable, bits: Sequence[tf.Tensor]) -> tf.Tensor:
    counts = _in_turn(lambda each: _count_true(condition(each)), bits)
    return tf.add_n([tf.cast(each, tf.int64) for each in counts])


def _count_true(flags):
    # In int32, the fastest to reduce: a single weight has fewer than 2 ** 31 elements.
    return tf.reduce_sum(tf.cast(flags, tf.int32))


def _in_turn(function: Callable, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """`function` of each tensor, one after the other, so that one temporary at a time is alive."""
    results: list[tf.Tensor] = []
    for each in tensors:
        with tf.control_dependencies(results[-1:]):
            results.append(function(each))
    return results
