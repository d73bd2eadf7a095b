"""The k largest of a tensor, or of many tensors together: exact, static-shaped, without a sort.

Floats are mapped to integers of the same order, and the k-th largest is found by bisection on those
integers: one compare-and-count pass over the data a probe, 10 to 20 in all. That is many times
faster than `tf.sort` or `tf.math.top_k`, takes `k` at run time, and compiles for XLA and TPUs,
where sorting is slow to compile. Ties at the threshold are broken by index: the first are kept.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

__all__ = ["order_keys", "top_k_mask", "top_k_masks"]

_ROW = 1024


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
    bracket is one key wide. Every third probe bisects; the others guess where k lies between the
    two counts, a little past it so that both ends close in. That halves the passes of bisection.
    """
    lowest = _in_turn(lambda each: tf.reduce_min(key(each)), bits)
    highest = _in_turn(lambda each: tf.reduce_max(key(each)), bits)
    low = tf.cast(tf.reduce_min(lowest), tf.int64)
    high = tf.cast(tf.reduce_max(highest), tf.int64) + 1
    size = tf.add_n([tf.size(each, tf.int64) for each in bits])

    def unsolved(_, low, high, above_low, above_high):
        return (above_low != k) & (high - low > 1)

    def narrow(probe, low, high, above_low, above_high):
        share = (tf.cast(above_low - k, tf.float32) + 0.5) / tf.cast(
            above_low - above_high, tf.float32
        )
        share = tf.where(share < 0.25, 2 * share, tf.where(share > 0.75, 2 * share - 1, share))
        share = tf.where(probe % 3 == 2, 0.5, share)
        width = tf.cast(high - low, tf.float32)
        middle = tf.clip_by_value(low + tf.cast(share * width, tf.int64), low + 1, high - 1)
        above = _count(lambda each: key(each) >= tf.cast(middle, tf.int32), bits)
        enough = above >= k
        return (
            probe + 1,
            tf.where(enough, middle, low),
            tf.where(enough, high, middle),
            tf.where(enough, above, above_low),
            tf.where(enough, above_high, above),
        )

    start = (tf.constant(0), low, high, size, tf.zeros_like(size))
    _, threshold, _, at_least, _ = tf.while_loop(unsolved, narrow, start)
    return tf.cast(threshold, tf.int32), at_least


def _keep_first_ties(bits, key, threshold, k):
    """The elements above the threshold, and the first ones at it until there are k."""
    starts, total = {}, tf.constant(0, tf.int64)
    for each in bits:
        starts[id(each)], total = total, total + tf.size(each, tf.int64)

    def ties_before(each, end):
        # Positions in one tensor fit into int32, those in all of them together may not.
        end = tf.cast(tf.clip_by_value(end - starts[id(each)], 0, 2**31 - 1), tf.int32)
        return (key(each) == threshold) & _are_before(end, tf.size(each))

    wanted = k - _count(lambda each: key(each) > threshold, bits)

    def halve(low, high):
        middle = low + (high - low) // 2
        enough = _count(lambda each: ties_before(each, middle), bits) >= wanted
        return tf.where(enough, low, middle + 1), tf.where(enough, middle, high)

    bounds = (tf.constant(0, tf.int64), total)
    end = tf.while_loop(lambda low, high: low < high, halve, bounds)[0]
    return _in_turn(lambda each: (key(each) > threshold) | ties_before(each, end), bits)


def _are_before(end, size):
    """Whether each of `size` positions comes before `end`."""
    # In rows, since Grappler makes a constant of the whole range, as large as the weight.
    starts = tf.range((size + _ROW - 1) // _ROW) * _ROW - end
    return tf.reshape(starts[:, tf.newaxis] + tf.range(_ROW) < 0, [-1])[:size]


def _count(condition: Callable, bits: Sequence[tf.Tensor]) -> tf.Tensor:
    # Counted in int32, the fastest to reduce: a single weight has fewer than 2 ** 31 elements.
    counts = _in_turn(lambda each: tf.reduce_sum(tf.cast(condition(each), tf.int32)), bits)
    return tf.add_n([tf.cast(each, tf.int64) for each in counts])


def _in_turn(function: Callable, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """`function` of each tensor, one after the other, so that one temporary at a time is alive."""
    results: list[tf.Tensor] = []
    for each in tensors:
        with tf.control_dependencies(results[-1:]):
            results.append(function(each))
    return results
